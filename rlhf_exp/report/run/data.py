"""The content of a run's report as plain values: `gather` collects them, the page only draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageRow:
    """One step of the pipeline.

    Attributes:
        stage: `sft`, `reward`, `ppo` or `eval`.
        key: the artifact's key in the store.
        cached: whether it was taken from the store rather than made by this run.
        seconds: time that the stage took, if known.
        parameters: number of trained parameters, if any.
        result: its main number in words, such as `accuracy 0.71`.
        published: optimizer step of the weights that it published.
        steps: optimizer steps that it took.
        url: address of its page at W&B, if it has one.
    """

    stage: str
    key: str
    cached: bool
    seconds: float | None = None
    parameters: int | None = None
    result: str = ""
    published: int | None = None
    steps: int | None = None
    url: str | None = None

    @property
    def checkpoint(self) -> str:
        """The published weights in words: `step 240 of 480`; empty where nothing was trained."""
        if self.published is None:
            return ""
        return f"step {self.published:,}" + (f" of {self.steps:,}" if self.steps else "")


@dataclass(frozen=True)
class CalibrationBar:
    """Held-out pairs whose predicted probability fell in one bin.

    Attributes:
        predicted: mean predicted probability of preferring one answer.
        observed: share of pairs in which it was preferred.
        count: pairs in the bin.
    """

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class SampleSide:
    """One model's answer: its name, the text, and (label, value) facts such as its reward."""

    name: str
    text: str
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt with answers side by side, and the rule by which it was chosen."""

    rule: str
    prompt: str
    sides: Sequence[SampleSide]


@dataclass(frozen=True)
class ReportData:
    """A run.

    Attributes:
        title: the run's name.
        identity: (label, value) of its key, date, revision, seeds, versions: the page's end.
        config: the resolved config, nested.
        overview: (label, value) of the model, the published checkpoint, the date: its head.
        data_facts: (label, value): source, rows, rows rejected, prompts cut.
        stages: the pipeline's steps, in order.
        metrics: rows of `metrics.jsonl` by stage (`sft`, `reward`, `ppo`), each with `global_step`.
        evaluation: `ModelComparison.to_json()`, or `None`.
        parts: JSON value of each further file that the evaluation left, by its name.
        samples: prompts with answers side by side; by default the evaluation's own picks.
        sample_rule: the rule by which `samples` were chosen, in words.
        calibration: calibration of the reward model on held-out pairs.
        kl_target: nats per answer that the KL controller aims at, if it adapts.
        usage: (title, code) blocks: how to load the model, how to run this again.
        warnings: reservations that the reader must know before believing the numbers.
    """

    title: str
    identity: Sequence[tuple[str, str]]
    config: Mapping[str, Any]
    overview: Sequence[tuple[str, str]] = ()
    data_facts: Sequence[tuple[str, str]] = ()
    stages: Sequence[StageRow] = ()
    metrics: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    sample_rule: str = ""
    calibration: Sequence[CalibrationBar] = ()
    kl_target: float | None = None
    usage: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()

    @property
    def published_steps(self) -> dict[str, int]:
        """The step of the published weights by stage."""
        return {row.stage: row.published for row in self.stages if row.published is not None}
