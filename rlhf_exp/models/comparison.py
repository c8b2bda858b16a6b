"""Whether what training computes of a model is what the model computes: differences in nats.

A family may do what its structure does not show: keep a state from token to token, bias attention
by distance, attend within windows, draw noise in training, scale its positions by the batch. So
rows of random tokens go both through a policy, as training runs it, and through `model(...)` one
by one, and their log-probabilities are compared. Windows are set so narrow meanwhile that short
rows exceed them.

S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_exp.batch import Demonstrations
from rlhf_exp.models.lora import lora_layers
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import load_causal_lm, write_model
from rlhf_exp.models.reward_model import RewardModel

TOLERANCE = 1e-3
"""Largest difference in nats between float32 log-probabilities that are equal but for rounding."""

WINDOW = 8
"""Width of a window while rows are compared, in tokens."""

SCALED = 24
"""Tokens beyond which positions are scaled meanwhile: fewer than the longest row has, and more than
the shortest."""

SCALED_FROM = "original_max_position_embeddings"
"""Field that says how many tokens a row has before longrope scales its positions."""

SHORTENED = ("sliding_window", "attention_chunk_size")
"""Fields of a config that the library reads at each forward pass; set to `WINDOW` meanwhile."""

FIXED = ("window_size", "attention_window_size", "attention_window")
"""Fields that are read when a model is built; rows are made longer than these instead."""

LONGEST_ROW = 512
"""Most tokens of a row that is compared; a fixed window above it is not looked beyond."""

TEMPERATURE = 0.7
_SPANS = ((9, 24), (3, 16), (1, 20))
"""Tokens of the prompt and of the response in each row."""


class Comparison:
    """Rows of random tokens with the model's own log-probabilities, to compare a policy with.

    Args:
        model: a causal language model without an adapter; in eval mode meanwhile.
        longest: most tokens of a row in the training to come. Scalings of positions that begin
            above it (longrope) are left as they are; `None`: every scaling is looked at.
    """

    def __init__(self, model: PreTrainedModel, longest: int | None = None) -> None:
        self._model, self._longest = model, longest
        self.rows = random_rows(model, [prompt + response for prompt, response in _SPANS])
        self._own = self._logits()

    def noise(self) -> float:
        """Return the difference between two calls in train mode, or of one from eval mode."""
        model = self._model
        with self._setting(training=True), torch.random.fork_rng(devices=[]):
            found = []
            for seed in range(2):
                torch.manual_seed(seed)
                found.append(model(input_ids=self.rows[0][None], use_cache=False).logits[0])
        return max(_difference(logits, self._own[0]) for logits in found)

    def rows_of(self, policy: Policy, own: Sequence[Tensor] | None = None) -> float:
        """Return the difference of padded rows, as SFT and as PPO run them.

        Args:
            policy: around the model.
            own: logits [S, V] of each row to compare with; the model's own without an adapter.
        """
        own = self._own if own is None else own
        tokens = pad_sequence(self.rows, batch_first=True)
        prompts = torch.tensor([prompt for prompt, _ in _SPANS], device=tokens.device)
        lengths = torch.tensor([len(row) for row in self.rows], device=tokens.device)
        with self._setting(training=True, grad=True):
            outputs = policy.response_outputs(
                tokens, prompts, lengths - prompts, TEMPERATURE, with_entropy=True
            )
            columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            real = columns < lengths[:, None]
            targets = policy(Demonstrations(tokens, columns, real.long(), real & (columns > 0)))
        assert outputs.entropy is not None
        worst = []
        for number, (row, logits) in enumerate(zip(self.rows, own, strict=True)):
            prompt = _SPANS[number][0]
            response = len(row) - prompt
            table = (logits.float() / TEMPERATURE).log_softmax(-1)[prompt - 1 : -1]
            expected = table.gather(1, row[prompt:, None])[:, 0]
            entropy = -(table.exp() * table).sum(-1)
            worst.append(_largest(outputs.logprobs[number, :response] - expected))
            worst.append(_largest(outputs.entropy[number, :response] - entropy))
        return max(*worst, _largest(targets - _target_logprobs(self.rows, own)))

    def packed(self, policy: Policy) -> float:
        """Return the difference of rows that are packed into one."""
        tokens = torch.cat(self.rows)[None]
        positions = torch.cat([torch.arange(len(row)) for row in self.rows])[None]
        positions = positions.to(tokens.device)
        segments = (positions == 0).cumsum(1)
        batch = Demonstrations(tokens, positions, segments, positions > 0)
        with self._setting(training=True):
            found = policy(batch)
        return _largest(found - _target_logprobs(self.rows, self._own))

    def adapter(self, policy: Policy) -> float:
        """Return the difference that adapters of random values make to training or to merging.

        Compared are rows as training runs them with the whole adapted model's, and the model that
        is saved (adapters merged) and loaded again.

        Args:
            policy: with LoRA.
        """
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, layer in lora_layers(self._model):
                for matrix in layer.lora_B.parameters():
                    noise = torch.randn(matrix.shape, generator=generator)
                    # As large as the weights that it is added to would make an output.
                    matrix.copy_(noise * 0.2 / matrix.shape[1] ** 0.5)
        adapted = self._logits()
        return max(self.rows_of(policy, adapted), self._saved(policy, adapted))

    def saved(self, policy: Policy) -> float:
        """Return the difference of the model that is saved and loaded again."""
        return self._saved(policy, self._own)

    def _saved(self, policy: Policy, own: Sequence[Tensor]) -> float:
        attention: Any = self._model.config._attn_implementation
        with TemporaryDirectory() as folder:
            write_model(policy.merged_model(), folder)
            loaded = load_causal_lm(folder, dtype=self._model.dtype, attention=attention)
        found = Comparison(loaded, self._longest)._own
        return max(_difference(*pair) for pair in zip(found, own, strict=True))

    def _logits(self) -> list[Tensor]:
        """Return the logits [S, V] of each row alone, in eval mode."""
        with self._setting(training=False):
            return [
                cast(Tensor, self._model(input_ids=row[None], use_cache=False).logits)[0]
                for row in self.rows
            ]

    @contextmanager
    def _setting(self, training: bool, grad: bool = False) -> Iterator[None]:
        """Run the model in train or eval mode with narrow windows."""
        was = self._model.training
        with short_windows(self._model, self._longest), torch.set_grad_enabled(grad):
            try:
                self._model.train(training)
                yield
            finally:
                self._model.train(was)


@torch.no_grad()
def reward_difference(
    reward: RewardModel, model: PreTrainedModel, score: Callable[[Tensor], Tensor]
) -> float:
    """Return the largest difference between scores of padded rows and of each row by itself.

    As a share of the largest score, if that is above 1. One row ends by the padding token of the
    model's config, if it has one: a classifier reads its score before it.

    Args:
        reward: scores as training does.
        model: another copy of the model, with the same weights.
        score: returns the 0-dim score of a row [S] by `model` alone.
    """
    rows = random_rows(model, [prompt + response for prompt, response in _SPANS])
    padding = text_config(model).pad_token_id
    if padding is not None and padding < text_config(model).vocab_size:
        rows.append(torch.cat([rows[-1], torch.full((1,), padding, device=model.device)]))
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    model.eval()
    with short_windows(model), short_windows(reward.trunk):
        found = reward.scores(pad_sequence(rows, batch_first=True), lengths)
        own = torch.stack([score(row) for row in rows]).float()
    return _largest(found - own) / max(1.0, own.abs().max().item())


def random_rows(model: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    """Return rows of random tokens of a model's whole vocabulary, int64.

    Args:
        model: where the rows are to be.
        lengths: tokens of each row; the first is longer where the model has a window that is fixed
            once it is built.
    """
    config = text_config(model)
    windows = [getattr(config, name, None) for name in FIXED]
    window = max((width for width in windows if isinstance(width, int)), default=0)
    room = getattr(config, "max_position_embeddings", None) or LONGEST_ROW
    longer = [max(lengths[0], min(window + 5, LONGEST_ROW, room)), *lengths[1:]]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(config.vocab_size, (length,), generator=generator).to(model.device)
        for length in longer
    ]


@contextmanager
def short_windows(model: PreTrainedModel, longest: int | None = None) -> Iterator[None]:
    """Let windows, and scalings of positions, begin within the rows that are compared.

    Args:
        model: its config is changed meanwhile.
        longest: scalings that begin above so many tokens are left alone; `None`: none is.
    """
    config = text_config(model)
    changes: list[tuple[dict[str, Any], str, int]] = [
        (vars(config), name, WINDOW)
        for name in SHORTENED
        if isinstance(vars(config).get(name), int) and vars(config)[name] > WINDOW
    ]
    changes += [
        (holder, SCALED_FROM, SCALED)
        for holder in _longropes(config)
        if longest is None or holder[SCALED_FROM] < longest
    ]
    old = [(holder, name, holder[name]) for holder, name, _ in changes]
    try:
        for holder, name, value in changes:
            holder[name] = value
        yield
    finally:
        for holder, name, value in old:
            holder[name] = value


def scaled_beyond(model: PreTrainedModel) -> int | None:
    """Return the tokens beyond which positions depend on a batch's longest row; `None`: never."""
    ropes = _longropes(text_config(model))
    return min((rope[SCALED_FROM] for rope in ropes), default=None)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model's language model."""
    return cast(PreTrainedModel, model.base_model).config.get_text_config()


def _longropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return what holds `SCALED_FROM`: parameters of the model or of its kinds of layers.

    The config itself does, too, where the library renews them from it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    inner = [value for value in parameters.values() if isinstance(value, dict)]
    found = [rope for rope in inner or [parameters] if rope.get("rope_type") == "longrope"]
    if found and isinstance(vars(config).get(SCALED_FROM), int):
        found.append(vars(config))
    return found


def _target_logprobs(rows: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Return the log-probability of each token of `rows` but their first."""
    return torch.cat(
        [
            own.float().log_softmax(-1)[:-1].gather(1, row[1:, None])[:, 0]
            for row, own in zip(rows, logits, strict=True)
        ]
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of log-probabilities by logits [S, V]."""
    return _largest(found.float().log_softmax(-1) - expected.float().log_softmax(-1))


def _largest(difference: Tensor) -> float:
    return difference.detach().abs().max().item()
