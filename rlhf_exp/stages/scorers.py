"""The scorers of responses that a config asks for: a reward model, a user's function, or a server.

Also keeps a run to one reward: PPO on a server notes the server's name, and refuses to go on with
another.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_exp.config.evaluation import REFEREE
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import PpoRewardConfig, RewardTermConfig
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.http_client import Service
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.redaction import secret_variable
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.setup import attention_of, torch_dtype
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.training.reward_scorer import ModelScorer, PromptRows, Scorer
from rlhf_exp.training.reward_terms import (
    EnsembleScorer,
    LengthScorer,
    MixedScorer,
    set_all_rows,
)
from rlhf_exp.training.scorers import (
    CentralScorer,
    FunctionScorer,
    RewardClient,
    RewardFunction,
    ServerInfo,
    ServerScorer,
)

SERVER_NOTE = "reward_server.json"
"""File in PPO's folder with the address and the name of the server that scores it."""


def scorer_for(
    config: Config,
    context: StageContext,
    codec: Codec,
    world: World,
    model: RewardModel | None = None,
) -> Scorer:
    """Return the scorer of PPO and of the evaluation; all processes take part.

    Args:
        config: The experiment.
        context: Names the folder of the reward model.
        codec: The policy's codec.
        world: The processes; device and precision.
        model: The reward model, if it is loaded already.
    """
    reward, folder = config.ppo.reward, context.models.get("reward")
    if reward.terms:
        terms = zip(reward.term_names, reward.terms, strict=True)
        return MixedScorer(
            {
                name: (term.weight, _term_scorer(config, context, codec, world, term, name))
                for name, term in terms
            }
        )
    if reward.function is not None:
        return FunctionScorer(RewardFunction(reward.function), codec)
    if reward.url is not None:
        client = agreed_reward_client(config, context, world, reward.url, reward.name, SERVER_NOTE)
        return ServerScorer(client, codec)
    assert folder is not None, "what scores is a reward model"
    if reward.device is None:
        return model_scorer(config, context, codec, world, folder, model)
    scorer = None
    if world.is_main:
        device = torch.device(reward.device)
        scorer = model_scorer(config, context, codec, world, folder, model, device)
    return CentralScorer(scorer, world)


def _term_scorer(
    config: Config,
    context: StageContext,
    codec: Codec,
    world: World,
    term: RewardTermConfig,
    name: str,
) -> Scorer:
    """Return the scorer of one of several rewards; `name` is the term's."""
    if term.function is not None:
        return FunctionScorer(RewardFunction(term.function, f"ppo.reward.terms: {name}"), codec)
    if term.url is not None:
        note = f"{Path(SERVER_NOTE).stem}-{name}.json"
        client = agreed_reward_client(config, context, world, term.url, term.name, note)
        return ServerScorer(client, codec)
    if term.length is not None:
        return LengthScorer(term.length.target)
    roles = {spec: role for role, spec in config.ppo.reward.term_models.items()}
    models = [
        model_scorer(config, context, codec, world, context.models[roles.get(spec, "reward")])
        for spec in term.specs
    ]
    return models[0] if term.model is not None else EnsembleScorer(models, term.combine, term.coef)


def model_scorer(
    config: Config,
    context: StageContext,
    codec: Codec,
    world: World,
    folder: str,
    model: RewardModel | None = None,
    device: torch.device | None = None,
) -> ModelScorer:
    """Return a scorer that loads a reward model.

    Args:
        config: The experiment.
        context: Loads the reward model's own codec.
        codec: The policy's codec.
        world: The processes; device and precision.
        folder: The reward model's folder.
        model: The reward model, if it is loaded already.
        device: Device to score on; by default the process's own, among whose processes PPO divides
            the model where it divides the policy.
    """
    reward_codec = context.materials.codec(folder)
    # In an evaluation the processes need not call it equally often.
    divided = context.stage == "ppo" and device is None and world.setup.divides_weights
    if model is None:
        model = RewardModel.load(
            folder,
            dtype=torch_dtype(config),
            attention=attention_of(config),
            weights=world.has_weights or not divided,
        )
    model.requires_grad_(False)
    if divided:
        world.place(model)
    else:
        model.to(device or world.device)
    return ModelScorer(
        model,
        codec,
        None if reward_codec.digest == codec.digest else reward_codec,
        world,
        config.ppo.generation.batch,
        longest_input(config),
        device,
    )


def longest_input(config: Config) -> int:
    """Return the most tokens of a prompt and response that the reward model reads."""
    return max(config.reward.seq_length, config.ppo.seq_length)


class EvaluationScorers:
    """The scorers of an evaluation: the reward that PPO maximised, and its referee.

    Each model is loaded once, on first use, however many tokenizers the policies have.

    Args:
        config: The experiment.
        context: Names the folders of the reward models.
        world: Device and precision.
    """

    def __init__(self, config: Config, context: StageContext, world: World) -> None:
        self.config, self.context, self.world = config, context, world
        self._scorers: dict[tuple[str, str], Scorer] = {}
        self._rows: defaultdict[str, PromptRows] = defaultdict(PromptRows)

    def rows(self, codec: Codec) -> PromptRows:
        """Return the rows of the prompts of policies with this codec, to be added to."""
        return self._rows[codec.digest]

    def reward(self, codec: Codec) -> Scorer:
        """Return the scorer of the reward, for a policy with this codec."""
        args = (self.config, self.context, codec, self.world)
        return self._once("reward", codec, lambda model: scorer_for(*args, model))

    def referee(self, codec: Codec) -> Scorer | None:
        """Return the scorer of the second reward model, if there is one."""
        folder = self.context.models.get(REFEREE)
        if folder is None:
            return None
        args = (self.config, self.context, codec, self.world, folder)
        return self._once(REFEREE, codec, lambda model: model_scorer(*args, model))

    def own_codec(self) -> Codec | None:
        """Return the reward model's own codec; `None` if a function or a server scores."""
        if not self.config.ppo.reward.model_scores:
            return None
        return self.context.materials.codec(self.context.models["reward"])

    def _once(
        self, role: str, codec: Codec, make: Callable[[RewardModel | None], Scorer]
    ) -> Scorer:
        key = (role, codec.digest)
        if key not in self._scorers:
            loaded = [scorer for (other, _), scorer in self._scorers.items() if other == role]
            scorer = make(_model_of(loaded[0]) if loaded else None)
            set_all_rows(scorer, self.rows(codec))
            self._scorers[key] = scorer
        return self._scorers[key]


def _model_of(scorer: Scorer) -> RewardModel | None:
    """Return the reward model of a scorer, if it has one in this process."""
    if isinstance(scorer, CentralScorer):
        return None if scorer.scorer is None else scorer.scorer.model
    return scorer.model if isinstance(scorer, ModelScorer) else None


def reward_client(section: PpoRewardConfig, url: str, name: str | None) -> RewardClient:
    """Return the client of a reward server.

    Args:
        section: How it is asked.
        url: Its address.
        name: What it must call itself, if it calls itself anything.
    """
    key = None if section.key_env is None else secret_variable(section.key_env)
    service = Service(url, key, section.timeout_s, section.retries)
    return RewardClient(service, section.request_size, name)


def agreed_reward_client(
    config: Config, context: StageContext, world: World, url: str, name: str | None, note: str
) -> RewardClient:
    """Return the client of a server, on whose reward all processes agree; all take part.

    Args:
        config: The experiment.
        context: The stage's folder.
        world: The processes.
        url: Its address.
        name: What it must call itself, if it calls itself anything.
        note: File in PPO's folder that keeps its name.

    Raises:
        UserError: A process cannot reach it, they disagree, or PPO began with another reward.
    """
    client = reward_client(config.ppo.reward, url, name)
    infos = world.run_on_all(client.check)
    if any(info != infos[0] for info in infos):
        raise UserError(
            f"ppo.reward.url={url}: the processes reach servers that score with "
            f"{', '.join(sorted({str(info.name) for info in infos}))}; all must have one reward"
        )
    if context.stage == "ppo" and context.probe is None:
        world.run_on_all(
            lambda: _note_server(context, url, infos[0], note) if world.is_main else None
        )
    return client


def _note_server(context: StageContext, url: str, info: ServerInfo, note: str) -> None:
    """Note the server's name; if PPO is resumed, check that it is the noted one.

    Raises:
        UserError: The server has another reward than the run began with.
    """
    path = context.folder / note
    if path.is_file():
        try:
            noted_name = json.loads(path.read_text(encoding="utf-8"))["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the note of the reward server that this run was begun with "
                f"({type(error).__name__}: {error}). Remove it if the server is still that one, or "
                "begin anew with rerun=[ppo]"
            ) from error
        if noted_name != info.name:
            raise UserError(
                f"ppo.reward.url={url}: it scores with {info.name!r}, and this run was "
                f"begun with {noted_name!r}; start that one again, or begin anew with rerun=[ppo]"
            )
        return
    context.before_write()
    write_json_atomic(path, {"url": url, "name": info.name})
