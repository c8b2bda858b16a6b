"""The reward model: a decoder's trunk with one number read at a sequence's last token.

B rows, S tokens, D width. Batches are right-padded without a mask. On disk it is a Hugging Face
folder of the trunk, which `transformers.AutoModel` loads, with two files beside it:
`reward_head.safetensors` (the head) and `reward_model.json` (the scores' mean and standard
deviation on held-out demonstrations).

A reward model over the policy's frozen trunk.

A reward model that began as the SFT policy and trained only its top blocks has, below them, the
weights that the policy has below its own. They need to be held once, and the states that the policy
computes while it samples serve the reward model, too: scoring then costs the top blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_exp.batch import Preferences
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import Branch, DecoderParts, decoder_parts
from rlhf_exp.models.lora import LoraSettings, add_lora, lora_layers, merged_state
from rlhf_exp.models.policy import INITIAL_STD, Policy, dropout_off, freeze_below, set_checkpointing
from rlhf_exp.models.pretrained import (
    Attention,
    load_config,
    load_head,
    load_pretrained,
    save_head,
    with_state,
    write_model,
)

HEAD = "reward_head.safetensors"
NORMALISATION = "reward_model.json"


class RewardModel(nn.Module):
    """Scores whole sequences; a score is the head's output less `mean`.

    Attributes:
        trunk: the decoder without its language-model head.
        head: linear layer D -> 1 without bias, computed in float32.
        mean: 0-dim float32, what the head gives held-out demonstrations in the mean.
        std: 0-dim float32, the standard deviation of the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        train_blocks: int | None = None,
        lora: LoraSettings | None = None,
        seed: int = 0,
    ) -> None:
        """Take the trunk of `model`, changing what of it requires gradients.

        Args:
            model: with or without a language-model head; its trunk is used, not copied.
            train_blocks: how many of the last blocks train (or are adapted); `None`: all.
            lora: train an adapter instead of the trunk's weights.
            seed: of the head and the adapter.
        """
        super().__init__()
        self.trunk = dropout_off(cast(PreTrainedModel, model.base_model))
        self.head = nn.Linear(model.config.hidden_size, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator))
            self.head.weight.mul_(INITIAL_STD)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        if lora is not None:
            add_lora(self.trunk, lora, seed, train_blocks)
        else:
            freeze_below(self.trunk, train_blocks)

    def scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return scores [B] float32 of right-padded `tokens` [B, S], read at `lengths` [B] - 1."""
        hidden = self.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return self.score_of(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])

    def score_of(self, last: Tensor) -> Tensor:
        """Return scores [B] float32 of the final states [B, D] of sequences' last tokens."""
        with torch.autocast(last.device.type, enabled=False):
            raw = last.float() @ self.head.weight.float().squeeze(0)
        return raw - self.mean

    def forward(self, batch: Preferences) -> tuple[Tensor, Tensor]:
        """Return the scores [B] of both sides of each pair, out of one forward pass."""
        width = max(batch.chosen.shape[1], batch.rejected.shape[1])
        sides = [pad(side, (0, width - side.shape[1])) for side in (batch.chosen, batch.rejected)]
        lengths = torch.cat([batch.chosen_lengths, batch.rejected_lengths])
        chosen, rejected = self.scores(torch.cat(sides), lengths).chunk(2)
        # FSDP hooks into what it is given, which it cannot do for views of one tensor.
        return chosen.clone(), rejected.clone()

    def set_normalisation(self, mean: float, std: float) -> None:
        """Let held-out demonstrations, whose scores were `mean` +- `std`, average 0 from now on.

        Args:
            mean: of the scores as they are given now, earlier normalisation included.
            std: their standard deviation.
        """
        self.mean += mean
        self.std.fill_(std)

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what trains: all that a checkpoint has to store."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def set_gradient_checkpointing(self, on: bool) -> Self:
        """Recompute each block's activations in the backward pass; takes effect in train mode."""
        set_checkpointing(self.trunk, on)
        return self

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write trunk (LoRA merged), tokenizer, head and normalisation into `folder`."""
        plain = self.trunk
        if lora_layers(self.trunk):
            plain = with_state(self.trunk, merged_state(self.trunk))
        write_model(plain, folder)
        tokenizer.save_pretrained(folder)
        write_head(self.head, self.mean.item(), self.std.item(), Path(folder))

    @classmethod
    def load(
        cls,
        path: str | Path,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        attention: Attention = "sdpa",
    ) -> RewardModel:
        """Load what `save` wrote, or a sequence classifier with one label.

        Args:
            path: a folder; or the hub id of a classifier.
            revision: of a hub id.
            dtype: of the trunk's weights; the head stays float32.
            attention: as for `load_causal_lm`.

        Raises:
            UserError: `path` is neither.
        """
        config = load_config(path, revision)
        ours = (Path(path) / HEAD).is_file()
        classifier = any(
            str(name).endswith("ForSequenceClassification") for name in config.architectures or ()
        )
        if not ours and not (classifier and config.num_labels == 1):
            raise UserError(
                f"{path}: no reward model (neither {HEAD} beside the trunk, nor a sequence "
                "classifier with one label); give a folder that the reward stage wrote"
            )
        kind: Any = AutoModel if ours else AutoModelForSequenceClassification
        model = load_pretrained(kind, path, config, revision, dtype, attention)
        reward = cls(model)
        if ours:
            load_head(reward.head, Path(path) / HEAD)
            reward.mean.fill_(_number(Path(path), "mean"))
            reward.std.fill_(_number(Path(path), "std"))
        else:
            load_linear(reward.head, model)
        return reward.eval()


def write_head(head: nn.Linear, mean: float, std: float, folder: Path) -> None:
    """Write what makes a reward model of the trunk in `folder`: head and normalisation."""
    save_head(head, folder / HEAD)
    (folder / NORMALISATION).write_text(json.dumps({"mean": mean, "std": std}, indent=2) + "\n")


@torch.no_grad()
def load_linear(head: nn.Linear, classifier: PreTrainedModel) -> None:
    """Copy the `score` layer of a one-label sequence classifier."""
    head.weight.copy_(cast(nn.Linear, classifier.score).weight)


def _number(folder: Path, name: str) -> float:
    path = folder / NORMALISATION
    try:
        value = float(json.loads(path.read_text())[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no number {name!r} can be read ({error!r})") from error
    if not math.isfinite(value):
        raise UserError(f"{path}: {name!r} is {value}, expected a finite number")
    return value


# Of a config: what says nothing about how hidden states are computed.
_ASIDE = frozenset(
    (
        *("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"),
        *("id2label", "label2id", "problem_type"),
    )
)


def adopt_trunk(reward: RewardModel, policy: Policy) -> Branch | None:
    """Put the policy's frozen blocks in the place of `reward`'s, if they are the same.

    Args:
        reward: A model of its own; changed in place.
        policy: With a frozen trunk, or without.

    Returns:
        What of `reward` is above the policy's trunk; `None` where it cannot be shared.
    """
    if not policy.cut:
        return None
    ours, theirs = decoder_parts(reward.trunk), decoder_parts(policy.model)
    count = len(ours.blocks)
    if _computed(ours.base) != _computed(theirs.base) or not _same(ours, theirs, policy.cut):
        return None
    for number in range(policy.cut):
        ours.blocks[number] = theirs.blocks[number]
    ours.base.set_input_embeddings(theirs.embedding)
    if ours.positions is not None:
        setattr(ours.base, ours.positions, getattr(theirs.base, ours.positions))
    return Branch.of(reward.trunk, count - policy.cut, share=True)


def read_scores(reward: RewardModel, branch: Branch, states: Tensor, last: Tensor) -> Tensor:
    """Return scores [B] float32 from states that enter the branch.

    Args:
        reward: The reward model.
        branch: Its top blocks.
        states: [B, S, D], right-padded.
        last: [B] int64, where the score is read.
    """
    if branch.reads:
        return reward.score_of(branch.read(states, last.unsqueeze(1))[:, 0])
    return reward.score_of(branch(states)[torch.arange(len(last), device=last.device), last])


def _computed(base: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in base.config.to_dict().items() if name not in _ASIDE}


def _same(ours: DecoderParts, theirs: DecoderParts, cut: int) -> bool:
    pairs: list[tuple[nn.Module, nn.Module]] = [(ours.embedding, theirs.embedding)]
    pairs += zip(ours.blocks[:cut], theirs.blocks[:cut], strict=True)
    if ours.positions is not None:
        pairs.append((getattr(ours.base, ours.positions), getattr(theirs.base, ours.positions)))
    return all(_equal(one, other) for one, other in pairs)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules hold the same values in the same number format."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value.cpu(), second[name].cpu())
        for name, value in first.items()
    )
