"""The scorer that a config asks for: the reward model, a user's function, or a server.

The reward server that a config names, recognised before it is relied on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch

from rlhf_exp.config.evaluation import REFEREE
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import PpoRewardConfig
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.http_client import Service
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reward_model import RewardModel, share_frozen_trunk
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.training import attention_of, torch_dtype
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.training.reward_scorer import ModelScorer, Scorer, SharedTrunkScorer
from rlhf_exp.training.scorers import (
    CentralScorer,
    FunctionScorer,
    RewardClient,
    ServerInfo,
    ServerScorer,
    load_function,
)


def scorer_for(
    config: Config,
    context: StageContext,
    codec: Codec,
    world: World,
    model: RewardModel | None = None,
) -> Scorer:
    """Return what judges responses in PPO and in the evaluation; all processes take part.

    Args:
        config: The experiment.
        context: Where the reward model is.
        codec: Of the policy.
        world: Device and precision.
        model: The reward model, where it is loaded already.
    """
    reward, folder = config.ppo.reward, context.models.get("reward")
    if reward.function is not None:
        return FunctionScorer(load_function(reward.function), codec, reward.function)
    if reward.url is not None:
        return ServerScorer(agreed_reward_client(config, context, world), codec)
    assert folder is not None, "what scores is a reward model"
    if reward.device is None:
        return model_scorer(config, context, codec, world, folder, model)
    own = None
    if world.is_main:
        device = torch.device(reward.device)
        own = model_scorer(config, context, codec, world, folder, model, device)
    return CentralScorer(own, world)


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
    apart = policy.run_all_positions or cast or config.ppo.reward.device is not None
    folder = context.models["reward"] if config.ppo.reward.model_scores else None
    if folder is None or apart or context.materials.codec(folder).digest != codec.digest:
        return scorer_for(config, context, codec, world)
    model = RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config))
    branch = share_frozen_trunk(model, policy)
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
    device: torch.device | None = None,
) -> ModelScorer:
    """Return the scorer of a reward model's folder.

    Args:
        config: The experiment.
        context: Of the stage.
        codec: Of the policy.
        world: Device and precision.
        folder: Of the reward model.
        model: The reward model, where it is loaded already.
        device: Where it computes; by default the process's own device.
    """
    own = context.materials.codec(folder)
    return ModelScorer(
        model
        or RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config)),
        codec,
        None if own.digest == codec.digest else own,
        world,
        config.ppo.generation.batch,
        _read_at_most(config),
        device,
    )


class EvaluationScorers:
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
        given = (self.config, self.context, codec, self.world)
        return self._once("reward", codec, lambda model: scorer_for(*given, model))

    def referee(self, codec: Codec) -> Scorer | None:
        """Return the scorer of the second reward model, if there is one."""
        folder = self.context.models.get(REFEREE)
        if folder is None:
            return None
        given = (self.config, self.context, codec, self.world, folder)
        return self._once(REFEREE, codec, lambda model: model_scorer(*given, model))

    def own_codec(self) -> Codec | None:
        """Return the reward model's own codec; `None` where a function or a server judges."""
        if not self.config.ppo.reward.model_scores:
            return None
        return self.context.materials.codec(self.context.models["reward"])

    def _once(
        self, role: str, codec: Codec, make: Callable[[RewardModel | None], Scorer]
    ) -> Scorer:
        key = (role, codec.digest)
        if key not in self._made:
            loaded = [one for (other, _), one in self._made.items() if other == role]
            self._made[key] = make(_model_of(loaded[0]) if loaded else None)
        return self._made[key]


def _model_of(scorer: Scorer) -> RewardModel | None:
    """Return the reward model of a scorer, if it has one in this process."""
    if isinstance(scorer, CentralScorer):
        return None if scorer.scorer is None else scorer.scorer.model
    return scorer.model if isinstance(scorer, ModelScorer) else None


SERVER_NOTE = "reward_server.json"
"""What PPO was scored by: the server's address, and the name that it gave itself."""


def reward_client(section: PpoRewardConfig) -> RewardClient:
    """Return the client of the server at `ppo.reward.url`."""
    assert section.url is not None, "a server scores"
    key = None if section.key_env is None else os.environ[section.key_env]
    service = Service(section.url, key, section.timeout_s, section.retries)
    return RewardClient(service, section.request_size, section.name)


def agreed_reward_client(config: Config, context: StageContext, world: World) -> RewardClient:
    """Return the client of a server that each process has reached; all of them take part.

    Raises:
        UserError: One cannot reach it, or PPO was begun with another reward than it has.
    """
    server = reward_client(config.ppo.reward)
    told = world.run_on_all(server.check)
    if any(one != told[0] for one in told):
        raise UserError(
            f"ppo.reward.url={config.ppo.reward.url}: the processes reach servers that score with "
            f"{', '.join(sorted({str(one.name) for one in told}))}; all must have one reward"
        )
    if context.stage == "ppo" and context.probe is None:
        world.run_on_all(lambda: _note(config, context, told[0]) if world.is_main else None)
    return server


def _note(config: Config, context: StageContext, told: ServerInfo) -> None:
    """Write down what scores; or, where PPO goes on, make sure that it is the same.

    Raises:
        UserError: It is another reward.
    """
    path, reward = context.folder / SERVER_NOTE, config.ppo.reward
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["name"]
        if before != told.name:
            raise UserError(
                f"ppo.reward.url={reward.url}: it scores with {told.name!r}, and this run was "
                f"begun with {before!r}; start that one again, or begin anew with rerun=[ppo]"
            )
        return
    context.before_write()
    write_json_atomic(path, {"url": reward.url, "name": told.name})
