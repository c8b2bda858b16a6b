"""The SFT stage: a base model, from scratch or pretrained, learns to imitate demonstrations."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_exp.config.experiment import Config, ModelConfig
from rlhf_exp.data.batching import PackedRow, pack_demonstrations
from rlhf_exp.data.rows import Demonstration
from rlhf_exp.data.tokenized import tokenize_demonstrations
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.models.architecture import TYPES
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import (
    architecture_of,
    build_causal_lm,
    end_texts_at,
    load_causal_lm,
)
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.stages.publish import save_models
from rlhf_exp.stages.setup import world_for
from rlhf_exp.stages.shape import shape_of
from rlhf_exp.stages.training import (
    keep_small_updates,
    lora_of,
    parameter_facts,
    run_loop,
    steps_of,
)
from rlhf_exp.training.sft import SftTask

log = logging.getLogger(__name__)

WATCH = ("loss/total", "eval/loss", "throughput/tokens_per_s")


def run(config: Config, context: StageContext) -> StageResult:
    """Train, and leave the model in `context.folder/model`."""
    section = config.sft
    with world_for(config) as world:
        codec, model = base_model(config.model, context, world.has_weights)
        rows = context.materials.training_demonstrations()
        held_out = context.materials.corpus.demonstrations.validation
        train_rows, cut = _pack(rows, codec, config, context.cache)
        # A small data set may leave nothing to validate on: the training rows then stand in.
        validation, _ = _pack(held_out or rows[:100], codec, config, context.cache)
        policy = Policy(
            model,
            train_blocks=section.train_blocks,
            lora=lora_of(section),
            value_head=False,
            seed=section.seed,
        ).set_gradient_checkpointing(section.gradient_checkpointing)
        keep_small_updates(policy)
        task = SftTask(policy, train_rows, validation, section, world)
        steps = steps_of(section.steps, section.epochs, len(train_rows), section.batch)
        conclude = partial(save_models, config, context, world, policy, codec.tokenizer)
        outcome = run_loop(config, section, steps, task, world, context, WATCH, conclude)
        facts = parameter_facts(policy) | {
            "rows": len(rows),
            "packed_rows": len(train_rows),
            "cut_prompts": cut,
        }
        facts |= context.materials.facts()
        return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def base_model(
    config: ModelConfig, context: StageContext, weights: bool = True
) -> tuple[Codec, PreTrainedModel]:
    """Return the model that SFT starts from, with its codec.

    Args:
        config: The `model` section.
        context: Has the data, and the folder or hub id of a base model that is given.
        weights: Whether this process loads those of a given model (`World.has_weights`).

    Raises:
        UserError: `model.path` holds no usable model.
    """
    dtype = getattr(torch, config.dtype.value)
    materials = context.materials
    if config.path is not None:
        source = context.models["base"]
        model = load_causal_lm(source, config.revision, dtype, config.attention.value, weights)
        _compare_shapes(config, model)
        codec = base_codec(config, materials)
        end_texts_at(model, codec.eos_id, codec.end_ids)
        return codec, model
    codec = base_codec(config, materials)
    model = build_causal_lm(
        shape_of(config.architecture, codec.vocab_size),
        config.seed,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
        dtype=dtype,
        attention=config.attention.value,
    )
    return codec, model


def base_codec(config: ModelConfig, materials: DataModule) -> Codec:
    """Return the codec of the model that SFT starts from; a new one learns from the data.

    Raises:
        UserError: `model.path` holds no usable tokenizer.
    """
    if config.path is not None:
        return materials.codec(config.path, config.revision)
    tokenizer = train_tokenizer(materials.texts(), config.architecture.vocabulary)
    return Codec(tokenizer, materials.config.format.value)


def _compare_shapes(config: ModelConfig, model: PreTrainedModel) -> None:
    """Say where `model.architecture`, by which plans are made, describes another model."""
    assert config.path is not None
    # A plan reads a folder's own shape, and estimates no other families.
    if Path(config.path).is_dir() or model.config.model_type not in TYPES:
        return
    said, real = config.architecture, architecture_of(model.config)
    odd = [
        f"{name}={getattr(real, name)}"
        for name in ("layers", "width", "heads", "vocabulary")
        if getattr(said, name) != getattr(real, name)
    ]
    if odd:
        log.warning(
            "%s is of another shape than model.architecture says, so plan=true estimates another "
            "model's memory; set %s",
            config.path,
            " ".join(f"model.architecture.{item}" for item in odd),
        )


def _pack(
    rows: list[Demonstration], codec: Codec, config: Config, cache: Path
) -> tuple[list[PackedRow], int]:
    section = config.sft
    tokenized = tokenize_demonstrations(rows, codec, section.seq_length, cache / "tokenized")
    packed = pack_demonstrations(
        tokenized, section.seq_length, section.packing, section.loss_on.value
    )
    return packed, tokenized.cut
