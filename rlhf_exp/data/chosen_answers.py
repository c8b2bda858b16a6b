"""Answers chosen among a policy's own, as demonstrations: the file that `stage=best_of` leaves.

One JSON line for each prompt, with its dialogue turn by turn: no text in it is read as markers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf_exp.data.jsonl import UnreadableLine, read_jsonl
from rlhf_exp.data.rows import Corpus, Demonstration, Splits, Turn, make_corpus, prompt_key
from rlhf_exp.errors import UserError

HELD_OUT = "chosen answers left out: their prompt is a test prompt of these data"


def write_chosen(path: Path, rows: Iterable[Demonstration], scores: Iterable[float]) -> None:
    """Write demonstrations, each with the score for which it was chosen."""
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for row, score in zip(rows, scores, strict=True):
            handle.write(json.dumps({**asdict(row), "score": score}, ensure_ascii=False) + "\n")


def read_chosen(path: Path) -> list[Demonstration]:
    """Read what `write_chosen` wrote.

    Raises:
        UserError: A line is no chosen answer.
    """
    rows = []
    for origin, record in read_jsonl(path, "data.demonstrations"):
        try:
            if isinstance(record, UnreadableLine):
                raise ValueError(record.reason)
            fields: Any = record
            history = tuple(Turn(turn["role"], turn["text"]) for turn in fields["history"])
            rows.append(Demonstration(history, fields["response"], fields["origin"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{origin}: not a chosen answer ({type(error).__name__}: {error}); expected a line "
                "of what stage=best_of left"
            ) from error
    return rows


def with_chosen(corpus: Corpus, rows: Iterable[Demonstration]) -> Corpus:
    """Return a corpus whose demonstrations for training and validation are these answers.

    The corpus decides the split by the prompt, whatever it was when the answers were sampled: none
    to one of its test prompts is trained on.

    Raises:
        UserError: All prompts are held out.
    """
    kinds = (corpus.demonstrations, corpus.preferences, corpus.prompts)
    validation_keys = {prompt_key(row.history) for kind in kinds for row in kind.validation}
    test_keys = {prompt_key(row.history) for kind in kinds for row in kind.test}
    splits: Splits[Demonstration] = Splits(test=corpus.demonstrations.test)
    left_out = 0
    for row in rows:
        key = prompt_key(row.history)
        if key in test_keys:
            left_out += 1
        else:
            (splits.validation if key in validation_keys else splits.train).append(row)
    if not splits.train:
        raise UserError(
            f"data.demonstrations: all {left_out + len(splits.validation)} chosen answers are to "
            "prompts that these data hold out; give the data that they were sampled for"
        )
    counts = corpus.counts | ({HELD_OUT: left_out} if left_out else {})
    digest = make_corpus(splits, corpus.preferences, corpus.prompts, []).digest
    return replace(corpus, demonstrations=splits, counts=counts, digest=digest)
