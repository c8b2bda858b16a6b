"""Label Studio: tasks with their labeling interface, and annotations back.

The interface is made of `Choices`, because the `Pairwise` tag cannot say that two answers tie.
Both of Label Studio's exports can be read, JSON and JSON_MIN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from rlhf_exp.annotation.campaign import Campaign, Choice, Vote, question
from rlhf_exp.annotation.export import LabelledPair, PairNames, judged_pairs, pairs_to_judge
from rlhf_exp.data.jsonl import parse_json
from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import write_text_atomic

TASKS, INTERFACE, ANNOTATIONS = "tasks.json", "interface.xml", "annotations.json"


def write_label_studio(campaign: Campaign, folder: Path) -> list[Path]:
    """Write tasks, interface and, if there are votes, annotated tasks; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: list[Any] = [{"data": _data(pair)} for pair in pairs_to_judge(campaign)]
    texts = {TASKS: _json(tasks), INTERFACE: interface(campaign.info.criteria)}
    judged = judged_pairs(campaign)
    if judged:
        texts[ANNOTATIONS] = _json([_annotated(pair) for pair in judged])
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    return [folder / name for name in texts]


def interface(criteria: tuple[str, ...]) -> str:
    """Return the labeling interface: the conversation, both answers, a choice per criterion."""
    questions = "".join(
        f"  <Header value={quoteattr(question(name))}/>\n"
        f'  <Choices name="{name}" toName="answer_a" choice="single-radio" required="true" '
        'showInline="true">\n'
        + "".join(f'    <Choice value="{choice.value}"/>\n' for choice in Choice)
        + "  </Choices>\n"
        for name in criteria
    )
    answers = "".join(
        f'    <View><Header value="Answer {side.upper()}"/>'
        f'<Text name="answer_{side}" value="$answer_{side}" valueType="text"/></View>\n'
        for side in "ab"
    )
    return (
        "<View>\n"
        '  <Paragraphs name="conversation" value="$conversation" layout="dialogue" '
        'nameKey="author" textKey="text"/>\n'
        '  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1em">\n'
        f"{answers}  </View>\n{questions}</View>\n"
    )


def _data(pair: LabelledPair) -> dict[str, Any]:
    first, second = pair.answers
    return {
        "pair_id": pair.name,
        "conversation": pair.turns,
        "answer_a": first,
        "answer_b": second,
    }


def _annotated(pair: LabelledPair) -> dict[str, Any]:
    annotations = []
    for annotator, votes in pair.by_annotator().items():
        times = [vote.seconds for vote in votes if vote.seconds is not None]
        annotations.append(
            {
                "completed_by": {"email": annotator},
                "created_at": max(vote.at for vote in votes),
                "lead_time": max(times, default=None),
                "was_cancelled": False,
                "result": [
                    {
                        "from_name": vote.criterion,
                        "to_name": "answer_a",
                        "type": "choices",
                        "value": {"choices": [vote.choice.value]},
                    }
                    for vote in votes
                ],
            }
        )
    return {"data": _data(pair), "annotations": annotations}


def read_label_studio(campaign: Campaign, path: Path) -> list[Vote]:
    """Return the votes of an export, JSON or JSON_MIN.

    Raises:
        UserError: the file is no such export, or has a vote of another campaign.
    """
    try:
        tasks = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"--import labelstudio: {path} cannot be read: {error}") from error
    if not isinstance(tasks, list):
        raise UserError(f"{path}: expected a list of tasks, found {type(tasks).__name__}")
    names = PairNames(campaign)
    votes: list[Vote] = []
    for number, task in enumerate(tasks, 1):
        try:
            votes += _votes(names, campaign.info.criteria, task)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, task {number}: no vote of this study: {type(error).__name__}: {error}; "
                f"expected an export of the tasks in {TASKS}"
            ) from error
    return votes


def _votes(names: PairNames, criteria: tuple[str, ...], task: Mapping[str, Any]) -> Iterator[Vote]:
    if "annotations" not in task:
        yield from _flat_votes(names, criteria, task)
        return
    name = task["data"]["pair_id"]
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        annotator = _person(annotation.get("completed_by"))
        at = annotation.get("updated_at") or annotation.get("created_at")
        for part in annotation["result"]:
            if part["type"] == "choices":
                choice = part["value"]["choices"][0]
                seconds = annotation.get("lead_time")
                yield names.vote(name, annotator, part["from_name"], choice, seconds, at)


def _flat_votes(
    names: PairNames, criteria: tuple[str, ...], row: Mapping[str, Any]
) -> Iterator[Vote]:
    """Yield the votes of a JSON_MIN row: one annotation, its choices beside the task's data."""
    at = row.get("updated_at") or row.get("created_at")
    for criterion in criteria:
        if criterion in row:
            annotator, seconds = _person(row.get("annotator")), row.get("lead_time")
            yield names.vote(row["pair_id"], annotator, criterion, row[criterion], seconds, at)


def _person(value: Any) -> str:  # noqa: ANN401 - an id, or an object that may have an address
    if isinstance(value, Mapping):
        value = value.get("email") or value.get("id")
    if value is None:
        raise ValueError("an annotation without an annotator")
    return value if isinstance(value, str) else f"label-studio-{value}"


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
