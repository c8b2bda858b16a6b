"""The data of an experiment, loaded once for all stages of a process."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

from rlhf_exp.config.data import DataConfig, Source
from rlhf_exp.data.codec import Codec
from rlhf_exp.data.rows import Corpus
from rlhf_exp.data.sources import Rules, load_hub, load_jsonl, load_toy
from rlhf_exp.models.load import load_tokenizer

log = logging.getLogger(__name__)


class Materials:
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
        if corpus.rejected:
            listed = "".join(f"\n  {row.origin}: {row.reason}" for row in corpus.rejected[:20])
            log.warning("%d rows cannot be used:%s", len(corpus.rejected), listed)
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
    rules = Rules(
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_bad_fraction=config.max_bad_fraction,
        limit=config.limit,
    )
    if config.source == Source.toy:
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
    if config.source == Source.hub:
        assert config.path is not None, "checked with the config"
        return load_hub(config.path, config.revision, rules=rules)
    return load_jsonl(
        preferences=config.preferences or (),
        demonstrations=config.demonstrations or (),
        prompts=config.prompts or (),
        test=config.test or (),
        rules=rules,
    )
