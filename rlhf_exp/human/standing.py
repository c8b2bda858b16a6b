"""What people have said of an evaluation so far, as plain values for its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_exp.errors import UserError
from rlhf_exp.human.results import CriterionResult, criterion_result
from rlhf_exp.human.study import Study
from rlhf_exp.human.summary import preference_lines, quality_lines
from rlhf_exp.human.wording import question


def standings(folder: Path, source: str) -> list[dict[str, Any]]:
    """Return the votes on one evaluation, study by study, as JSON values.

    Annotators are numbered: a report goes further than the study's own page.

    Args:
        folder: Where studies are.
        source: What their answers come from, such as `eval/KEY`.
    """
    found = []
    for path in sorted(folder.glob("*.sqlite")):
        try:
            study = Study(path)
        except UserError:
            continue  # of whatever evaluation it is; `rlhf-exp annotate` says what is wrong with it
        if study.about.source == source and not study.about.collect:
            found.append(_standing(study))
    return found


def _standing(study: Study) -> dict[str, Any]:
    about, votes = study.about, study.votes()
    results = [
        criterion_result(
            criterion,
            [vote for vote in votes if vote.criterion == criterion],
            study.items,
            about.identical,
            about.seed,
        )
        for criterion in about.criteria
    ]
    return {
        "study": study.path.stem,
        "names": [about.name_a, about.name_b],
        "prompts": len(study.items) + about.identical,
        "criteria": [_plain(one, study) for one in results],
    }


def _plain(found: CriterionResult, study: Study) -> dict[str, Any]:
    names = tuple(f"annotator {number}" for number in range(1, len(found.names) + 1))
    outcome = found.preference.outcome
    return {
        "criterion": found.criterion,
        "question": question(found.criterion),
        "voters": len(found.names),
        "p_value": found.preference.p_value,
        "wins": outcome.wins,
        "ties": outcome.ties,
        "losses": outcome.losses,
        "preference": preference_lines(found, study.about),
        "quality": quality_lines(replace(found, names=names)),
    }
