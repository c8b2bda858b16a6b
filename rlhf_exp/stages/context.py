"""The interface between stages and the pipeline: a stage's job, context, data and result.

A `StageJob` and a `StageResult` are plain values, which cross processes. A `StageContext` holds the
job together with objects of the process that runs it. This module is free of torch, because every
command imports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_exp.config.experiment import ArchitectureConfig, Config, DataConfig, DataSource
from rlhf_exp.data.rows import Corpus
from rlhf_exp.data.sources import LoadOptions, load_hub, load_jsonl, load_toy
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.models.architecture import Architecture

if TYPE_CHECKING:
    from rlhf_exp.search.pruning import RunningTrial
    from rlhf_exp.store.lease import Claim
    from rlhf_exp.training.memory import Recorder

log = logging.getLogger(__name__)

MODEL = "model"
"""Folder of the model in an artifact."""

SNAPSHOTS = "snapshots"
"""Folder of the models of other steps in an artifact."""


def snapshot_name(step: int) -> str:
    """Return the name of a step's folder in `SNAPSHOTS`."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class StageJob:
    """One stage's work, as plain values: all that a process needs for it beside the config.

    Attributes:
        stage: Name of the stage.
        key: Key of the result.
        folder: The staging folder.
        cache: Folder of what can be computed again: tokenized sets, scores of original responses.
        models: Model folder or hub id by role (`base`, `sft`, `reward`, `ppo`).
        parents: Keys of the results that it starts from, by role.
        inputs: Digests of the parents' weights, as far as they are in the store.
        claim: The lease under which the result is made; `None` for a result that is not kept.
        probe: Whether only to measure a few iterations.
        trial: The search's trial that the job runs, which the search may prune.
    """

    stage: str
    key: str
    folder: str
    cache: str
    models: dict[str, str]
    parents: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    claim: Claim | None = None
    probe: bool = False
    trial: RunningTrial | None = None


@dataclass(frozen=True)
class StageContext:
    """A stage's job and the objects of this process that it is run with.

    Attributes:
        job: The job.
        materials: The data, shared by the stages of one process.
        before_write: Raises if this process may no longer write.
        polite_interrupts: Defers Ctrl-C inside the block; yields whether it was pressed.
        probe: Measures a few iterations, after which the stage ends.
        given_up: Whether the search prunes the run: called after each of PPO's evaluations, in the
            main process, with the step and the number of steps.
    """

    job: StageJob
    materials: DataModule
    before_write: Callable[[], None]
    polite_interrupts: Callable[[], AbstractContextManager[Callable[[], bool]]]
    probe: Recorder | None = None
    given_up: Callable[[int, int], bool] | None = None

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.job.stage

    @property
    def key(self) -> str:
        """Key of the result."""
        return self.job.key

    @property
    def folder(self) -> Path:
        """The staging folder."""
        return Path(self.job.folder)

    @property
    def cache(self) -> Path:
        """Folder of what can be computed again."""
        return Path(self.job.cache)

    @property
    def models(self) -> Mapping[str, str]:
        """Model folder or hub id by role."""
        return self.job.models

    @property
    def parents(self) -> Mapping[str, str]:
        """Keys of the results that the stage starts from, by role."""
        return self.job.parents

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digests of the parents' weights, by role."""
        return self.job.inputs


class StageModule(Protocol):
    """The `run` function of a stage's module."""

    def __call__(self, config: Config, context: StageContext) -> StageResult:
        """Write the result into `context.folder`."""


@dataclass(frozen=True)
class StageResult:
    """The summary of a stage's result; the result itself is in the staging folder.

    Attributes:
        metrics: Final metrics, for the manifest.
        objective: The number that a sweep over this stage maximises.
        run_id: Id of the tracked run.
        facts: Plain values for the report: parameter counts, data, cut prompts.
        measured: A probe's measurements as JSON values; empty otherwise.
        pruned_step: The optimizer step after which a search pruned the run, without a result.
    """

    metrics: dict[str, float]
    objective: float | None = None
    run_id: str | None = None
    facts: dict[str, float | int | str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    pruned_step: int | None = None


class DataModule:
    """The corpus and codecs of one experiment.

    Args:
        config: The `data` section.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @cached_property
    def corpus(self) -> Corpus:
        """The rows; unusable ones are reported once."""
        corpus = _load(self.config)
        if corpus.unusable:
            listed = "".join(f"\n  {row.origin}: {row.reason}" for row in corpus.unusable[:20])
            log.warning("%d rows cannot be used:%s", len(corpus.unusable), listed)
        return corpus

    def codec(self, folder: str | Path, revision: str | None = None) -> Codec:
        """Return the codec of the tokenizer in a model folder (or of a hub id)."""
        # Late: it loads torch, and the pipeline imports this module.
        from rlhf_exp.models.pretrained import load_tokenizer

        return Codec(load_tokenizer(folder, revision), self.config.format.value)

    def texts(self) -> list[str]:
        """Return the training texts, for training a tokenizer."""
        rows = self.corpus
        texts = [turn.text for row in rows.prompts.train for turn in row.history]
        texts += [row.response for row in rows.demonstrations.train]
        for pair in rows.preferences.train:
            texts += [pair.chosen, pair.rejected]
        return [f" {text}" for text in texts]


def _load(config: DataConfig) -> Corpus:
    rules = LoadOptions(
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_bad_fraction=config.max_bad_fraction,
        limit=config.limit,
    )
    if config.source == DataSource.toy:
        toy = config.toy
        return load_toy(
            toy.seed,
            demonstrations=toy.demonstrations,
            preferences=toy.preferences,
            prompts=toy.prompts,
            validation=toy.validation,
            test=toy.test,
            label_noise=toy.label_noise,
        )
    if config.source == DataSource.hub:
        assert config.path is not None, "checked with the config"
        return load_hub(config.path, config.revision, options=rules)
    return load_jsonl(
        preferences=config.preferences or (),
        demonstrations=config.demonstrations or (),
        prompts=config.prompts or (),
        test=config.test or (),
        options=rules,
    )


def shape_of(section: ArchitectureConfig, vocabulary: int | None = None) -> Architecture:
    """Return the shape that models are built and planned by.

    Args:
        section: The `model.architecture` section.
        vocabulary: Vocabulary size of the trained tokenizer; by default that of the section.
    """
    return Architecture(
        type=section.type.value,
        layers=section.layers,
        width=section.width,
        heads=section.heads,
        ffn_width=section.ffn_width or 4 * section.width,
        vocabulary=vocabulary or section.vocabulary,
        context=section.context,
        kv_heads=section.kv_heads,
        tied=section.tied,
    )
