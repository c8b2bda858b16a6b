"""`rlhf-exp judge FILE`: how well judges agree with the people who judged a file of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.commands.runs import OutputFolder, table
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.human_agreement import (
    HumanAgreement,
    JudgedPairs,
    JudgeQuality,
    judge_quality,
    people_agreement,
    read_judged_pairs,
)
from rlhf_exp.evaluation.judges.llm import (
    CRITERION,
    Endpoint,
    JudgeClient,
    LLMJudge,
    ReplyCache,
    consistent_pairs,
    first_place_bias,
)
from rlhf_exp.evaluation.judges.protocol import Judge
from rlhf_exp.evaluation.judges.reward_models import (
    ClassifierTextScorer,
    RewardJudge,
    RewardModelTextScorer,
)
from rlhf_exp.evaluation.preference import DASH, format_estimate
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.models.reward_model import REWARD_HEAD_FILE, RewardModel
from rlhf_exp.redaction import secret_variable
from rlhf_exp.stages.evaluation.preference import REPLIES, judge_with_progress, request_fields
from rlhf_exp.store.atomic_files import write_json_atomic

_SIDES = ("a", "tie", "b")


@dataclass(frozen=True)
class RequestedJudges:
    """The judges asked for.

    Attributes:
        reward: runs, folders or hub ids of reward models.
        llm: name of a language model.
        url: its endpoint.
        key_env: environment variable with the endpoint's key.
        criterion: what the better answer is more of.
        request: further fields of each request, `NAME:JSON`.
        concurrency: requests under way at once.
    """

    reward: tuple[str, ...] = ()
    llm: str | None = None
    url: str | None = None
    key_env: str | None = None
    criterion: str = CRITERION
    request: tuple[str, ...] = ()
    concurrency: int = 8


def judge(
    outputs: Path,
    file: Path,
    panel: RequestedJudges,
    pairs: int | None = None,
    out: Path | None = None,
    question: str | None = None,
) -> str:
    """Return tables of what people say and of how far each judge agrees with them.

    Args:
        outputs: the output folder.
        file: pairs that people have judged.
        panel: the judges; without any, only people are compared with each other.
        pairs: most pairs.
        out: file for the numbers, as JSON.
        question: the criterion whose votes count, of a file with several; by default the first.

    Raises:
        UserError: the file or a judge cannot be used.
    """
    if pairs is not None and pairs < 1:
        raise UserError(f"--pairs {pairs}: must be at least 1")
    labels = read_judged_pairs(file, "judge", question).first(pairs)
    people = people_agreement(labels.ratings, labels.annotators)
    qualities: list[JudgeQuality] = []
    notes: list[str] = []
    for panel_judge in _judges(OutputFolder(outputs), panel):
        verdicts = judge_with_progress(panel_judge, labels.pairs)
        signs = [verdict.sign for verdict in verdicts]
        qualities.append(judge_quality(panel_judge.name, signs, labels.ratings))
        if isinstance(panel_judge, LLMJudge):
            bias, (same, both) = first_place_bias(verdicts), consistent_pairs(verdicts)
            share = f"{100 * bias.share:.1f} %" if bias.first + bias.second else DASH
            usage = panel_judge.usage
            notes.append(
                f"{panel_judge.name}: alike in both orders {same} of {both}, "
                f"first answer wins {share}, "
                f"{usage.unparsed} pairs unreadable; {usage.requests} replies asked for, "
                f"{usage.cached} kept ones, {usage.prompt_tokens} tokens read, "
                f"{usage.completion_tokens} written"
            )
    if out is not None:
        content = {
            "file": file.name,
            "criterion": labels.criterion,
            "unusable": labels.unusable,
            "people": people.to_json(),
        }
        write_json_atomic(
            out, {**content, "judges": [panel_judge.to_json() for panel_judge in qualities]}
        )
    return "\n".join([_people_table(people, labels), *_quality_tables(qualities), *notes, ""])


def _judges(outputs: OutputFolder, panel: RequestedJudges) -> list[Judge]:
    judges: list[Judge] = [_reward_judge(outputs, spec) for spec in panel.reward]
    if panel.llm is None:
        return judges
    if panel.url is None:
        raise UserError("--llm: needs --url, such as http://127.0.0.1:8000/v1")
    api_key = None if panel.key_env is None else secret_variable(panel.key_env)
    if panel.key_env is not None and not api_key:
        raise UserError(f"--key-env {panel.key_env}: no such environment variable, or it is empty")
    if panel.concurrency < 1:
        raise UserError(f"--concurrency {panel.concurrency}: must be at least 1")
    endpoint = Endpoint(panel.url, panel.llm, api_key, request=request_fields(panel.request))
    replies = ReplyCache(outputs.path / REPLIES)
    return [*judges, LLMJudge(JudgeClient(endpoint), replies, panel.criterion, panel.concurrency)]


def _reward_judge(outputs: OutputFolder, spec: str) -> Judge:
    """Return the reward model of a run, or of a folder or hub id."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(spec)
    prompt_format: Any = "hh"
    if not folder.is_dir():
        try:
            outputs.run(spec, ("reward",))
        except UserError:
            if spec.count("/") != 1:
                raise
            classifier = ClassifierTextScorer(spec, device=device)
            return RewardJudge(classifier.name, classifier)
        artifacts = outputs.artifacts(spec, ("reward",))
        if "reward" not in artifacts:
            raise UserError(f"--reward {spec}: that run has no reward model")
        artifact = artifacts["reward"]
        folder, prompt_format = artifact.path / "model", artifact.manifest.config["data"]["format"]
    if not (folder / REWARD_HEAD_FILE).is_file():
        classifier = ClassifierTextScorer(folder, device=device)
        return RewardJudge(classifier.name, classifier)
    codec = Codec(load_tokenizer(folder), prompt_format)
    return RewardJudge(spec, RewardModelTextScorer(RewardModel.load(folder), codec, device=device))


def _people_table(agreement: HumanAgreement, labels: JudgedPairs) -> str:
    a, tie, b = agreement.counts
    choice = " (--question chooses)" if labels.other_criteria else ""
    rows = [("Question", f"{labels.question}{choice}")] if labels.question else []
    rows += [
        ("Pairs", f"{agreement.pairs}; by majority {a} for a, {tie} ties, {b} for b"),
        ("People", f"{len(agreement.annotators)}"),
    ]
    if labels.unusable:
        rows.append(("Left out", f"{labels.unusable} rows are no pair of answers to one prompt"))
    if agreement.agreement is not None:
        rows += [
            ("Two people agree", format_estimate(agreement.agreement, 3)),
            ("Krippendorff's alpha", format_estimate(agreement.alpha, 3)),
        ]
    return table(("people", ""), rows)


def _quality_tables(qualities: list[JudgeQuality]) -> list[str]:
    parts = []
    for quality in qualities:
        rows = [
            ("As the majority", format_estimate(quality.agreement, 3)),
            ("Where both decide", format_estimate(quality.decided, 3)),
            ("As one person", format_estimate(quality.with_one, 3)),
            ("Cohen's kappa", format_estimate(quality.kappa, 3)),
            ("Krippendorff's alpha", format_estimate(quality.alpha, 3)),
        ]
        header = ("people say", *(f"judge {side}" for side in _SIDES))
        counts = [
            (side, *map(str, row)) for side, row in zip(_SIDES, quality.confusion, strict=True)
        ]
        parts += [table((quality.judge, ""), rows), table(header, counts)]
    return parts
