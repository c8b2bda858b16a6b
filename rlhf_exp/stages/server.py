"""The reward server that a config names, recognised before it is relied on."""

from __future__ import annotations

import json
import os

from rlhf_exp.config.ppo import PpoRewardConfig
from rlhf_exp.config.root import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.reward_server import RewardServer, Told
from rlhf_exp.errors import UserError
from rlhf_exp.http.client import Service
from rlhf_exp.stages.context import StageContext
from rlhf_exp.store.files import write_json_atomic

NOTE = "reward_server.json"
"""What PPO was scored by: the server's address, and the name that it gave itself."""


def server_of(section: PpoRewardConfig) -> RewardServer:
    """Return the client of the server at `ppo.reward.url`."""
    assert section.url is not None, "a server scores"
    key = None if section.key_env is None else os.environ[section.key_env]
    service = Service(section.url, key, section.timeout_s, section.retries)
    return RewardServer(service, section.request_size, section.name)


def known_server(config: Config, context: StageContext, world: World) -> RewardServer:
    """Return the client of a server that each process has reached; all of them take part.

    Raises:
        UserError: One cannot reach it, or PPO was begun with another reward than it has.
    """
    server = server_of(config.ppo.reward)
    told = world.together(server.check)
    if any(one != told[0] for one in told):
        raise UserError(
            f"ppo.reward.url={config.ppo.reward.url}: the processes reach servers that score with "
            f"{', '.join(sorted({str(one.name) for one in told}))}; all must have one reward"
        )
    if context.stage == "ppo" and context.probe is None:
        world.together(lambda: _note(config, context, told[0]) if world.is_main else None)
    return server


def _note(config: Config, context: StageContext, told: Told) -> None:
    """Write down what scores; or, where PPO goes on, make sure that it is the same.

    Raises:
        UserError: It is another reward.
    """
    path, reward = context.folder / NOTE, config.ppo.reward
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
