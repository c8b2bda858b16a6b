"""How a model runs while it trains: what is frozen, without dropout, with checkpointing or not.

Dropout is off by its probabilities, not by eval mode: in eval mode transformers silently does
without gradient checkpointing.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rlhf_exp.models.configs import without_dropout
from rlhf_exp.models.families import decoder_parts


def dropout_off(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout probability of `model` to 0, in its config and in its modules."""
    without_dropout(model.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


def freeze_below(model: PreTrainedModel, train_blocks: int | None) -> None:
    """Let only the last `train_blocks` blocks, the final norm and an untied head train.

    `None` lets everything train. Tied embeddings stay frozen, and so does their head.
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


def set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Turn gradient checkpointing on or off; on, it acts wherever the model is in train mode."""
    # transformers renamed these methods during its version 5.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
