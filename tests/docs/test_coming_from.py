"""The page that translates arguments of TRL and trlx: none is forgotten, and our keys exist."""

from __future__ import annotations

import re

import pytest

from rlhf_exp.config.overrides import override_problems
from rlhf_exp.config.schema_keys import all_keys, read_groups
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "how-to" / "coming-from-trl.md").read_text(encoding="utf-8")
_TRL, _TRLX = PAGE.split("## trlx's `TRLConfig`")
_KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)(=[^`\s]+)?((?: [a-z_.]+=[^`\s]+)*)`")

# The fields of trl.experimental.ppo.PPOConfig in TRL 1.12.0, but for those of TrainingArguments.
PPO_CONFIG = """learning_rate dataset_num_proc num_mini_batches total_episodes
local_rollout_forward_batch_size num_sample_generations response_length stop_token stop_token_id
temperature missing_eos_penalty sft_model_path world_size num_total_batches micro_batch_size
local_batch_size batch_size local_mini_batch_size mini_batch_size push_to_hub reward_model_path
model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange
vf_coef cliprange_value gamma lam ds3_gather_for_generation"""
# The fields of trlx's TRLConfig and PPOConfig at 3340c2f, but for the names of classes and folders.
TRL_CONFIG = """model.model_path model.model_arch_type model.num_layers_unfrozen model.peft_config
tokenizer.tokenizer_path tokenizer.truncation_side optimizer.name optimizer.kwargs scheduler.name
scheduler.kwargs train.total_steps train.seq_length train.epochs train.batch_size
train.checkpoint_interval train.eval_interval train.project_name train.run_name train.entity_name
train.group_name train.checkpoint_dir train.rollout_logging_dir train.save_best
train.save_optimizer train.resume_from_checkpoint train.tracker train.tags train.seed
train.minibatch_size method.ppo_epochs method.num_rollouts method.chunk_size method.init_kl_coef
method.target method.horizon method.gamma method.lam method.cliprange method.cliprange_value
method.vf_coef method.scale_reward method.ref_mean method.ref_std method.cliprange_reward
method.gen_kwargs method.gen_experience_kwargs method.num_value_layers_unfrozen"""


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize(("part", "names"), [(_TRL, PPO_CONFIG), (_TRLX, TRL_CONFIG)])
def test_no_argument_of_theirs_is_forgotten(part: str, names: str) -> None:
    theirs = " ".join(row[0] for row in _rows(part))
    assert [name for name in names.split() if f"`{name}`" not in theirs] == []


def test_each_key_of_ours_exists() -> None:
    known, groups = all_keys(), read_groups()
    checked = 0
    for row in _rows(PAGE):
        for name, value, further in _KEY.findall(row[1]):
            overrides = [f"{name}{value}", *further.split()] if value else []
            if "." not in name and name not in known and name not in groups:
                continue  # `none`, or one of several values
            checked += 1
            assert name in known or name in groups, f"{name} in the row of {row[0]}"
            assert override_problems(overrides, groups) == [], overrides
    assert checked > 70
