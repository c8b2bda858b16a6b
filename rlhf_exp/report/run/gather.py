"""Gathering the content of a run's report from the store: the stages of the run and their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.annotation.campaign import CAMPAIGNS
from rlhf_exp.annotation.results import campaign_summaries
from rlhf_exp.errors import UserError
from rlhf_exp.report.run.data import CalibrationBar, ReportData, StageRow
from rlhf_exp.report.run.sections import SECTIONS
from rlhf_exp.report.run.verdict import PEOPLE_FILE
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.tracking.local import STEP, noted_url, read_metrics

log = logging.getLogger(__name__)

# Names of files that stages leave in their artifacts.
FACTS, RESULT, CALIBRATION, METRICS = (
    "facts.json",
    "result.json",
    "calibration.json",
    "metrics.jsonl",
)


def gather(
    title: str, artifacts: Mapping[str, Artifact], trained: Sequence[str] = ()
) -> ReportData:
    """Return the content of a run's report.

    Args:
        title: The run's name.
        artifacts: The result of each stage, in the order they run; at least one.
        trained: The stages that this run made itself.
    """
    final = list(artifacts.values())[-1]
    files = _Files()
    facts = {stage: files.json(artifact, FACTS) or {} for stage, artifact in artifacts.items()}
    config = final.manifest.config
    curve = files.json(artifacts.get("reward"), CALIBRATION)
    evaluation = artifacts.get("eval")
    metrics = {
        stage: files.metrics(artifact) for stage, artifact in artifacts.items() if stage != "eval"
    }
    result = files.json(evaluation, RESULT)
    parts = {} if evaluation is None else _parts(evaluation, files)
    stages = [
        _stage_row(artifact, facts[stage], stage not in trained, metrics.get(stage, ()))
        for stage, artifact in artifacts.items()
    ]
    return ReportData(
        title=title,
        overview=_overview(final, stages),
        identity=_identity(final),
        config=config,
        data_facts=_data_facts(config, facts),
        stages=stages,
        metrics=metrics,
        evaluation=result,
        parts=parts,
        calibration=[CalibrationBar(**item) for item in curve["bins"]] if curve else [],
        kl_target=config.get("ppo", {}).get("kl", {}).get("target"),
        usage=_usage(artifacts),
        warnings=[*files.damaged, *_warnings(artifacts, facts)],
    )


def loading_code(folder: Path) -> str:
    """Return three lines of Python that load a model with transformers."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )


def _overview(final: Artifact, stages: Sequence[StageRow]) -> list[tuple[str, str]]:
    """Return what a reader asks first: the model, and the step of the published weights."""
    model = final.manifest.config.get("model", {})
    rows = [("Model", str(model.get("path") or model.get("name", "")))]
    rows += [
        (f"Published by {row.stage.upper()}", row.checkpoint)
        for row in stages
        if row.stage in ("dpo", "ppo") and row.checkpoint
    ]
    return [*rows, ("Made", final.manifest.created[:16].replace("T", " ") + " UTC")]


def _identity(final: Artifact) -> list[tuple[str, str]]:
    manifest = final.manifest
    rows = [("Key", f"{final.stage}/{final.key}"), ("Made", manifest.created)]
    if manifest.git:
        changes = " with uncommitted changes" if manifest.git.get("dirty") else ""
        rows.append(("Revision", f"{manifest.git['revision'][:12]}{changes}"))
    seeds = [
        f"{stage} {manifest.config[stage]['seed']}"
        for stage in ("sft", "reward", "dpo", "best_of", "ppo", "eval")
        if "seed" in manifest.config.get(stage, {})
    ]
    rows.append(("Seeds", ", ".join(seeds)))
    versions = [f"{name} {version}" for name, version in manifest.versions.items()]
    rows.append(("Versions", ", ".join(versions)))
    if manifest.wandb_run_id:
        rows.append(("W&B run", manifest.wandb_run_id))
    return rows


def _data_facts(
    config: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    data = config.get("data", {})
    rows = [("Source", str(data.get("source", "")))]
    rows += [
        (name.capitalize(), str(data[name]))
        for name in ("path", "preferences", "demonstrations", "prompts", "test")
        if data.get(name)
    ]
    counted = (
        ("sft", "rows", "Demonstrations"),
        ("reward", "pairs", "Preference pairs"),
        ("dpo", "pairs", "Preference pairs of DPO"),
        ("best_of", "prompts", "Prompts of best-of-n"),
        ("best_of", "demonstrations", "Answers chosen"),
        ("ppo", "prompts", "Training prompts"),
        ("eval", "prompts", "Test prompts"),
        ("ppo", "cut_prompts", "Prompts cut to fit"),
        ("sft", "rejected", "Unusable rows"),
        ("sft", "dropped", "Rows left out for sharing a prompt with the test set"),
    )
    for stage, name, label in counted:
        if name in facts.get(stage, {}):
            rows.append((label, f"{facts[stage][name]:,}"))
    return rows


def _stage_row(
    artifact: Artifact,
    facts: Mapping[str, Any],
    cached: bool,
    rows: Sequence[Mapping[str, float]],
) -> StageRow:
    metrics = artifact.manifest.metrics
    main_metrics = {
        "sft": ("eval/perplexity", "validation perplexity {:.2f}"),
        "reward": ("test/accuracy", "test accuracy {:.3f}"),
        "dpo": ("eval/accuracy", "validation accuracy {:.3f}"),
        "best_of": ("best_of/reward_chosen", "mean reward of the best {:.3f}"),
        "ppo": ("eval/reward_mean", "validation reward {:.3f}"),
        "eval": ("eval/outcome/win_rate", "{:.0%} of decided pairs won"),
    }
    name, template = main_metrics.get(artifact.stage, ("", ""))
    result = template.format(metrics[name]) if name in metrics else ""
    if "test/accuracy_low" in metrics:
        low, high = metrics["test/accuracy_low"], metrics["test/accuracy_high"]
        result += f" (95 % interval {low:.3f} to {high:.3f})"
    return StageRow(
        artifact.stage,
        artifact.key,
        cached,
        seconds=artifact.manifest.duration_s,
        parameters=facts.get("trainable"),
        result=result,
        published=int(metrics["published_step"]) if "published_step" in metrics else None,
        steps=int(max((row[STEP] for row in rows), default=0)) or None,
        url=noted_url(artifact.path),
    )


def _usage(artifacts: Mapping[str, Artifact]) -> list[tuple[str, str]]:
    artifact = artifacts.get("ppo", artifacts.get("dpo"))
    if artifact is None:
        return []
    return [
        ("Load the model", loading_code(artifact.path / "model")),
        ("Talk to it", f"rlhf-exp chat {artifact.key} --against sft"),
    ]


def _warnings(
    artifacts: Mapping[str, Artifact], facts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    notes = []
    dirty = [stage for stage, result in artifacts.items() if result.manifest.git.get("dirty")]
    if dirty:
        notes.append(
            f"{', '.join(dirty)}: made with uncommitted changes; the manifest has the diff."
        )
    rejected = facts.get("sft", {}).get("rejected", 0)
    if rejected:
        notes.append(f"{rejected} rows of the data could not be used.")
    step = artifacts["ppo"].manifest.metrics.get("published_step") if "ppo" in artifacts else None
    if step == 0.0:
        notes.append("No PPO step improved on SFT on validation prompts: the policy is SFT's.")
    return notes


def _parts(evaluation: Artifact, files: _Files) -> dict[str, Any]:
    """Return the files of the evaluation's parts that the page has a section for."""
    parts = {section.file: files.json(evaluation, section.file) for section in SECTIONS}
    # OUTPUTS/store/eval/KEY, OUTPUTS/human
    campaigns = campaign_summaries(evaluation.path.parents[2] / CAMPAIGNS, f"eval/{evaluation.key}")
    if campaigns or parts[PEOPLE_FILE] is not None:
        parts[PEOPLE_FILE] = {
            **(parts[PEOPLE_FILE] or {}),
            "run": evaluation.key,
            "studies": campaigns,
        }
    return {file: value for file, value in parts.items() if value is not None}


class _Files:
    """Reads the files of artifacts; the page does without those that are damaged.

    Attributes:
        damaged: A sentence for each of them, with its path and the remedy.
    """

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def json(self, artifact: Artifact | None, name: str) -> Any:  # noqa: ANN401 - see Artifact.json
        """Return the content of a JSON file; `None` if there is none, or it is damaged."""
        return None if artifact is None else self._read(lambda: artifact.json(name))

    def metrics(self, artifact: Artifact) -> list[dict[str, float]]:
        """Return the metrics that a stage logged; nothing if they are damaged."""
        rows = self._read(lambda: read_metrics(artifact.file(METRICS) or artifact.path / METRICS))
        return rows or []

    def _read(self, read: Callable[[], Any]) -> Any:  # noqa: ANN401
        try:
            return read()
        except UserError as error:
            self.damaged.append(f"Left out: {error}.")
            log.warning("left out of the report: %s", error)
            return None
