"""Votes as preferences to train on: `data=hh_local data.preferences=FILE`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.agreement import majority
from rlhf_exp.human.study import Study
from rlhf_exp.human.votes import ratings
from rlhf_exp.store.files import write_text_atomic


@dataclass(frozen=True)
class Written:
    """What became of the items: preferences, ties (left out), and items without a vote."""

    preferences: int
    ties: int
    open: int


def write_preferences(study: Study, path: Path, criterion: str) -> Written:
    """Write prompt, chosen and rejected answer of each item that a majority decided.

    Raises:
        UserError: the study compares models on evaluation prompts, or decided nothing.
    """
    if not study.about.collect:
        raise UserError(
            f"{study.path}: its prompts are those of the evaluation, and what is trained on them "
            "can no longer be evaluated; gather preferences by `rlhf-exp annotate RUN --collect`"
        )
    names = [annotator.name for annotator in study.annotators()]
    votes = [vote for vote in study.votes() if vote.criterion == criterion]
    table = ratings(votes, study.items, names)
    judged = (~np.isnan(table)).any(axis=1)
    verdicts = majority(table)
    lines = []
    for item, row, verdict in zip(study.items, table, verdicts, strict=True):
        if verdict == 0:
            continue
        answers = (item.answer_b, item.answer_a) if verdict > 0 else (item.answer_a, item.answer_b)
        record = {
            "prompt": item.prompt,
            "chosen": answers[0],
            "rejected": answers[1],
            "item": item.id,
            "votes_for": int((row == verdict).sum()),
            "votes": int((~np.isnan(row)).sum()),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"{study.path}: no item has a majority for {criterion} yet")
    write_text_atomic(path, "".join(lines))
    ties = int((judged & (verdicts == 0)).sum())
    return Written(len(lines), ties, int((~judged).sum()))
