"""SageMaker Ground Truth: manifest and task templates out, the consolidated output back.

A job asks one question, so there is a template for each criterion; all share the manifest. Votes
are read from the output manifest, in which every worker's answer to a line is a JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rlhf_exp.annotation.campaign import Campaign, Choice, Vote, question
from rlhf_exp.annotation.export import LabelledPair, PairNames, judged_pairs, pairs_to_judge
from rlhf_exp.data.jsonl import UnreadableLine, parse_json, read_jsonl
from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import write_text_atomic

MANIFEST, OUTPUT = "manifest.jsonl", "output.manifest"
LINE_LIMIT = 100_000
_TEMPLATE = """\
<script src="https://assets.crowd.aws/crowd-html-elements.js"></script>
<style>
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.answers {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1em; }}
</style>
<crowd-form>
  <crowd-classifier name="{name}" categories="{categories}" header="{header}">
    <classification-target>
      <h3>Conversation</h3>
      <div class="text">{{{{ task.input.source }}}}</div>
      <div class="answers">
        <div><h3>Answer A</h3><div class="text">{{{{ task.input.answer_a }}}}</div></div>
        <div><h3>Answer B</h3><div class="text">{{{{ task.input.answer_b }}}}</div></div>
      </div>
    </classification-target>
    <full-instructions header="Instructions">{instructions}</full-instructions>
    <short-instructions>{instructions}</short-instructions>
  </crowd-classifier>
</crowd-form>
"""


def write_ground_truth(campaign: Campaign, folder: Path) -> list[Path]:
    """Write manifest, templates and, if there are votes, an output manifest; return the files.

    Raises:
        UserError: a pair is longer than a line of a manifest may be.
    """
    lines = [_line(campaign, _source(pair)) for pair in pairs_to_judge(campaign)]
    texts = {MANIFEST: "".join(lines)}
    for criterion in campaign.info.criteria:
        texts[f"template-{criterion}.liquid.html"] = template(campaign, criterion)
    judged = judged_pairs(campaign)
    if judged:
        lines_with_answers = [{**_source(pair), **_answers(pair)} for pair in judged]
        texts[OUTPUT] = "".join(json.dumps(line) + "\n" for line in lines_with_answers)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    return [folder / name for name in texts]


def template(campaign: Campaign, criterion: str) -> str:
    """Return the task template; Liquid escapes the texts that it takes from a line."""
    paragraphs = campaign.info.instructions.split("\n\n")
    return _TEMPLATE.format(
        name=criterion,
        categories=escape(json.dumps([choice.value for choice in Choice])),
        header=escape(question(criterion)),
        # A brace in the owner's text would be read as Liquid's.
        instructions="".join(
            f"<p>{escape(text).replace('{', '&#123;')}</p>" for text in paragraphs
        ),
    )


def _source(pair: LabelledPair) -> dict[str, str]:
    first, second = pair.answers
    conversation = "\n\n".join(f"{turn['author']}: {turn['text']}" for turn in pair.turns)
    return {
        "source": conversation,
        "pair_id": pair.name,
        "answer_a": first,
        "answer_b": second,
    }


def _line(campaign: Campaign, source: Mapping[str, str]) -> str:
    line = json.dumps(source) + "\n"
    if len(line) > LINE_LIMIT:
        raise UserError(
            f"{campaign.path}: a pair takes {len(line):,} bytes, and a line of a Ground Truth "
            f"manifest at most {LINE_LIMIT:,}; it begins {source['source'][:60]!r}. Use another "
            "service, or a study without it"
        )
    return line


def _answers(pair: LabelledPair) -> dict[str, Any]:
    """Return a label attribute for each criterion, as the consolidation of its job writes it."""
    labels: dict[str, Any] = {}
    for annotator, votes in pair.by_annotator().items():
        for vote in votes:
            content = json.dumps({vote.criterion: {"label": vote.choice.value}})
            answer = {"workerId": annotator, "annotationData": {"content": content}}
            label = labels.setdefault(vote.criterion, {"annotationsFromAllWorkers": []})
            label["annotationsFromAllWorkers"].append(answer)
    return labels


def read_ground_truth(campaign: Campaign, path: Path) -> list[Vote]:
    """Return the votes of an output manifest.

    Raises:
        UserError: the file is no such manifest, or has a vote of another campaign.
    """
    names = PairNames(campaign)
    votes: list[Vote] = []
    for origin, record in read_jsonl(path, "--import groundtruth"):
        if isinstance(record, UnreadableLine):
            raise UserError(f"{origin}: {record.reason}")
        try:
            votes += _votes(names, campaign.info.criteria, record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{origin}: no votes of this study: {type(error).__name__}: {error}; expected a "
                f"line of the output for {MANIFEST}, with all workers' answers"
            ) from error
    return votes


def _votes(names: PairNames, criteria: tuple[str, ...], line: Any) -> Iterator[Vote]:  # noqa: ANN401
    """Yield the votes of one line, whatever its label attributes are called."""
    for label in line.values():
        if not isinstance(label, Mapping) or "annotationsFromAllWorkers" not in label:
            continue
        for answer in label["annotationsFromAllWorkers"]:
            content: Any = parse_json(answer["annotationData"]["content"])
            for criterion in criteria:
                if criterion in content:
                    choice = content[criterion]["label"]
                    yield names.vote(line["pair_id"], answer["workerId"], criterion, choice)
