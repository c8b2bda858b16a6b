"""The reward model: a decoder's trunk with one number read at a sequence's last token.

On disk it is a Hugging Face folder of the trunk, which `transformers.AutoModel` loads, with two
files beside it: `reward_head.safetensors` (the head) and `reward_model.json` (mean and standard
deviation of the scores on held-out demonstrations). It can run over the policy's frozen trunk
instead of its own (`share_frozen_trunk`).

B rows, S tokens, D width. Batches are right-padded without a mask.
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf_exp.batch import Preferences
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import Branch, DecoderParts, decoder_parts
from rlhf_exp.models.lora import LoraSettings, add_lora, lora_layers, merged_state
from rlhf_exp.models.policy import (
    HEAD_INIT_STD,
    Policy,
    disable_dropout,
    freeze_lower_blocks,
    set_gradient_checkpointing,
)
from rlhf_exp.models.pretrained import (
    Attention,
    is_encoder,
    load_config,
    load_head,
    load_pretrained,
    save_head,
    tensor_shapes,
    with_state_dict,
    write_model,
)

REWARD_HEAD_FILE = "reward_head.safetensors"
NORMALISATION_FILE = "reward_model.json"


class RewardModel(nn.Module):
    """Scores sequences; a score is the head's output less `mean`.

    Attributes:
        trunk: the decoder without its language-model head.
        head: linear layer D -> 1 without bias, computed in float32.
        mean: 0-dim float32, mean output of the head on held-out demonstrations.
        std: 0-dim float32, standard deviation of these outputs.
        unread: token at whose end of a sequence no score is read, but before it: a sequence
            classifier's padding, as transformers takes it; `None`: the last token is read.
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
        """Use the trunk of `model`, and set which of its parameters require gradients.

        Args:
            model: with or without a language-model head; its trunk is used, not copied.
            train_blocks: how many of the last blocks train (or are adapted); `None`: all.
            lora: train an adapter instead of the trunk's weights.
            seed: of the head's and the adapter's initial weights.
        """
        super().__init__()
        self.trunk = disable_dropout(cast(PreTrainedModel, model.base_model))
        self.head = nn.Linear(model.config.hidden_size, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator))
            self.head.weight.mul_(HEAD_INIT_STD)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.unread: int | None = None
        if lora is not None:
            add_lora(self.trunk, lora, seed, train_blocks)
        else:
            freeze_lower_blocks(self.trunk, train_blocks)

    def scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return scores [B] float32 of right-padded `tokens` [B, S] of `lengths` [B] tokens."""
        hidden = self.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.score_states(hidden[rows, self._read_at(tokens, lengths)])

    def _read_at(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the positions [B] at which scores are read."""
        if self.unread is None:
            return lengths - 1
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        counts = (columns < lengths[:, None]) & (tokens != self.unread)
        return (columns * counts).argmax(1)

    def score_states(self, last: Tensor) -> Tensor:
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
        # FSDP puts hooks on the outputs, which it cannot do for views of one tensor.
        return chosen.clone(), rejected.clone()

    def set_normalisation(self, mean: float, std: float) -> None:
        """Shift the scores so that held-out demonstrations have a mean score of 0.

        Args:
            mean: mean of their scores so far, earlier normalisation included.
            std: standard deviation of these scores.
        """
        self.mean += mean
        self.std.fill_(std)

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters: all that a checkpoint has to store."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def set_gradient_checkpointing(self, on: bool) -> Self:
        """Recompute each block's activations in the backward pass; takes effect in train mode."""
        set_gradient_checkpointing(self.trunk, on)
        return self

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write trunk (LoRA merged), tokenizer, head and normalisation into `folder`."""
        trunk = self.trunk
        if lora_layers(self.trunk):
            trunk = with_state_dict(self.trunk, merged_state(self.trunk))
        write_model(trunk, folder)
        tokenizer.save_pretrained(folder)
        write_reward_head(self.head, self.mean.item(), self.std.item(), Path(folder))

    @classmethod
    def load(
        cls,
        path: str | Path,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        attention: Attention = "sdpa",
        config: PreTrainedConfig | None = None,
        weights: bool = True,
    ) -> RewardModel:
        """Load a reward model that `save` wrote, or a sequence classifier with one label.

        Args:
            path: a folder; or the hub id of a classifier.
            revision: branch, tag or commit of a hub id.
            dtype: of the trunk's weights; the head stays float32.
            attention: as for `load_causal_lm`.
            config: the trunk's config in place of its own: of its lowest blocks.
            weights: whether to load the trunk's, as for `load_pretrained`; a classifier's always.

        Raises:
            UserError: `path` is neither, or a file of it is missing or damaged.
        """
        config = config or reward_model_config(path, revision)
        has_head = (Path(path) / REWARD_HEAD_FILE).is_file()
        auto_class: Any = AutoModel if has_head else AutoModelForSequenceClassification
        model = load_pretrained(
            auto_class, path, config, revision, dtype, attention, weights=weights or not has_head
        )
        reward = cls(model)
        if has_head:
            load_head(reward.head, Path(path) / REWARD_HEAD_FILE)
            reward.mean.fill_(_read_number(Path(path), "mean"))
            reward.std.fill_(_read_number(Path(path), "std"))
        else:
            load_score_layer(reward.head, model)
            reward.unread = config.get_text_config().pad_token_id
        return reward.eval()


def reward_model_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Return the config of a reward model, checked without loading its weights.

    Args:
        path: a folder, or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: there is no model that `RewardModel.load` can load.
    """
    config, folder = load_config(path, revision), Path(path)
    if not (folder / REWARD_HEAD_FILE).is_file():
        _check_classifier(path, config)
        return config
    if is_encoder(config):
        raise UserError(
            f"{path}: a {config.model_type} reads in both directions, and a reward model's trunk "
            "is a decoder; give a folder that the reward stage wrote"
        )
    head, shape = folder / REWARD_HEAD_FILE, (1, config.hidden_size)
    if (found := tensor_shapes(head).get("weight")) != shape:
        raise UserError(
            f"{head}: holds a head of shape {found}, and the trunk beside it needs {shape}; copy "
            "the whole folder that the reward stage wrote"
        )
    for name in ("mean", "std"):
        _read_number(folder, name)
    return config


def _check_classifier(path: str | Path, config: PreTrainedConfig) -> None:
    """Check that a sequence classifier can be read as a reward model.

    Raises:
        UserError: it is none, has another number of labels, or no score at its last token.
    """
    architectures = [str(name) for name in config.architectures or ()]
    named = any(name.endswith("ForSequenceClassification") for name in architectures)
    if not named or config.num_labels != 1:
        labels = f", with {config.num_labels} labels" if named else ""
        raise UserError(
            f"{path}: no reward model (neither {REWARD_HEAD_FILE} beside the trunk, nor a "
            f"sequence classifier with one label; it is a {', '.join(architectures)}"
            f"{labels}); give a folder that the reward stage wrote"
        )
    if is_encoder(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{path}: a {config.model_type} classifier reads in both directions and has no score "
            "at its last token, as a reward of PPO needs it; give a decoder's classifier, or a "
            "folder that the reward stage wrote. As a judge it can be asked: "
            f"eval.judge.names=[model] eval.judge.model={path}"
        )


def write_reward_head(head: nn.Linear, mean: float, std: float, folder: Path) -> None:
    """Write head and normalisation beside the trunk in `folder`."""
    save_head(head, folder / REWARD_HEAD_FILE)
    (folder / NORMALISATION_FILE).write_text(
        json.dumps({"mean": mean, "std": std}, indent=2) + "\n"
    )


@torch.no_grad()
def load_score_layer(head: nn.Linear, classifier: PreTrainedModel) -> None:
    """Copy the `score` layer of a one-label sequence classifier."""
    head.weight.copy_(cast(nn.Linear, classifier.score).weight)


def _read_number(folder: Path, name: str) -> float:
    path = folder / NORMALISATION_FILE
    try:
        value = float(json.loads(path.read_text())[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no number {name!r} can be read ({error!r})") from error
    if not math.isfinite(value):
        raise UserError(f"{path}: {name!r} is {value}, expected a finite number")
    return value


def share_frozen_trunk(reward: RewardModel, policy: Policy) -> Branch | None:
    """Replace the lower blocks of `reward` by the policy's frozen ones, if they are equal.

    A reward model that was initialised from the SFT policy, and of which only top blocks trained,
    has the policy's weights below them. So they need memory once, and the states that the policy
    computes while it samples serve the reward model too: scoring costs the top blocks only.

    Args:
        reward: Changed in place.
        policy: With a frozen trunk, or without.

    Returns:
        The blocks of `reward` above the policy's trunk; `None` if the trunk cannot be shared.
    """
    if not policy.frozen_blocks or reward.unread is not None:
        return None
    ours, theirs = decoder_parts(reward.trunk), decoder_parts(policy.model)
    count = len(ours.blocks)
    if _relevant_config(ours.base) != _relevant_config(theirs.base):
        return None
    if not _equal_below(ours, theirs, policy.frozen_blocks):
        return None
    for number in range(policy.frozen_blocks):
        ours.blocks[number] = theirs.blocks[number]
    ours.base.set_input_embeddings(theirs.embedding)
    if ours.positions is not None:
        setattr(ours.base, ours.positions, getattr(theirs.base, ours.positions))
    return Branch.of(reward.trunk, count - policy.frozen_blocks, share=True)


def scores_from_branch(reward: RewardModel, branch: Branch, states: Tensor, last: Tensor) -> Tensor:
    """Return scores [B] float32 from the states that enter the top blocks.

    Args:
        reward: The reward model.
        branch: Its top blocks, from `share_frozen_trunk`.
        states: [B, S, D] entering them, right-padded.
        last: [B] int64, position of each row's last token, where the score is read.
    """
    if branch.supports_forward_at:
        return reward.score_states(branch.forward_at(states, last.unsqueeze(1))[:, 0])
    return reward.score_states(branch(states)[torch.arange(len(last), device=last.device), last])


# Config fields that do not affect how hidden states are computed.
_IRRELEVANT_FIELDS = frozenset(
    (
        *("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"),
        *("id2label", "label2id", "problem_type"),
    )
)


def _relevant_config(base: PreTrainedModel) -> dict[str, Any]:
    return {
        name: value
        for name, value in base.config.to_dict().items()
        if name not in _IRRELEVANT_FIELDS
    }


def _equal_below(ours: DecoderParts, theirs: DecoderParts, count: int) -> bool:
    """Return whether two models have equal embeddings and equal lowest `count` blocks."""
    pairs: list[tuple[nn.Module, nn.Module]] = [(ours.embedding, theirs.embedding)]
    pairs += zip(ours.blocks[:count], theirs.blocks[:count], strict=True)
    if ours.positions is not None:
        pairs.append((getattr(ours.base, ours.positions), getattr(theirs.base, ours.positions)))
    return all(_equal(first, second) for first, second in pairs)


def _equal(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two modules hold the same values in the same number format."""
    values, others = first.state_dict(), second.state_dict()
    return values.keys() == others.keys() and all(
        value.dtype == others[name].dtype and torch.equal(value.cpu(), others[name].cpu())
        for name, value in values.items()
    )
