"""Whether a model that a user brings can be trained and sampled from as the config asks.

A family is accepted by structure; whether its numbers are its own is looked at here, before
anything trains: a few short rows go through the model and through what an experiment does with it
(`models/comparison.py`, `rollout/decoding_check.py`). What differs is refused, with the number and
with what works instead; what is advised has been compared, too.

The comparison runs in float32 on the CPU, on the model's own weights. Of a large model only the
lowest blocks are loaded, at least one of each kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_exp.errors import UserError
from rlhf_exp.models.comparison import (
    TOLERANCE,
    Comparison,
    reward_difference,
    scaled_beyond,
)
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import Attention, load_config, load_pretrained, supported_attention
from rlhf_exp.models.reward_model import REWARD_HEAD_FILE, RewardModel, reward_model_config
from rlhf_exp.rollout.decoder import CacheKind
from rlhf_exp.rollout.decoding_check import decoding_difference

WHOLE_PARAMETERS = 100_000_000
"""Models of up to so many parameters are compared whole."""

WHOLE = "model.path"
"""The option of a problem with the model as a whole."""

FEWEST_BLOCKS = 2
"""Of larger ones, at least so many blocks: a trunk and a branch."""

SAVED_PARAMETERS = 200_000_000
"""What is compared is also saved and loaded again, up to so many parameters."""


INEXACT = frozenset({"rwkv"})
"""Families whose log-probabilities in longer rows were found off by more than rounding, in ways
that the short rows compared here do not show."""


@dataclass(frozen=True)
class StageUse:
    """How one stage trains a model.

    Attributes:
        stage: its section in the config.
        train_blocks: number of training blocks; `None`: all.
        lora: the adapter, if one is trained.
        packing: whether rows are packed.
        checkpointing: whether activations are recomputed.
    """

    stage: str
    train_blocks: int | None = None
    lora: LoraSettings | None = None
    packing: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class ModelUse:
    """What an experiment does with a model.

    Attributes:
        stages: the stages that train it or what becomes of it.
        cache: the cache that answers are sampled with; `None`: none are.
        attention: the implementation of attention.
        longest: most tokens of a row; `None`: not known.
    """

    stages: tuple[StageUse, ...] = ()
    cache: CacheKind | None = None
    attention: Attention = "sdpa"
    longest: int | None = None


class Problem(NamedTuple):
    """What a model cannot be used for.

    Attributes:
        option: the config's option that asks for it, `model.path` for any use at all.
        text: what was found, and what works instead.
    """

    option: str
    text: str


def check_model(path: str, revision: str | None, use: ModelUse) -> list[Problem]:
    """Return what of `use` a model cannot be used for.

    Args:
        path: a folder or a hub id.
        revision: branch, tag or commit of a hub id.
        use: what is asked of it.

    Raises:
        UserError: the model cannot be loaded.
    """
    # A CPU has no flash attention; it computes what scaled-dot-product attention does.
    attention: Attention = "eager" if use.attention == "eager" else "sdpa"
    problems = _problems(path, revision, replace(use, attention=attention))
    config = load_config(path, revision)
    takes_masks = use.attention != "flash_attention_2" or use.cache is None
    if not takes_masks and supported_attention(config, "sdpa") == "eager":
        text = (
            f"a {config.model_type!r} model cannot be sampled from with {use.attention}, and has "
            "no scaled-dot-product attention to sample with; set model.attention=eager"
        )
        problems.append(Problem("model.attention", text))
    if not problems or supported_attention(config, attention) == "eager":
        return problems
    if _problems(path, revision, replace(use, attention="eager")):
        return problems
    return [Problem(option, f"{text}, or model.attention=eager") for option, text in problems]


def check_reward_model(path: str, attention: Attention) -> list[Problem]:
    """Return why a reward model's scores are not what the model itself gives.

    A sequence classifier is compared with the library's, any other with its trunk's states times
    its head, row by row.

    Args:
        path: a folder or a hub id.
        attention: the implementation of attention.

    Raises:
        UserError: the model cannot be loaded.
    """
    if attention != "eager":
        attention = "sdpa"  # a CPU has no flash attention
    config = _lowest_blocks(reward_model_config(path))
    load = (path, config, None, torch.float32, attention)
    try:
        with _quiet():
            reward = RewardModel.load(path, None, torch.float32, attention, copy.deepcopy(config))
            if (Path(path) / REWARD_HEAD_FILE).is_file():
                model = load_pretrained(AutoModel, *load)
                head = load_file(Path(path) / REWARD_HEAD_FILE)["weight"][0].float()
                difference = reward_difference(
                    reward,
                    model,
                    lambda row: model(row[None]).last_hidden_state[0, -1] @ head - reward.mean,
                )
            else:
                model = load_pretrained(AutoModelForSequenceClassification, *load)
                difference = reward_difference(
                    reward, model, lambda row: model(row[None]).logits[0, 0]
                )
    except UserError:
        raise
    except Exception as error:  # a family's own code may raise anything
        return [Problem(WHOLE, f"the model cannot be run ({_first_line(error)}); use another one")]
    if difference <= TOLERANCE:
        return []
    text = (
        f"scores of a {config.model_type!r} model depend on the other rows of its batch, or on "
        f"more than its trunk's last state and its head (off by {difference:.2g}); use another "
        "model"
    )
    return [Problem(WHOLE, text)]


def _problems(path: str, revision: str | None, use: ModelUse) -> list[Problem]:
    def load() -> PreTrainedModel:
        return _load_part(path, revision, use.attention)

    load_config(path, revision)  # what cannot be loaded at all says so itself
    try:
        return _Check(load, use).problems()
    except UserError as error:
        return [Problem(WHOLE, str(error))]
    except Exception as error:  # a family's own code may raise anything
        return [Problem(WHOLE, f"the model cannot be run ({_first_line(error)}); use another one")]


class _Check:
    """One model's comparisons, from the simplest to those that need it to be right."""

    def __init__(self, load: Callable[[], PreTrainedModel], use: ModelUse) -> None:
        self._load, self._use = load, use
        self._model = load()
        self._family = self._model.config.model_type
        self._comparison = Comparison(self._model, use.longest)

    def problems(self) -> list[Problem]:
        """Return what is not as it should be."""
        if self._family in INEXACT:
            text = (
                f"log-probabilities of a {self._family!r} model in longer rows are not reproduced "
                "(off by more than 0.001 nats a token); use another model"
            )
            return [Problem(WHOLE, text)]
        compared = self._comparison
        policy = Policy(self._model, value_head=False)
        noise = self._outcome(compared.noise)
        if noise:
            text = (
                f"a {self._family!r} model draws random numbers in training that cannot be "
                f"switched off ({noise} between two calls), so that policy and reference would "
                "differ by chance; use another model"
            )
            return [Problem(WHOLE, text)]
        rows = self._outcome(lambda: compared.rows_of(policy))
        limit = scaled_beyond(self._model)
        if rows and limit is not None:
            unscaled = Comparison(self._model, longest=0)
            if not self._outcome(lambda: unscaled.rows_of(policy)):
                text = (
                    f"a {self._family!r} model scales positions by the longest row of a batch, "
                    f"once that has more than {limit} tokens ({rows}); lower the seq_length of "
                    f"every stage to {limit}"
                )
                return [Problem(WHOLE, text)]
        if rows:
            text = (
                f"log-probabilities of a {self._family!r} model depend on the other rows of its "
                f"batch, or on more than its trunk and its head ({rows}); use another model"
            )
            return [Problem(WHOLE, text)]
        problems = list(self._training_problems(policy))
        problems += self._decoding_problems()
        problems += self._adapter_problems()
        return problems

    def _training_problems(self, policy: Policy) -> Iterator[Problem]:
        use = self._use.stages
        packing = [f"{stage.stage}.packing" for stage in use if stage.packing]
        packed = self._outcome(lambda: self._comparison.packed(policy)) if packing else ""
        for option in packing if packed else ():
            yield Problem(
                option,
                f"a {self._family!r} model mixes the rows that are packed into one ({packed}); "
                f"set {option}=false",
            )
        if self._small:
            saved = self._outcome(lambda: self._comparison.saved(policy))
            if saved:
                yield Problem(
                    WHOLE,
                    f"a {self._family!r} model that is saved is another one when it is loaded "
                    f"again ({saved}); use another model",
                )
        for stage in use:
            if stage.checkpointing:
                recomputed = self._outcome(partial(self._recomputed_difference, policy))
                if recomputed:
                    option = f"{stage.stage}.gradient_checkpointing"
                    yield Problem(
                        option,
                        f"it does not work for a {self._family!r} model ({recomputed}); set "
                        f"{option}=false",
                    )
            if stage.train_blocks is not None and stage.lora is None:
                difference = self._outcome(partial(self._branch_difference, stage.train_blocks))
                if difference:
                    option = f"{stage.stage}.train_blocks"
                    yield Problem(
                        option,
                        f"a {self._family!r} model cannot be cut below its top blocks "
                        f"({difference}); set {option}=null",
                    )

    def _recomputed_difference(self, policy: Policy) -> float:
        try:
            return self._comparison.rows_of(policy.set_gradient_checkpointing(True))
        finally:
            policy.set_gradient_checkpointing(False)

    def _branch_difference(self, train_blocks: int) -> float:
        count = len(decoder_parts(self._model).blocks)
        policy = Policy(self._model, min(train_blocks, max(1, count - 1)), value_head=False)
        return self._comparison.rows_of(policy)

    def _decoding_problems(self) -> Iterator[Problem]:
        cache = self._use.cache
        if cache is None:
            return
        difference = self._outcome(lambda: decoding_difference(self._model, cache))
        if not difference:
            return
        other: CacheKind = "library" if cache == "slots" else "slots"
        works = not self._outcome(lambda: decoding_difference(self._model, other))
        remedy = (
            f"set model.cache={other}"
            if works
            else "train SFT or the reward model only, or use another model"
        )
        yield Problem(
            "model.cache",
            f"sampling with model.cache={cache} is not what a {self._family!r} model computes "
            f"({difference}); {remedy}",
        )

    def _adapter_problems(self) -> Iterator[Problem]:
        for stage in self._use.stages:
            if stage.lora is None:
                continue
            difference = self._outcome(partial(self._adapter_difference, stage))
            if difference:
                option = f"{stage.stage}.lora.rank"
                yield Problem(
                    option,
                    f"an adapter of a {self._family!r} model is not what is merged into its "
                    f"weights ({difference}); train without LoRA ({option}=0)",
                )

    def _adapter_difference(self, stage: StageUse) -> float:
        model = self._load()
        comparison = Comparison(model, self._use.longest)
        blocks = stage.train_blocks
        if blocks is not None:
            blocks = min(blocks, max(1, len(decoder_parts(model).blocks) - 1))
        return comparison.adapter(Policy(model, blocks, stage.lora, value_head=False))

    @property
    def _small(self) -> bool:
        return sum(p.numel() for p in self._model.parameters()) <= SAVED_PARAMETERS

    def _outcome(self, compare: Callable[[], float]) -> str:
        """Return how a comparison went wrong, in words; empty where it did not."""
        try:
            difference = compare()
        except Exception as error:  # whatever a family's code raises, it does not work
            return _first_line(error)
        # Not `>`: a difference that is not a number is none that can be accepted.
        return "" if difference <= TOLERANCE else f"off by {difference:.2g} nats a token"


def _first_line(error: Exception) -> str:
    """Return an error in one line; the remedy in a `UserError` may have to be another one here."""
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, UserError):
        return line.partition(";")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _load_part(path: str, revision: str | None, attention: Attention) -> PreTrainedModel:
    """Load a model, or the lowest blocks of a large one, in float32."""
    config = load_config(path, revision)
    part = _lowest_blocks(config)
    # With its noise, which eval mode is without: a family may compute with its strength even there.
    with _quiet():
        return load_pretrained(
            *(AutoModelForCausalLM, path, part, revision, torch.float32, attention),
            keep_dropout=True,
        )


def _lowest_blocks(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of so many of a large model's lowest blocks that each kind is among them.

    A kind is what the config calls it, and the shapes of the block's parameters.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if sum(parameter.numel() for parameter in model.parameters()) <= WHOLE_PARAMETERS:
        return config
    text = config.get_text_config()
    blocks = decoder_parts(model).blocks
    total = len(blocks)
    names = getattr(text, "layer_types", None) or [""] * total
    kinds = [
        (name, *((key, value.shape) for key, value in block.named_parameters()))
        for name, block in zip(names, blocks, strict=True)
    ]
    count = max(FEWEST_BLOCKS, *(kinds.index(kind) + 1 for kind in set(kinds)))
    part = copy.deepcopy(config)
    text = part.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return part


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling of the blocks that are left out on purpose."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
