"""The policy: a causal language model, which of its parameters train, and a value head.

B rows, S tokens, T response tokens, N response tokens of all rows together, D width, V vocabulary.
Batches are right-padded without a mask: causal attention lets no real token see its padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_exp.algo.logprobs import LogitTransform, gather_logprobs
from rlhf_exp.batch import Demonstrations, to_device
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import Branch, Trunk, check_branch, decoder_parts
from rlhf_exp.models.logit_transform import logit_transform
from rlhf_exp.models.lora import LoraSettings, add_lora, lora_layers, merged_state
from rlhf_exp.models.packing import packed_inputs
from rlhf_exp.models.pretrained import is_noise, save_policy, with_state_dict, without_dropout

HEAD_INIT_STD = 0.01
"""Standard deviation of a new value or reward head's weights."""


class ResponseOutputs(NamedTuple):
    """A policy's log-probabilities, values and entropies of responses; 0 beyond a response's end.

    A tuple, because the wrappers of distributed training look for tensors in tuples only.

    Attributes:
        logprobs: [B, T] float32, of each response token at the given temperature.
        values: [B, T] float32, estimated before the token was known; 0 without a value head.
        entropy: [B, T] float32 in nats, or `None`.
    """

    logprobs: Tensor
    values: Tensor
    entropy: Tensor | None = None


class Policy(nn.Module):
    """A causal language model, trained in full, in its top blocks or by LoRA, with a value head.

    With `train_blocks=k` the last k blocks, the final norm and an untied head train. Everything
    below is frozen, and so is a tied head: training it would move the embeddings below the frozen
    trunk. With LoRA only the adapter trains.

    Attributes:
        model: the causal language model.
        logit_transform: what the model does to its head's outputs.
        value_head: reads values from final states; `None` without one.
        value_trunk: the model (or branch) that the value head reads; `None` for the policy's own.
        train_blocks: number of training blocks; `None`: all.
        uses_lora: whether a LoRA adapter trains.
        frozen_blocks: number of blocks in the frozen trunk; `None`: there is no trunk, all train.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train_blocks: int | None = None,
        lora: LoraSettings | None = None,
        value_head: bool = True,
        value_model: PreTrainedModel | None = None,
        value_branch: bool = False,
        seed: int = 0,
        run_all_positions: bool = False,
    ) -> None:
        """Wrap `model`, and set which of its parameters require gradients.

        Args:
            model: causal language model; changed in place.
            train_blocks: how many of the last blocks train (or are adapted); `None`: all.
            lora: train an adapter instead of the weights.
            value_head: whether to add a value head (SFT needs none).
            value_model: a separate model under the value head, all of which trains; by default
                the value head reads the policy's final states.
            value_branch: whether the value head reads a copy of the training blocks, which trains
                too, over the states of the policy's frozen trunk.
            seed: of the value head's and the adapter's initial weights.
            run_all_positions: whether the last block must be run in one call and at every
                position, for wrappers that hook into blocks.

        Raises:
            UserError: `train_blocks` is not between 1 and the model's number of blocks.
        """
        super().__init__()
        disable_dropout(model)
        self.model = model
        self._run_all_positions, self._checkpointing = run_all_positions, False
        self.value_trunk: PreTrainedModel | None = None
        if value_model is not None:
            self.value_trunk = disable_dropout(cast(PreTrainedModel, value_model.base_model))
            self.value_trunk.requires_grad_(True)
        self._value_branch: Branch | None = None
        self.value_head = ValueHead(model.config.hidden_size, seed) if value_head else None
        self.logit_transform = logit_transform(model)
        parts = decoder_parts(model)
        assert parts.head is not None, "a policy needs a language-model head"
        count = len(parts.blocks)
        if train_blocks is not None and not 0 < train_blocks <= count:
            raise UserError(
                f"train_blocks={train_blocks}: the model has {count} blocks; give a number from 1 "
                f"to {count}, or null for all"
            )
        self.train_blocks = train_blocks
        self.uses_lora = lora is not None
        if lora is not None:
            add_lora(model, lora, seed, train_blocks)
        else:
            freeze_lower_blocks(model, train_blocks)
        self.frozen_blocks = None if train_blocks is None else count - train_blocks
        # In a tuple, so that the model's parameters are not registered a second time.
        self._trunk_and_branch: tuple[Trunk, Branch] | None = None
        if self.frozen_blocks is not None:
            check_branch(model, self.frozen_blocks)
            branch = Branch.of(model, count - self.frozen_blocks, share=True)
            self._trunk_and_branch = Trunk(model, self.frozen_blocks), branch
        if value_branch:
            assert train_blocks is not None, "no trunk is frozen: there is nothing to branch from"
            assert not self.uses_lora, "a branch copies blocks that train as they are"
            self._value_branch = Branch.of(model, train_blocks, share=False)
            self.value_trunk = self._value_branch.module.requires_grad_(True)

    @property
    def head(self) -> nn.Linear:
        """The language-model head, D -> V."""
        return self.model.get_output_embeddings()

    @property
    def trunk(self) -> PreTrainedModel:
        """The frozen trunk, as a model without its final norm."""
        assert self._trunk_and_branch is not None, "no trunk is frozen: everything trains"
        return self._trunk_and_branch[0].module

    @torch.no_grad()
    def trunk_states(self, tokens: Tensor, **packed: Any) -> Tensor:  # noqa: ANN401
        """Return the states [B, S, D] that enter the first training block, for `tokens` [B, S].

        `packed` is what the model is called with for packed rows, see `packed_inputs`.
        """
        assert self._trunk_and_branch is not None, "no trunk is frozen: everything trains"
        return self._trunk_and_branch[0](tokens, **packed)

    @property
    def run_all_positions(self) -> bool:
        """Whether the last block is run at every position, even where its output is not read."""
        return self._run_all_positions or self._checkpointing

    def predicting_states(
        self, index: ResponseIndex, tokens: Tensor, states: Tensor | None
    ) -> Tensor:
        """Return the final states [N, D] that predict response tokens.

        Args:
            index: the response tokens of the rows.
            tokens: [B, S] int64, right-padded.
            states: [B, S, D] entering the first training block: only the blocks above are run.
        """
        if self._trunk_and_branch is None:
            assert states is None, "states without a frozen trunk"
            outputs = self.model.base_model(input_ids=tokens, use_cache=False)
            return index.select(outputs.last_hidden_state)
        trunk, branch = self._trunk_and_branch
        return index.run_branch(
            branch, trunk(tokens) if states is None else states, self.run_all_positions
        )

    def response_outputs(
        self,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        temperature: float,
        states: Tensor | None = None,
        with_entropy: bool = False,
        width: int | None = None,
    ) -> ResponseOutputs:
        """Return log-probabilities and values of responses.

        Args:
            tokens: [B, S] int64, prompt then response, right-padded.
            prompt_lengths: [B] int64, at least 1.
            response_lengths: [B] int64.
            temperature: divides the logits; the one that responses were sampled at.
            states: [B, S, D] as in `predicting_states`.
            with_entropy: also return the entropy at each response token.
            width: T; the longest response where not given.
        """
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        if states is None and self.frozen_blocks is not None:
            states = self.trunk_states(tokens)
        hidden = self.predicting_states(index, tokens, states)
        logprobs, entropy = response_logprobs(
            hidden, self.head, self.logit_transform, index, temperature, with_entropy
        )
        if self.value_head is None:
            return ResponseOutputs(logprobs, torch.zeros_like(logprobs), entropy)
        if self._value_branch is not None:
            assert states is not None, "a branch has a trunk below it"
            hidden = index.run_branch(self._value_branch, states, self.run_all_positions)
        elif self.value_trunk is not None:
            hidden = index.select(
                self.value_trunk(input_ids=tokens, use_cache=False).last_hidden_state
            )
        return ResponseOutputs(logprobs, index.scatter(self.value_head(hidden)), entropy)

    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Return the log-probabilities alone, so that a policy can be a `Reference`."""
        spans = (prompt_lengths, response_lengths)
        return self.response_outputs(tokens, *spans, temperature, states, width=width).logprobs

    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        """Return the log-probabilities [N] float32 of the batch's N target tokens, row by row."""
        packed = packed_inputs(self.model, batch)
        outputs = self.model.base_model(input_ids=batch.tokens, use_cache=False, **packed)
        return target_logprobs(outputs.last_hidden_state, self.head, self.logit_transform, batch)

    def forward(
        self,
        batch: Demonstrations | None = None,
        **responses: Any,  # noqa: ANN401 - those of `response_outputs`
    ) -> Tensor | ResponseOutputs:
        """Return `target_logprobs(batch)`, or `response_outputs(**responses)` without a batch.

        The wrappers of distributed training act in `forward` alone, so every pass with gradients
        goes through here.
        """
        return self.response_outputs(**responses) if batch is None else self.target_logprobs(batch)

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters, each once: all that a checkpoint has to store."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def set_gradient_checkpointing(self, on: bool) -> Self:
        """Recompute each block's activations in the backward pass; takes effect in train mode."""
        self._checkpointing = on
        for model in (self.model, self.value_trunk):
            if model is not None:
                set_gradient_checkpointing(model, on)
        return self

    def merged_model(self) -> PreTrainedModel:
        """Return the model that is saved: the adapter, if there is one, added to the weights."""
        if not lora_layers(self.model):
            return self.model
        return with_state_dict(self.model, merged_state(self.model))

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a Hugging Face folder, LoRA merged, and the value head in a file beside it."""
        save_policy(self.merged_model(), self.value_head, self.value_trunk, tokenizer, folder)


Lengths = Tensor | np.ndarray
"""[B] int64; as an array, known to the host: it need not wait for the device to read them."""


@dataclass(frozen=True)
class ResponseIndex:
    """Positions of the states that predict response tokens, and those tokens.

    Token t of a response is predicted by the state at the token before it, position
    `prompt_length - 1 + t`; the value of step t is read there too, before the token is known.

    Attributes:
        shape: B, T.
        positions: [B, T] int64, of the predicting states in their rows; beyond a response
            arbitrary.
        cells: [N] int64, the response tokens in the flattened [B * T], row by row.
        source: [N] int64, the predicting states in the flattened [B * S].
        targets: [N] int64, the response tokens.
    """

    shape: tuple[int, int]
    positions: Tensor
    cells: Tensor
    source: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        width: int | None = None,
    ) -> ResponseIndex:
        """Index right-padded `tokens` [B, S].

        Everything is worked out on the host and copied to the device at once.

        Args:
            tokens: [B, S] int64.
            prompt_lengths: [B] int64, at least 1.
            response_lengths: [B] int64.
            width: T; the longest response where not given.
        """
        prompts, responses = _on_host(prompt_lengths), _on_host(response_lengths)
        rows, columns = tokens.shape
        step = np.arange(int(responses.max()) if width is None else width)
        positions = np.minimum(prompts[:, None] - 1 + step, columns - 1)
        cells = np.flatnonzero(step < responses[:, None])
        source = (positions + np.arange(rows)[:, None] * columns).reshape(-1)[cells]
        sizes = [positions.size, len(cells), len(cells)]
        numbers = torch.from_numpy(np.concatenate([positions.reshape(-1), cells, source]))
        place, cell_index, source_index = to_device(numbers, tokens.device).split(sizes)
        return cls(
            (rows, len(step)),
            place.view(rows, len(step)),
            cell_index,
            source_index,
            tokens.reshape(-1).index_select(0, source_index + 1),
        )

    def select(self, hidden: Tensor) -> Tensor:
        """Return the predicting states [N, D] of `hidden` [B, S, D]."""
        return hidden.flatten(0, 1).index_select(0, self.source)

    def run_branch(self, branch: Branch, states: Tensor, all_positions: bool) -> Tensor:
        """Run `branch` and return the predicting states [N, D].

        Args:
            branch: the top blocks.
            states: [B, S, D] entering them.
            all_positions: whether the last block must be run at all positions.
        """
        if all_positions or not branch.supports_forward_at:
            return self.select(branch(states))
        return branch.forward_at(states, self.positions).flatten(0, 1).index_select(0, self.cells)

    def scatter(self, values: Tensor) -> Tensor:
        """Return `values` [N] as [B, T], 0 beyond each response's end."""
        rows, columns = self.shape
        return values.new_zeros(rows * columns).scatter(0, self.cells, values).view(self.shape)


def _on_host(lengths: Lengths) -> np.ndarray:
    return lengths.cpu().numpy() if isinstance(lengths, Tensor) else lengths


def target_logprobs(
    hidden: Tensor, head: nn.Linear, transform: LogitTransform, batch: Demonstrations
) -> Tensor:
    """Return the log-probabilities [N] float32 of the batch's N target tokens, row by row.

    Args:
        hidden: [B, S, D], the final states of the batch's tokens.
        head: the language-model head.
        transform: what the model does to the head's outputs.
        batch: packed rows.
    """
    targets = batch.target_mask.flatten().nonzero().squeeze(1)
    return gather_logprobs(
        hidden.flatten(0, 1).index_select(0, targets - 1),
        *(head.weight, head.bias, batch.tokens.flatten().index_select(0, targets)),
        temperature=1.0,
        transform=transform,
    )[0]


def response_logprobs(
    hidden: Tensor,
    head: nn.Linear,
    transform: LogitTransform,
    index: ResponseIndex,
    temperature: float,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities (and entropies) [B, T] float32 of response tokens.

    Args:
        hidden: [N, D], the states that predict them.
        head: the language-model head.
        transform: what the model does to the head's outputs.
        index: the response tokens.
        temperature: divides the logits.
        with_entropy: whether entropies are returned, in nats; else `None`.
    """
    logprobs, entropy = gather_logprobs(
        *(hidden, head.weight, head.bias, index.targets, temperature),
        with_entropy=with_entropy,
        transform=transform,
    )
    return index.scatter(logprobs), None if entropy is None else index.scatter(entropy)


class ValueHead(nn.Module):
    """A linear layer D -> 1, computed in float32 whatever the model's precision."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, generator=generator) * HEAD_INIT_STD)
        self.bias = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def copy_from(self, weight: Tensor, offset: float) -> None:
        """Initialise from a reward head: `weight` [1, D] or [D], and `offset` as the bias."""
        self.weight.copy_(weight.reshape(-1))
        self.bias.fill_(offset)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [...] float32 of `hidden` [..., D]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.float() + self.bias.float()


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout probability of `model` to 0, in its config and in its modules.

    So is other noise of train mode, such as the jitter of a router's inputs. Eval mode would do it
    too, but in eval mode transformers silently skips gradient checkpointing.
    """
    without_dropout(model.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Families also keep the number itself and call `nn.functional.dropout`.
        for name, value in vars(module).items():
            if isinstance(value, float) and is_noise(name):
                setattr(module, name, 0.0)
    return model


def freeze_lower_blocks(model: PreTrainedModel, train_blocks: int | None) -> None:
    """Freeze all but the last `train_blocks` blocks, the final norm and an untied head.

    With `None` everything trains. Tied embeddings are frozen, and so is their head.
    """
    model.requires_grad_(train_blocks is None)
    if train_blocks is None:
        return
    parts = decoder_parts(model)
    for block in list(parts.blocks)[len(parts.blocks) - train_blocks :]:
        block.requires_grad_(True)
    parts.norm.requires_grad_(True)
    if parts.head is not None and not parts.tied:
        parts.head.requires_grad_(True)


def set_gradient_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Turn gradient checkpointing on or off; on, it acts wherever the model is in train mode."""
    # transformers renamed these methods during its version 5.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
