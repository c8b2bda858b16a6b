"""Rules for what scores responses in PPO and in the evaluation, and where it is."""

from __future__ import annotations

from rlhf_exp.config.check_address import check_address
from rlhf_exp.config.check_function import check_function
from rlhf_exp.config.problems import Findings


def check_scoring(found: Findings) -> None:
    """Report what is wrong with a function, a server, or the reward model's place."""
    reward = found.config.ppo.reward
    if reward.function is not None:
        check_function(found, "ppo.reward.function")
    if reward.function is not None and reward.url is not None:
        found.add("ppo.reward.url", "ppo.reward.function is set too; one of them scores.")
    _check_server(found)
    _check_placement(found)


def _check_server(found: Findings) -> None:
    reward = found.config.ppo.reward
    found.at_least(1, "ppo.reward.request_size")
    found.at_least(0, "ppo.reward.retries")
    found.positive("ppo.reward.timeout_s")
    if reward.url is not None:
        check_address(found, "ppo.reward", "http://127.0.0.1:8480")
        blank = reward.name is not None and not reward.name.strip()
        found.unless(not blank, "ppo.reward.name", "must not be empty; null names nothing.")
        return
    for name in ("name", "key_env"):
        if getattr(reward, name) is not None:
            found.add(f"ppo.reward.{name}", "is of a reward server; set ppo.reward.url too.")


def _check_placement(found: Findings) -> None:
    config, key = found.config, "ppo.reward.placement"
    reward = config.ppo.reward
    if reward.gpu is None and reward.placement not in ("shared", "cpu"):
        found.add(key, "expected shared, cpu, or a GPU by its number: gpu:7.")
    elif reward.placement != "shared" and not reward.model_scores:
        message = f"there is no reward model to place, a {reward.kind} scores; use shared."
        found.add(key, message)
    elif reward.gpu == 0:
        # How many more processes its machine has is known where they run.
        found.add(key, "the main process trains there; name a GPU that no process has.")
