"""Processes and models, opened as the config says: number formats, strategy, attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from rlhf_exp.config.experiment import Config, Dtype
from rlhf_exp.distributed.world import Precision, World, world_of
from rlhf_exp.models.pretrained import Attention, load_causal_lm

if TYPE_CHECKING:
    from rlhf_exp.rollout.decoder import CacheKind


@contextmanager
def world_for(config: Config) -> Iterator[World]:
    """Open the processes that the config asks for."""
    section = config.distributed
    opened = world_of(
        precision_of(config),
        section.threads,
        section.strategy.value,
        section.offload,
        section.shard_over.value,
    )
    with opened as world:
        yield world


def precision_of(config: Config) -> Precision:
    """Return the number format of forward and backward passes."""
    name: Any = config.computes_in.name
    return name


def torch_dtype(config: Config) -> torch.dtype:
    """Return the number format that weights are stored in."""
    return torch.bfloat16 if config.model.dtype == Dtype.bfloat16 else torch.float32


def attention_of(config: Config) -> Attention:
    """Return the attention implementation."""
    name: Any = config.model.attention.value
    return name


def cache_of(config: Config) -> CacheKind:
    """Return the kind of cache that sampling uses."""
    name: Any = config.model.cache.value
    return name


def load_policy_model(
    config: Config, path: str, revision: str | None = None, weights: bool = True
) -> PreTrainedModel:
    """Load a causal language model in the config's number format.

    Args:
        config: The experiment.
        path: Folder or hub id.
        revision: Of a hub id.
        weights: Whether this process loads them (`World.has_weights`).
    """
    return load_causal_lm(path, revision, torch_dtype(config), attention_of(config), weights)
