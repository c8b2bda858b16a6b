"""What is wrong with a config, in words; `test_checks_engines.py` has the other engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.overrides import prepare
from rlhf_exp.config.problems import raise_problems
from rlhf_exp.errors import UserError


def complaints(*overrides: str, multirun: bool = False) -> list[str]:
    config = compose(prepare(overrides, {})).config
    return [str(problem) for problem in config_problems(config, multirun)]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        # PPO
        ("ppo.generation.max_new_tokens=256", "leaves no room for a prompt in ppo.seq_length=256"),
        ("ppo.seq_length=257", "ppo.seq_length=257: the model's context is 256 tokens"),
        ("ppo.batch=129", "ppo.batch=129: an iteration has only ppo.rollouts=128"),
        ("ppo.rollouts=0 ppo.batch=0", "ppo.rollouts=0: must be at least 1"),
        ("ppo.generation.temperature=0", "temperature=0.0: must be a number above 0"),
        ("ppo.generation.correction=0.5", "'0.5'; use auto, null, or a number of at least 1"),
        ("ppo.generation.ahead=2", "is 2; use 0, or 1 for one iteration ahead"),
        ("ppo.generation.ahead=1 ppo.keep_state=true", "does not go with ppo.keep_state"),
        (
            "ppo.generation.ahead=1 distributed=fsdp distributed.processes=2",
            "a whole copy of the weights in every process, which distributed=fsdp divides",
        ),
        ("ppo.generation.correction=lots", "'lots'; use auto, null, or a number"),
        ("ppo.lam=1.1", "ppo.lam=1.1: must be in [0, 1]"),
        ("eval.best_of=[1]", "eval.best_of=[1]: names numbers of answers from 1 on, each once"),
        ("eval.best_of=[0,4]", "eval.best_of=[0,4]: names numbers of answers from 1 on"),
        ("eval.best_of=[4,4]", "eval.best_of=[4,4]: names numbers of answers from 1 on"),
        ("eval.best_of=[4] eval.temperature=0", "equal answers have no best one"),
        ("stage=dpo dpo.beta=0", "dpo.beta=0.0: must be a number above 0"),
        (
            "stage=dpo dpo.label_smoothing=0.5",
            "dpo.label_smoothing=0.5: must be at least 0 and below",
        ),
        ("stage=dpo dpo.loss=ipo dpo.label_smoothing=0.1", "is of dpo.loss=sigmoid; leave it out"),
        ("stage=dpo dpo.part=3/2", "dpo.part=3/2: expected one part of how many"),
        ("stage=dpo dpo.seq_length=48", "leaves no room for a prompt in dpo.seq_length=48"),
        (
            "stage=dpo dpo.packing=true model.attention=flash_attention_2",
            "dpo.packing=true: flash attention takes no packed rows",
        ),
        ("stage=dpo dpo.lr=0", "dpo.lr=0.0: must be a number above 0"),
        ("stage=eval eval.models=[sft,dpo] dpo.batch=0", "dpo.batch=0: must be at least 1"),
        ("ppo.samples_per_prompt=3", "=3: must divide ppo.rollouts=128 into whole groups"),
        ("ppo.samples_per_prompt=0", "ppo.samples_per_prompt=0: must be at least 1"),
        ("ppo.advantage=rloo", "=1: ppo.advantage=rloo compares the responses to a prompt; use"),
        ("ppo=grpo ppo.samples_per_prompt=1", "compares the responses to a prompt; use at least 2"),
        ("ppo=grpo ppo.gamma=0.9", "ppo.gamma=0.9: ppo.advantage=grpo takes a response's reward"),
        ("ppo=rloo ppo.lam=0.9", "ppo.lam=0.9: ppo.advantage=rloo has no value function; leave it"),
        ("ppo=reinforce_pp ppo.value_trunk=own", "value_trunk=own: ppo.advantage=reinforce_pp has"),
        ("ppo=rloo ppo.grpo_scale=none", "ppo.grpo_scale=none: is of ppo.advantage=grpo"),
        ("ppo.kl.unbiased=false", "is of a penalty in the loss; leave it out, or"),
        (
            "ppo.kl.where=loss ppo.kl.unbiased=false",
            "ppo.kl.estimator=k1: k1's own gradient is 0 on average; use k2 or k3",
        ),
        ("ppo.kl.coef=0", "ppo.kl.coef=0.0: an adaptive controller cannot leave 0"),
        ("ppo.kl.stop=5", "ppo.kl.stop=5.0: must be above the target"),
        ("ppo.kl.budget=0", "ppo.kl.budget=0.0: must be a number above 0"),
        ("ppo.kl.budget=5 ppo.select=last", "ppo.kl.budget=5.0: ppo.select=last takes the last"),
        ("ppo.kl.budget=5 ppo.kl.select_coef=0.1", "with ppo.kl.budget nothing is subtracted"),
        ("ppo.reward.clip=0", "ppo.reward.clip=0.0: must be a number above 0"),
        ("ppo.reward.placement=gpu", "placement=gpu: expected shared, cpu, or a GPU by its number"),
        ("ppo.reward.placement=gpu:-1", "placement=gpu:-1: expected shared, cpu, or a GPU"),
        ("ppo.reward.placement=gpu:0", "gpu:0: the main process trains there; name a GPU that no"),
        (
            "ppo.reward.placement=cpu ppo.reward.url=http://127.0.0.1:1",
            "placement=cpu: there is no reward model to place, a reward server scores; use shared",
        ),
        ("ppo.reward.url=127.0.0.1:8480", "needs an address such as http://127.0.0.1:8480"),
        ("ppo.reward.url=http://a:b", "url=http://a:b: needs an address"),
        (
            "ppo.reward.url=http://me:pw@a",
            "must not hold a password or key, which would be stored; see ppo.reward.key_env",
        ),
        ("ppo.reward.url=http://a ppo.reward.key_env=NO_SUCH_KEY", "no such environment variable"),
        ("ppo.reward.url=http://a ppo.reward.name=''", "ppo.reward.name=: must not be empty"),
        ("ppo.reward.url=http://a ppo.reward.request_size=0", "request_size=0: must be at least 1"),
        ("ppo.reward.url=http://a ppo.reward.timeout_s=0", "timeout_s=0.0: must be a number above"),
        ("ppo.reward.url=http://a ppo.reward.retries=-1", "retries=-1: must be at least 0"),
        ("ppo.reward.name=x", "ppo.reward.name=x: is of a reward server; set ppo.reward.url too"),
        (
            "ppo.reward.url=http://a ppo.reward.function=examples/my_reward.py:score",
            "url=http://a: ppo.reward.function is set too; one of them scores",
        ),
        (
            "ppo.reward.url=http://a ppo.value_init=reward ppo.value_trunk=own",
            "with a reward server there is no reward model; use value_init=small",
        ),
        (
            "ppo.continue_from=first ppo.schedule=linear",
            "ppo.schedule=linear: its learning rate depends on ppo.steps, so a longer run is",
        ),
        (
            "ppo.continue_from=first ppo.use=second",
            "ppo.continue_from=first: ppo.use is set too, and nothing would train",
        ),
        ("ppo.steps=0", "ppo.steps=0: must be at least 1"),
        # every training stage
        ("ppo.train_blocks=5", "ppo.train_blocks=5: the model has 4 blocks"),
        ("sft.train_blocks=0", "sft.train_blocks=0: must be at least 1"),
        ("reward.train_blocks=2 reward.lora.rank=4", "choose one: reward.train_blocks, or LoRA"),
        ("sft.lr=0", "sft.lr=0.0: must be a number above 0"),
        ("sft.lr=nan", "sft.lr=nan: must be a number above 0"),
        ("sft.lr=inf", "sft.lr=inf: must be a number above 0"),
        ("sft.betas=[0.9]", "sft.betas=[0.9]: needs two numbers in [0, 1)"),
        ("sft.betas=[0.9,1]", "sft.betas=[0.9,1.0]: needs two numbers in [0, 1)"),
        ("sft.micro_batch=33", "sft.micro_batch=33: is more than sft.batch, 32 rows"),
        ("reward.eval_every=0", "reward.eval_every=0: must be at least 1"),
        ("sft.epochs=null", "sft.steps=null: set sft.steps or sft.epochs"),
        ("reward.steps=5", "reward.steps=5: reward.epochs is set too, to 1; set one"),
        ("sft.seq_length=1", "sft.seq_length=1: must be at least 2"),
        ("sft.weight_decay=-1", "sft.weight_decay=-1.0: must be at least 0"),
        # reward model
        ("reward.init=base", "reward.init=base: a model from scratch has no base weights"),
        # model
        ("model.architecture.heads=3", "architecture.width=128: must divide by the 3 heads"),
        (
            "model.architecture.type=gpt_neox model.architecture.kv_heads=2",
            "architecture.kv_heads=2: gpt_neox has none",
        ),
        ("model.architecture.vocabulary=257", "vocabulary=257: must be at least 258"),
        ("model.revision=main", "model.revision=main: a model from scratch has no revision"),
        ("model.path=./nowhere", "model.path=./nowhere: there is no folder /"),
        # data
        ("data.source=hub", "data.path=null: data.source=hub needs a hub id"),
        ("data.path=a/b", "data.path=a/b: data.source=toy reads no hub id"),
        ("data.source=jsonl", "data.preferences=null: data.source=jsonl needs a .jsonl"),
        ("data.preferences=x.jsonl", "data.preferences=x.jsonl: files are read with data=hh_local"),
        ("data.columns.prompt=q", "data.columns.prompt=q: data.source=toy has no columns of yours"),
        ("data.test_fraction=1", "data.test_fraction=1.0: must be in [0, 1)"),
        ("data.validation_fraction=-0.1", "data.validation_fraction=-0.1: must be in [0, 1)"),
        ("data.test_fraction=0.95", "data.test_fraction=0.95: leaves nothing to train on"),
        ("data.toy.label_noise=0.5", "data.toy.label_noise=0.5: must be in [0, 0.5)"),
        (
            "data.arithmetic.right=1.1 data=arithmetic",
            "data.arithmetic.right=1.1: must be in [0, 1]",
        ),
        (
            "data.arithmetic.numbers=1 data=arithmetic",
            "data.arithmetic.numbers=1: must be at least 2",
        ),
        ("data.limit=0", "data.limit=0: must be at least 1"),
        ("data.format=chat_template", "a model from scratch has no chat template"),
        # evaluation
        ("eval.tie_low=0.6", "eval.tie_low=0.6: needs 0 <= tie_low < tie_high <= 1"),
        ("eval=none stage=eval", "eval.suite=none: stage=eval has nothing to do"),
        ("eval.temperature=-1", "eval.temperature=-1.0: must be at least 0"),
        ("eval.top_p=0", "eval.top_p=0.0: must be above 0 and at most 1"),
        ("eval.top_p=1.1", "eval.top_p=1.1: must be above 0 and at most 1"),
        ("eval.top_k=-1", "eval.top_k=-1: must be at least 0"),
        ("eval.max_new_tokens=256", "eval.max_new_tokens=256: leaves no room"),
        (
            "eval.max_new_tokens=130 ppo.seq_length=128",
            "eval.max_new_tokens=130: leaves no room for a prompt in ppo.seq_length=128",
        ),
        # the rest
        ("name=a/b", "name=a/b: use letters, digits"),
        ("name=latest", "name=latest: `latest` always means the latest run"),
        ("rerun=ppa", "rerun=[ppa]: the stages are sft, reward, dpo, best_of, ppo, eval"),
        ("seed=-1 sft.seed=0 reward.seed=0 ppo.seed=0", "seed=-1: must be at least 0"),
        ("output_dir=launch.py", "launch.py is not a folder"),
        ("distributed.processes=2", "distributed.processes=2: distributed.strategy=single has one"),
        ("distributed.offload=true plan=true", "strategy=single cannot offload"),
        ("distributed=zero3 distributed.shard_over=node plan=true", "node is for fsdp"),
        ("tracking.project=''", "tracking.project=: must not be empty"),
    ],
)
def test_one_mistake_one_complaint(
    overrides: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    messages = complaints(*overrides.split())
    assert any(complaint in line for line in messages), messages
    if "rollouts" not in overrides:
        assert len(messages) == 1, messages


def test_all_problems_are_reported_together() -> None:
    config = compose(["ppo.lr=0", "sft.epochs=null", "data.limit=0"]).config
    with pytest.raises(UserError) as caught:
        raise_problems(config_problems(config))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the config:"
    assert sorted(line.split("=")[0].strip() for line in lines[1:]) == [
        "data.limit",
        "ppo.lr",
        "sft.steps",
    ]


def test_stages_that_are_not_needed_are_not_looked_at() -> None:
    assert complaints("stage=sft", "ppo.lr=0", "reward.lr=0", "eval.tie_low=1") == []
    assert complaints("stage=ppo", "reward.use=other", "reward.lr=0") == []


def test_a_multirun_needs_a_name() -> None:
    (messages,) = complaints(multirun=True)
    assert messages.startswith("name=null: a multirun needs a name")
    assert complaints("name=kl", multirun=True) == []


def test_what_this_machine_lacks_can_be_planned() -> None:
    assert complaints("distributed=zero3_offload", "eval=full", "plan=true") == []


def test_files_of_the_data_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (messages,) = complaints(
        "data=hh_local", "data.preferences=pairs.jsonl", "data.test=held.jsonl"
    )
    assert messages == f"data.test=held.jsonl: there is no file {tmp_path / 'held.jsonl'}."


def test_a_local_model_counts_as_it_is(tmp_path: Path) -> None:
    path = f"model.path={tmp_path}"
    (messages,) = complaints(path)
    assert "holds no model: it has no config.json" in messages
    shape = {"n_layer": 2, "n_positions": 300}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    # The architecture of `tiny` (4 blocks, 256 tokens) says nothing about this folder.
    assert complaints(path, "ppo.train_blocks=2", "ppo.seq_length=300") == []
    messages = complaints(path, "ppo.train_blocks=3", "ppo.seq_length=301", "model.revision=x")
    assert len(messages) == 3
    assert any("the model has 2 blocks" in line for line in messages)
    assert any("the model's context is 300 tokens" in line for line in messages)


def test_a_password_or_key_would_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "my-key-0123")
    key = "ppo.reward.key_env=MY_KEY"
    assert complaints("ppo.reward.url=http://127.0.0.1:1", key) == []
    for text in ("http://a/?api_key=x", "http://a/my-key-0123"):
        (complaint,) = complaints(f"ppo.reward.url='{text}'", key)
        assert "must not hold a password or key, which would be stored; see ppo.rew" in complaint
    (complaint,) = complaints("ppo.reward.url=http://a", key, "tracking.tags=[a,my-key-0123]")
    assert complaint.endswith("must not hold a password or key, which would be stored.")
    judge = ["eval.judge.names=[llm]", "eval.judge.llm=m", "eval.judge.url=http://a"]
    assert complaints(*judge, "eval.judge.request=['max_tokens:5']") == []
    (complaint,) = complaints(*judge, "eval.judge.request=['api_key:x']")
    assert complaint.endswith("which would be stored; see eval.judge.key_env.")


def test_a_value_branch_needs_a_frozen_trunk() -> None:
    assert complaints("ppo.value_trunk=branch", "ppo.train_blocks=2") == []
    (whole,) = complaints("ppo.value_trunk=branch", "ppo.train_blocks=null")
    assert "a branch needs a frozen trunk" in whole
    adapter = ["ppo.value_trunk=branch", "ppo.train_blocks=2", "ppo.lora.rank=4"]
    assert any("ppo.value_trunk" in one for one in complaints(*adapter))
    (init,) = complaints("ppo.value_trunk=branch", "ppo.train_blocks=2", "ppo.value_init=reward")
    assert "use value_trunk=own or value_init=small" in init


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("reward.py:score", None),
        ("reward.py:scores", "has no function scores; its functions are score, other, strict"),
        (
            "reward.py:other",
            "it takes (x); expected (prompts, responses) or (prompts, responses, rows",
        ),
        ("reward.py:strict", "it takes (a, b, weight); expected (prompts, responses)"),
        ("reward.py", "expected a function of a file or module"),
        ("missing.py:score", "there is no file /"),
        ("broken.py:score", "is not valid Python"),
        ("empty.py:score", "has no function score; it has no function"),
    ],
)
def test_a_users_reward_function(
    value: str, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Never imported: it would raise.
    source = "raise SystemExit\ndef score(prompts, responses, rows=None, /, *, weight=1): ...\n"
    source += "def other(x): ...\ndef strict(a, b, *, weight): ...\n"
    (tmp_path / "reward.py").write_text(source)
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "empty.py").write_text("score = 1\n")
    messages = complaints(f"ppo.reward.function={value}")
    if complaint is None:
        assert messages == []
        (found_init,) = complaints(f"ppo.reward.function={value}", "ppo.value_init=reward")
        assert "there is no reward model; use value_init=small" in found_init
    else:
        assert len(messages) == 1
        assert complaint in messages[0]
