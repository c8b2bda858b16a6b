"""The reward stage: a trunk and a scalar head learn people's preferences."""

from __future__ import annotations

import json
from functools import partial

import torch
from torch import Tensor

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import RewardConfig, RewardInit
from rlhf_exp.data.batching import right_padded
from rlhf_exp.data.rows import Preference
from rlhf_exp.data.tokenized import (
    TokenizedDemonstrations,
    TokenizedPreferences,
    tokenize_demonstrations,
    tokenize_preferences,
)
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.evaluation.statistics import calibration, clopper_pearson
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.publish import save_models
from rlhf_exp.stages.setup import load_policy_model, world_for
from rlhf_exp.stages.training import (
    keep_small_updates,
    lora_of,
    parameter_facts,
    run_loop,
    steps_of,
)
from rlhf_exp.training.memory import memory_phase
from rlhf_exp.training.result import TrainingResult
from rlhf_exp.training.reward import RewardTask, pair_scores
from rlhf_exp.training.reward_scorer import ModelScorer, score_shared

WATCH = ("loss/total", "reward/accuracy", "eval/accuracy")
CALIBRATION = "calibration.json"


def run(config: Config, context: StageContext) -> StageResult:
    """Train, normalise on held-out demonstrations, and leave `context.folder/model`."""
    section = config.reward
    chosen = context.materials.training_pairs("reward", section.part)
    rows = context.materials.corpus.preferences
    with world_for(config) as world:
        codec, model = _initial(config, context, world)
        pairs = _tokenize(chosen, codec, config, context)
        held_out = _tokenize(rows.validation or rows.train[:100], codec, config, context)
        task = RewardTask(model, pairs, held_out, section, world)
        # Counted before scoring freezes the model.
        facts = parameter_facts(model) | {"pairs": len(pairs), "cut_prompts": pairs.cut}
        facts |= context.materials.facts()
        steps = steps_of(section.steps, section.epochs, len(pairs), section.batch)
        normalise = partial(_normalise, model, codec, config, context, world)

        def conclude(outcome: TrainingResult) -> dict[str, float]:
            with memory_phase("evaluating", world.device):
                metrics = normalise()
                if rows.test:
                    test = _tokenize(rows.test, codec, config, context)
                    metrics |= _test(task, test, section, world, context)
            save_models(config, context, world, model, codec.tokenizer, outcome, normalise)
            return metrics

        running = (config, section, steps, task, world, context, WATCH, conclude)
        outcome = run_loop(*running, weights_everywhere=True)
        return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def _initial(config: Config, context: StageContext, world: World) -> tuple[Codec, RewardModel]:
    section = config.reward
    source = context.models["sft" if section.init == RewardInit.sft else "base"]
    revision = config.model.revision if section.init == RewardInit.base else None
    model = load_policy_model(config, source, revision, world.has_weights)
    judge = RewardModel(
        model, train_blocks=section.train_blocks, lora=lora_of(section), seed=section.seed
    )
    judge.set_gradient_checkpointing(section.gradient_checkpointing)
    keep_small_updates(judge)
    return context.materials.codec(source, revision), judge


def _tokenize(
    rows: list[Preference], codec: Codec, config: Config, context: StageContext
) -> TokenizedPreferences:
    length = config.reward.seq_length
    return tokenize_preferences(rows, codec, length, context.cache / "tokenized")


def _normalise(
    model: RewardModel, codec: Codec, config: Config, context: StageContext, world: World
) -> dict[str, float]:
    """Shift the scores so that held-out demonstrations average 0; return mean and deviation."""
    rows = context.materials.corpus.demonstrations
    held_out = rows.validation or rows.train[:100]
    if not held_out:
        return {}
    tokenized = tokenize_demonstrations(
        held_out, codec, config.reward.seq_length, context.cache / "tokenized"
    )
    scorer = ModelScorer(model, codec, None, world, config.reward.batch, config.reward.seq_length)
    model.mean.zero_()  # of the snapshot before
    scores = score_shared(scorer, *_whole(tokenized), world)
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    model.set_normalisation(mean, std)
    return {"demonstrations/mean_before": mean, "demonstrations/std": std}


def _whole(demonstrations: TokenizedDemonstrations) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, prompt lengths and content lengths as a scorer takes them."""
    pairs = [
        (demonstrations.prompt_ids[row], demonstrations.response_ids[row])
        for row in range(len(demonstrations))
    ]
    tokens, _ = right_padded(pairs)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in pairs])
    return tokens, lengths[:, 0], lengths[:, 1] - 1


def _test(
    task: RewardTask,
    pairs: TokenizedPreferences,
    section: RewardConfig,
    world: World,
    context: StageContext,
) -> dict[str, float]:
    """Return accuracy on test pairs with its 95 % interval, and leave the calibration curve."""
    chosen, rejected = pair_scores(task.scores, pairs, section, world)
    margins = (chosen - rejected).numpy()
    correct = int((margins > 0).sum())
    interval = clopper_pearson(correct, len(margins))
    curve = calibration(margins)
    if world.is_main:
        (context.folder / CALIBRATION).write_text(json.dumps(curve.to_json()))
    return {
        "test/accuracy": correct / len(margins),
        "test/accuracy_low": interval.low,
        "test/accuracy_high": interval.high,
        "test/pairs": float(len(margins)),
        "test/calibration_error": curve.error,
    }
