"""The scorer that a config asks for: the reward model, or a user's function."""

from __future__ import annotations

from rlhf_exp.config.root import Config
from rlhf_exp.data.codec import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.scoring import FunctionScorer, ModelScorer, Scorer, load_function
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.training import attention_of, torch_dtype


def scorer_for(
    config: Config,
    context: StageContext,
    codec: Codec,
    world: World,
    model: RewardModel | None = None,
) -> Scorer:
    """Return what judges responses in PPO and in the evaluation.

    Args:
        config: The experiment.
        context: Where the reward model is.
        codec: Of the policy.
        world: Device and precision.
        model: The reward model, where it is loaded already.
    """
    function = config.ppo.reward.function
    if function is not None:
        return FunctionScorer(load_function(function), codec, function)
    folder = context.models["reward"]
    own = context.materials.codec(folder)
    return ModelScorer(
        model
        or RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config)),
        codec,
        None if own.digest == codec.digest else own,
        world,
        config.ppo.generation.batch,
        max(config.reward.seq_length, config.ppo.seq_length),
    )
