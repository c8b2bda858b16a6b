"""A field at its `neutral` value is in no key, as though it did not exist; at another it is."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.fields import key_content
from rlhf_exp.config.schema_keys import CONF, all_keys
from rlhf_exp.pipeline.plan import plan

NEUTRAL = {
    name: key.field.metadata["neutral"]
    for name, key in all_keys().items()
    if "neutral" in key.field.metadata
}
"""What each field's neutral value is."""

# Stages whose keys hold the field: the one it is of, and those built on it.
REWARD, PPO, EVAL = ("reward", "ppo", "eval"), ("ppo", "eval"), ("eval",)
ALL = ("sft", *REWARD)
OTHERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # field: another value, what else must be set for it to count, the stages it counts in
    "reward.part": ("1/2", "", REWARD),
    **dict.fromkeys(
        (key for key in NEUTRAL if key.startswith("data.columns.")),
        ("COLUMN", "data=hh_local data.preferences=LABELS", ALL),
    ),
    "model.cache": ("library", "", PPO),
    "ppo.kl.budget": ("2.0", "", PPO),
    "ppo.kl.select_coef": ("0.5", "", PPO),
    "ppo.generation.correction": ("3", "", PPO),
    "ppo.generation.engine": ("vllm", "", PPO),
    "ppo.generation.dtype": ("bfloat16", "ppo.generation.engine=vllm", PPO),
    "dpo.generation.engine": ("vllm", "stage=dpo", ("dpo",)),
    "dpo.generation.dtype": ("bfloat16", "stage=dpo dpo.generation.engine=vllm", ("dpo",)),
    "ppo.generation.ahead": ("1", "", PPO),
    "ppo.reward.url": ("http://127.0.0.1:1", "", PPO),
    "ppo.reward.name": ("judge", "ppo.reward.url=http://127.0.0.1:1", PPO),
    "ppo.reward.terms": ("[{model:default}]", "", PPO),
    "ppo.reward.ensemble_stop": ("2.0", "", PPO),
    "ppo.select_by": ("win_rate", "", PPO),
    "ppo.advantage": ("reinforce_pp", "", PPO),
    "ppo.samples_per_prompt": ("2", "", PPO),
    "ppo.grpo_scale": ("none", "ppo.advantage=grpo ppo.samples_per_prompt=2", PPO),
    "ppo.loss_mean": ("sequences", "", PPO),
    "ppo.kl.where": ("loss", "", PPO),
    "ppo.kl.estimator": ("k3", "", PPO),
    "ppo.kl.unbiased": ("false", "ppo.kl.where=loss ppo.kl.estimator=k3", PPO),
    "eval.best_of": ("[1,4]", "", EVAL),
    "eval.harness.tasks": ("[arc_easy]", "", EVAL),
    "eval.harness.few_shot": ("2", "eval.harness.tasks=[arc_easy]", EVAL),
    "eval.harness.limit": ("5", "eval.harness.tasks=[arc_easy]", EVAL),
    "eval.harness.chat_template": ("true", "eval.harness.tasks=[arc_easy]", EVAL),
    "eval.top_p": ("0.5", "", EVAL),
    "eval.top_k": ("5", "", EVAL),
    "eval.judge.names": ("[llm]", "", EVAL),
    "eval.judge.model": ("org/judge", "", EVAL),
    "eval.judge.revision": ("main", "", EVAL),
    "eval.judge.llm": ("judge", "", EVAL),
    "eval.judge.criterion": ("shorter", "", EVAL),
    "eval.judge.request": ("[seed:1]", "", EVAL),
    "eval.judge.labels": ("LABELS", "", EVAL),
    "eval.judge.pairs": ("5", "", EVAL),
    "eval.judge.question": ("helpful", "", EVAL),
    "eval.toxicity.temperature": ("0.5", "eval=toxicity", EVAL),
    "eval.toxicity.top_p": ("0.5", "eval=toxicity", EVAL),
    "eval.toxicity.top_k": ("5", "eval=toxicity", EVAL),
    "eval.reward_quality.pairs": ("5", "eval=reward_quality", EVAL),
    "eval.reward_quality.prompts": ("5", "eval=reward_quality", EVAL),
    "eval.reward_quality.best_of": ("5", "eval=reward_quality", EVAL),
}
# The run that it names counts and not the name, which tests/pipeline/test_keys.py shows.
BY_ANOTHER_WAY = {"ppo.continue_from"}


def composed(field: str, folder: Path, other: bool) -> Config:
    """Return the config with what a field needs; the field has its default or its other value."""
    value, needed, _ = OTHERS[field]
    labels = folder / "labels.jsonl"
    labels.write_text("votes\n")
    overrides = [f"output_dir={folder / 'outputs'}", *needed.split()]
    if other:
        overrides.append(f"{field}={value}")
    overrides = [override.replace("LABELS", str(labels)) for override in overrides]
    return compose(overrides, [CONF]).config


def at_neutral(config: Config, field: str) -> Config:
    """Return a copy with a field at its neutral value, whatever its default is."""
    own = copy.deepcopy(config)
    section, _, name = field.rpartition(".")
    setattr(attrgetter(section)(own), name, copy.deepcopy(NEUTRAL[field]))
    return own


def without(content: dict[str, Any], field: str) -> dict[str, Any]:
    """Return content without an entry, and without the sections that it leaves empty."""
    own = copy.deepcopy(content)
    *sections, name = field.split(".")
    path = [own]
    for section in sections:
        path.append(path[-1][section])
    del path[-1][name]
    for holder, section, held in zip(path[-2::-1], sections[::-1], path[:0:-1], strict=True):
        if not held:
            del holder[section]
    return own


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    return value.name if isinstance(value, Enum) else value


def keys_of(config: Config) -> dict[str, str]:
    return {step.stage: step.key for step in plan(config)}


def test_every_field_with_a_neutral_value_is_tried() -> None:
    """A new one belongs into `OTHERS`."""
    assert NEUTRAL.keys() == OTHERS.keys() | BY_ANOTHER_WAY


@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - BY_ANOTHER_WAY))
def test_a_neutral_value_is_hashed_as_if_the_field_did_not_exist(
    field: str, tmp_path: Path
) -> None:
    config = composed(field, tmp_path, other=True)
    value = attrgetter(field)(config)
    assert value != NEUTRAL[field]
    hashed = key_content(config)
    section, _, name = field.rpartition(".")
    held = hashed
    for part in section.split("."):
        held = held[part]
    assert held[name] == plain(value)
    # An older version had the same sections without this one entry.
    assert key_content(at_neutral(config, field)) == without(hashed, field)


@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - BY_ANOTHER_WAY))
def test_another_value_changes_the_keys_of_its_stages(field: str, tmp_path: Path) -> None:
    default, other = (composed(field, tmp_path, other=other) for other in (False, True))
    before, after = keys_of(default), keys_of(other)
    assert keys_of(at_neutral(default, field)) == before
    assert keys_of(at_neutral(other, field)) == before
    # A reward server takes the place of the reward model, whose stage is not planned then.
    common = [
        stage for stage in ("sft", "reward", "ppo", "eval") if stage in before.keys() & after.keys()
    ]
    stages = [stage for stage in OTHERS[field][2] if stage in common]
    assert [stage for stage in common if before[stage] != after[stage]] == stages
