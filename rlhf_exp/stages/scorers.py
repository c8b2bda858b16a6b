"""The scorer that a config asks for: the reward model, or a user's function."""

from __future__ import annotations

from rlhf_exp.config.evaluation import REFEREE
from rlhf_exp.config.root import Config
from rlhf_exp.data.codec import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.sample_scores import SharedTrunkScorer
from rlhf_exp.engines.native.scoring import FunctionScorer, ModelScorer, Scorer, load_function
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.models.shared import adopt_trunk
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
    return model_scorer(config, context, codec, world, folder, model)


def training_scorer(
    config: Config, context: StageContext, codec: Codec, world: World, policy: Policy
) -> Scorer:
    """Return PPO's scorer: over the policy's own frozen trunk where the reward model has the same.

    Args:
        config: The experiment.
        context: Where the reward model is.
        codec: Of the policy.
        world: Device and precision.
        policy: Before anything of it is trained or spread over processes.
    """
    # DeepSpeed would turn the trunk into another number format; ZeRO-3 and FSDP spread it.
    cast = world.weights_dtype not in (None, torch_dtype(config))
    apart = policy.whole_blocks or cast
    folder = None if config.ppo.reward.function else context.models["reward"]
    if folder is None or apart or context.materials.codec(folder).digest != codec.digest:
        return scorer_for(config, context, codec, world)
    model = RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config))
    branch = adopt_trunk(model, policy)
    if branch is None:
        return scorer_for(config, context, codec, world, model)
    batch = config.ppo.generation.batch
    return SharedTrunkScorer(model, branch, codec, world, batch, _read_at_most(config))


def _read_at_most(config: Config) -> int:
    return max(config.reward.seq_length, config.ppo.seq_length)


def model_scorer(
    config: Config,
    context: StageContext,
    codec: Codec,
    world: World,
    folder: str,
    model: RewardModel | None = None,
) -> ModelScorer:
    """Return the scorer of a reward model's folder; for the arguments see `scorer_for`."""
    own = context.materials.codec(folder)
    return ModelScorer(
        model
        or RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config)),
        codec,
        None if own.digest == codec.digest else own,
        world,
        config.ppo.generation.batch,
        _read_at_most(config),
    )


class Judges:
    """The scorers of an evaluation: of the reward that PPO maximised, and of its referee.

    Each model is loaded once, when it is first asked for, whatever tokenizers the policies have.

    Args:
        config: The experiment.
        context: Where the reward models are.
        world: Device and precision.
    """

    def __init__(self, config: Config, context: StageContext, world: World) -> None:
        self.config, self.context, self.world = config, context, world
        self._made: dict[tuple[str, str], Scorer] = {}

    def reward(self, codec: Codec) -> Scorer:
        """Return the scorer of the reward, for a policy with this codec."""
        if self.config.ppo.reward.function is None:
            return self._of_model("reward", codec)
        key = ("function", codec.digest)
        if key not in self._made:
            self._made[key] = scorer_for(self.config, self.context, codec, self.world)
        return self._made[key]

    def referee(self, codec: Codec) -> Scorer | None:
        """Return the scorer of the second reward model, if there is one."""
        return self._of_model(REFEREE, codec) if REFEREE in self.context.models else None

    def own_codec(self) -> Codec | None:
        """Return the reward model's own codec; `None` where a function judges."""
        if self.config.ppo.reward.function is not None:
            return None
        return self.context.materials.codec(self.context.models["reward"])

    def _of_model(self, role: str, codec: Codec) -> Scorer:
        if (role, codec.digest) not in self._made:
            loaded = next((one for (other, _), one in self._made.items() if other == role), None)
            model = loaded.model if isinstance(loaded, ModelScorer) else None
            folder = self.context.models[role]
            made = model_scorer(self.config, self.context, codec, self.world, folder, model)
            self._made[role, codec.digest] = made
        return self._made[role, codec.digest]
