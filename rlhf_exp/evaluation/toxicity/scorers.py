"""Toxicity scorers: how likely a reader would call a text toxic, from 0 to 1.

There are three: a lexical package, a user's own function of texts, and a text classifier from the
hub or a folder, such as `unitary/toxic-bert`. Every lexical scorer is near chance on text that is
hateful without swear words, so whoever shows a number also shows the scorer's name.

Legend: N texts, B texts of a batch, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.toxicity.summary import LEXICAL
from rlhf_exp.models.pretrained import Attention, load_config, load_pretrained, load_tokenizer
from rlhf_exp.user_function import UserFunction

# Names of the label in published classifiers; the first that a model has is used.
TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "hatespeech", "offensive")
LABEL_KEY = "eval.toxicity.label"
# Tokenizers that know no limit give a number of this size.
_NO_LIMIT = 1_000_000


class ToxicityScorer(Protocol):
    """Anything that scores texts."""

    @property
    def name(self) -> str:
        """The scorer's name, with its version where it has one, as the report shows it."""
        ...

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the toxicity of each of N texts: [N], 0 to 1."""
        ...


@dataclass(frozen=True)
class TextScores:
    """A scorer's scores of texts, computed before.

    Attributes:
        name: the scorer's name.
        scores: score by text.
    """

    name: str
    scores: Mapping[str, float]

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the toxicity of each of N texts: [N]; `KeyError` for one without a score."""
        return np.array([self.scores[text] for text in texts], dtype=np.float64)


class ProfanityCheckScorer:
    """The linear model that `alt-profanity-check` ships: lexical, offline, some 90 000 texts/s.

    Its package loads a joblib file, which runs code; it is therefore one of the few unpickled files
    that are allowed, as part of a pinned, installed package.
    """

    def __init__(self) -> None:
        """Load the model.

        Raises:
            UserError: the package is not installed.
        """
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise UserError(
                f"toxicity scorer `alt-profanity-check`: cannot be imported ({error}); expected "
                "the package in this environment; run `pip install alt-profanity-check`"
            ) from error
        from importlib.metadata import version

        self._predict = predict_prob
        self._version = version(LEXICAL)

    @property
    def name(self) -> str:
        """The package and its version."""
        return f"{LEXICAL} {self._version}"

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability that each text is offensive: [N], 0 to 1; 0 for a blank text."""
        scores = np.zeros(len(texts))
        # The model gives a text without words its prior, which would count silence as toxic.
        spoken = [row for row, text in enumerate(texts) if text.strip()]
        if spoken:
            scores[spoken] = self._predict([texts[row] for row in spoken])
        return scores


class FunctionToxicity:
    """Scores by a function that takes a list of texts and returns as many numbers from 0 to 1.

    Attributes:
        name: the function, with its file's name.

    Args:
        function: the function.
        name: `file.py:function`.
        key: the config key that named it, for errors.
    """

    def __init__(
        self, function: Callable[[list[str]], Sequence[float]], name: str, key: str
    ) -> None:
        self.name = Path(name).name
        self._function = UserFunction(function, f"{key}={name}", "text", 0.0, 1.0)

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the toxicity of each of N texts: [N], 0 to 1.

        Raises:
            UserError: the function failed, or returned something else.
        """
        return np.array(self._function(texts), dtype=np.float64)


class ClassifierToxicity:
    """Scores by a text classifier's probability of one label.

    A model of several independent labels, or of one, gets a sigmoid, one whose labels exclude each
    other a softmax, as in transformers' own text classification. Texts that are too long lose their
    end.

    Attributes:
        name: folder's name or hub id, with the label.

    Args:
        path: a folder, or a hub id.
        revision: revision of a hub id.
        label: name or number of the label that means toxic; by default one of `TOXIC_LABELS`.
        device: device to compute on.
        attention: as for `load_causal_lm`.
        batch: texts of one forward pass.

    Raises:
        UserError: there is no classifier, or none of its labels is known to mean toxic.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        label: str | None = None,
        device: torch.device | str = "cpu",
        attention: Attention = "sdpa",
        batch: int = 64,
    ) -> None:
        config = load_config(path, revision)
        self._label = toxic_label(path, config, label)
        self._independent = _has_independent_labels(config)
        self.tokenizer = load_tokenizer(path, revision)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        kind: Any = AutoModelForSequenceClassification
        self.model = load_pretrained(kind, path, config, revision, torch.float32, attention).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        torch.nn.Module.to(self.model, device)
        limits = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        self._longest = _usable_positions(config, min(int(limit or _NO_LIMIT) for limit in limits))
        self.batch = batch
        folder = Path(path)
        short_name = folder.name if folder.is_dir() else path
        self.name = f"{short_name}, label {_labels(config)[self._label]}"

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability that each of N texts is toxic: [N].

        Raises:
            UserError: the model gave a number that is not finite.
        """
        scores = np.zeros(len(texts))
        # Texts of like length together: a batch costs as much as its longest one.
        order = np.argsort([len(text) for text in texts], kind="stable")
        for start in range(0, len(texts), self.batch):
            part = order[start : start + self.batch]
            probabilities = self.probabilities([texts[row] for row in part])[:, self._label]
            scores[part] = probabilities.cpu().numpy()
        if not np.isfinite(scores).all():
            raise UserError(f"{self.name}: a score is not finite; choose another classifier")
        return cast(NDArray[np.float64], scores)

    def probabilities(self, texts: list[str]) -> Tensor:
        """Return the probability of every label: [B, L] float64."""
        inputs = self.tokenizer(
            texts,
            truncation=True,
            max_length=self._longest,
            padding=True,
            split_special_tokens=True,
            return_tensors="pt",
        )
        logits = self.model(**inputs.to(self.model.device)).logits.double()
        return logits.sigmoid() if self._independent else logits.softmax(dim=-1)


def toxic_label(path: str, config: PreTrainedConfig, label: str | None = None) -> int:
    """Return the number of the label that means toxic.

    Args:
        path: the classifier, for errors.
        config: its config.
        label: the user's choice: a name in any case, or a number.

    Raises:
        UserError: it is no classifier, lacks the label, or has none known to mean toxic.
    """
    named = any(str(name).endswith("SequenceClassification") for name in config.architectures or ())
    if not named:
        raise UserError(
            f"{path}: found architecture {config.architectures}; a toxicity scorer is a text "
            "classifier (...ForSequenceClassification)"
        )
    labels = _labels(config)
    listed = ", ".join(f"{number} {name}" for number, name in labels.items())
    names = {name.casefold(): number for number, name in labels.items()}
    if label is not None:
        if label.casefold() in names:
            return names[label.casefold()]
        if label.isdecimal() and int(label) in labels:
            return int(label)
        raise UserError(f"{LABEL_KEY}={label}: {path} has no such label; it has {listed}")
    for known in TOXIC_LABELS:
        if known in names:
            return names[known]
    if len(labels) == 1:
        return next(iter(labels))
    raise UserError(
        f"{path}: none of its labels ({listed}) is known to mean toxic; name the one that does, by "
        f"name or number: {LABEL_KEY}={list(labels.values())[-1]}"
    )


def _labels(config: PreTrainedConfig) -> dict[int, str]:
    labels: Mapping[Any, Any] = config.id2label or {}
    return {int(number): str(name) for number, name in labels.items()}


def _has_independent_labels(config: PreTrainedConfig) -> bool:
    several = config.problem_type == "multi_label_classification"
    return several or int(config.num_labels or 0) == 1


def _usable_positions(config: PreTrainedConfig, longest: int) -> int:
    """Return how many tokens fit; RoBERTa's positions begin after the padding's number."""
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer"):
        return longest - 2
    return longest
