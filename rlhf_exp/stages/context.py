"""What every stage is given and gives back.

What a stage gives back; plain values, which cross processes.

The data of an experiment, loaded once for all stages of a process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from rlhf_exp.config.experiment import Config, DataConfig, DataSource
from rlhf_exp.data.rows import Corpus
from rlhf_exp.data.sources import LoadOptions, load_hub, load_jsonl, load_toy
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.models.pretrained import load_tokenizer
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
class StageContext:
    """Where a stage works and what it starts from.

    Attributes:
        stage: Its name.
        key: Its key in the store.
        folder: Its staging folder.
        cache: Folder of what can be computed again: tokenized sets, scores of original responses.
        models: Model folder or hub id by role (`sft`, `reward`, `ppo`).
        parents: The keys of what it starts from, by role.
        inputs: Digests of their weights, of those that are in the store.
        materials: The data, shared by the stages of one process.
        before_write: Raises if this process may no longer write.
        polite_interrupts: While entered, Ctrl-C only asks to stop; yields whether it has.
        probe: Measures a few iterations, after which the stage is left.
        given_up: Whether a search gives the run up: asked after each of PPO's evaluations, in the
            main process, with the step and the number of steps.
    """

    stage: str
    key: str
    folder: Path
    cache: Path
    models: Mapping[str, str]
    parents: Mapping[str, str]
    inputs: Mapping[str, str]
    materials: DataModule
    before_write: Callable[[], None]
    polite_interrupts: Callable[[], AbstractContextManager[Callable[[], bool]]]
    probe: Recorder | None = None
    given_up: Callable[[int, int], bool] | None = None


class StageModule(Protocol):
    """A stage."""

    def __call__(self, config: Config, context: StageContext) -> StageResult:
        """Do the work in `context.folder`."""


@dataclass(frozen=True)
class StageResult:
    """What a stage says of its result; the result itself is in the staging folder.

    Attributes:
        metrics: Final numbers, for the manifest.
        objective: What a sweep over this stage maximises.
        run_id: The tracked run.
        facts: Plain values for the report: parameter counts, data, cut prompts.
        measured: What a probe has found, JSON values; empty otherwise.
        pruned_step: The optimizer step after which a search gave the run up, without a result.
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
        return Codec(load_tokenizer(folder, revision), self.config.format.value)

    def texts(self) -> list[str]:
        """Return the training texts, from which a new tokenizer learns."""
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
