"""The data of an experiment, loaded once for all stages of a process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Self

from rlhf_exp.config.experiment import CHOSEN, Config, DataConfig, DataSource, PromptFormat
from rlhf_exp.data.chosen_answers import read_chosen, with_chosen
from rlhf_exp.data.rows import (
    Corpus,
    Demonstration,
    Preference,
    Prompt,
    Row,
    Splits,
    part_number,
    prompt_key,
)
from rlhf_exp.data.sources import (
    FileReader,
    LoadOptions,
    Refusal,
    load_arithmetic,
    load_hub,
    load_jsonl,
    load_toy,
)
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import end_token_ids, load_tokenizer
from rlhf_exp.user_function import UserReader, load_function

log = logging.getLogger(__name__)


class DataModule:
    """The corpus and codecs of one experiment.

    Args:
        config: The `data` section.
        model: Folder or hub id of the model whose chat template the rows must suit; it is read for
            `data.format=chat_template` alone.
        revision: Revision of a hub id.
        report: Whether the log says what was normalised, left out or cannot be used.
        chosen: File of the chosen answers that `data.demonstrations=best_of:RUN` names; stages that
            read no demonstrations have none.
    """

    def __init__(
        self,
        config: DataConfig,
        model: str | Path | None = None,
        revision: str | None = None,
        report: bool = True,
        chosen: str | None = None,
    ) -> None:
        self.config, self._report, self._chosen = config, report, chosen
        self._model, self._revision = model, revision

    @classmethod
    def of_run(cls, config: Config, models: Mapping[str, str]) -> Self:
        """Return the data of an experiment, whose rows suit its policy's chat template.

        Args:
            config: The experiment.
            models: Folder or hub id by role; SFT keeps the tokenizer of its base model.
        """
        chosen = models.get(CHOSEN)
        if "sft" in models:
            return cls(config.data, models["sft"], chosen=chosen)
        return cls(config.data, models.get("base"), config.model.revision, chosen=chosen)

    @cached_property
    def corpus(self) -> Corpus:
        """The rows; what was normalised, left out or cannot be used is reported once."""
        refusal = None
        if self._model is not None and self.config.format is PromptFormat.chat_template:
            codec = self.codec(self._model, self._revision)
            refusal = codec.refusal
            for warning in codec.warnings if self._report else ():
                log.warning("%s", warning)
        corpus = _load(self.config, refusal)
        if self._chosen is not None:
            corpus = with_chosen(corpus, read_chosen(Path(self._chosen)))
        if not self._report:
            return corpus
        for file in corpus.files:
            layouts = ", ".join(file.layouts) or "none"
            log.info("%s: %s, %d records, layout: %s", file.name, file.kind, file.read, layouts)
        if corpus.counts:
            listed = "".join(f"\n  {number}: {what}" for what, number in corpus.counts.items())
            log.warning("data, numbers of rows:%s", listed)
        if corpus.unusable:
            listed = "".join(f"\n  {row.origin}: {row.reason}" for row in corpus.unusable[:20])
            log.warning("%d rows cannot be used:%s", len(corpus.unusable), listed)
        return corpus

    def facts(self) -> dict[str, float | int | str]:
        """Return what became of the rows, for a result's manifest."""
        counts = self.corpus.counts
        return {
            "rejected": len(self.corpus.unusable),
            "dropped": self.corpus.dropped,
            "data": "; ".join(f"{number}: {what}" for what, number in counts.items()),
        }

    def codec(self, folder: str | Path, revision: str | None = None) -> Codec:
        """Return the codec of the tokenizer in a model folder (or of a hub id)."""
        ends = end_token_ids(folder, revision)
        return Codec(load_tokenizer(folder, revision), self.config.format.value, ends)

    def rows(self) -> list[Row]:
        """Return all rows, of every kind and split."""
        corpus = self.corpus
        kinds = (corpus.demonstrations, corpus.preferences, corpus.prompts)
        return [row for kind in kinds for _, split in kind.all() for row in split]

    def _training_corpus(self) -> Corpus:
        """Return the rows, if something of each input is there to train on."""
        if self.corpus.left_out:
            raise UserError(self.corpus.left_out)
        return self.corpus

    def training_demonstrations(self) -> list[Demonstration]:
        """Return what SFT imitates.

        Raises:
            UserError: The data have no demonstrations.
        """
        rows = self._training_corpus().demonstrations.train
        if not rows:
            raise UserError(
                "data: no demonstrations to train on; give data.demonstrations, or preferences "
                "whose chosen sides serve as such"
            )
        return rows

    def training_pairs(self, stage: str, part: str | None) -> list[Preference]:
        """Return the pairs that a stage learns from.

        Args:
            stage: `reward` or `dpo`, for errors.
            part: A part such as `1/2`; all pairs without.

        Raises:
            UserError: The data have none, or none in this part.
        """
        rows = self._training_corpus().preferences.train
        if not rows:
            raise UserError("data: no preference pairs to train on; give data.preferences")
        chosen = pairs_of(rows, part)
        if not chosen:
            raise UserError(f"{stage}.part={part}: none of {len(rows)} pairs is in it")
        return chosen

    def training_prompts(self, with_response: bool) -> Splits[Prompt]:
        """Return the prompts of PPO: to train on, and for validation (the same without any).

        Args:
            with_response: Whether each needs the data's own response (`ppo.reward.delta`).

        Raises:
            UserError: There are none, or one lacks its response.
        """
        rows = self._training_corpus().prompts
        if not rows.train:
            raise UserError("data: no prompts; give data.prompts or data.preferences")
        splits = Splits(rows.train, rows.validation or rows.train)
        bare = [row.origin for row in rows.train + rows.validation if row.original is None]
        if with_response and bare:
            raise UserError(
                "ppo.reward.delta=true subtracts the score of the data set's own response, but "
                f"{bare[0]} has none; give prompts with responses or set ppo.reward.delta=false"
            )
        return splits

    def test_prompts(self) -> list[Prompt]:
        """Return the held-out dialogues of an evaluation.

        Raises:
            UserError: The data have none.
        """
        rows = self.corpus.prompts.test
        if not rows:
            raise UserError(
                "data: no test prompts to evaluate on; give data.test, raise "
                f"data.test_fraction={self.config.test_fraction}, or evaluate nothing (eval=none)"
            )
        return rows

    def texts(self) -> list[str]:
        """Return the training texts, from which a new tokenizer learns."""
        rows = self.corpus
        texts = [turn.text for row in rows.prompts.train for turn in row.history]
        texts += [row.response for row in rows.demonstrations.train]
        for pair in rows.preferences.train:
            texts += [pair.chosen, pair.rejected]
        return [f" {text}" for text in texts]


def columns_of(config: DataConfig) -> dict[str, str]:
    """Return the files' columns that the config names, by what they hold."""
    return {name: column for name, column in asdict(config.columns).items() if column is not None}


def reader_of(config: DataConfig) -> FileReader | None:
    """Return the user's own reader of files, if there is one.

    Raises:
        UserError: Its file cannot be run, or has no such function.
    """
    if config.reader is None:
        return None
    function = load_function(config.reader, "data.reader")
    return UserReader(function, f"data.reader={config.reader}")


def _load(config: DataConfig, refusal: Refusal | None) -> Corpus:
    options = LoadOptions(
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_bad_fraction=config.max_bad_fraction,
        limit=config.limit,
        turns_in_responses=config.format is PromptFormat.hh,
        refusal=refusal,
        columns=columns_of(config),
        reader=reader_of(config),
    )
    if config.source == DataSource.toy:
        return load_toy(**asdict(config.toy))
    if config.source == DataSource.arithmetic:
        return load_arithmetic(**asdict(config.arithmetic))
    if config.source == DataSource.hub:
        assert config.path is not None, "checked with the config"
        return load_hub(config.path, config.revision, options=options)
    return load_jsonl(
        preferences=config.preferences or (),
        demonstrations=(config.demonstrations or ()) if config.chosen_by is None else (),
        prompts=config.prompts or (),
        test=config.test or (),
        options=options,
    )


def pairs_of(rows: list[Preference], part: str | None) -> list[Preference]:
    """Return the pairs of a part such as `1/2`, by prompt; all of them without a part."""
    if part is None:
        return rows
    number, parts = map(int, part.split("/"))
    return [row for row in rows if part_number(prompt_key(row.history), parts) == number]
