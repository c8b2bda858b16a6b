from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.experiment import CachePolicy, Config, EngineName, StageName
from rlhf_exp.config.training import RewardInit, ValueInit
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.inputs import StartedNote, weights_digest
from rlhf_exp.pipeline.plan import (
    Step,
    StepState,
    plan,
    records_of,
    refuse_changed,
    stage_code,
    stages_of,
    store_of,
)
from rlhf_exp.pipeline.stage_graph import module_of
from rlhf_exp.store.run_records import RunRecord
from tests.lab import artifact, edit_manifest, small_config


def states(steps: list[Step]) -> list[str]:
    return [f"{step.stage} {step.state.name}" for step in steps]


def by_stage(config: Config) -> dict[str, Step]:
    return {step.stage: step for step in plan(config)}


@pytest.fixture
def config(small_run: Path) -> Config:
    return small_config(small_run)


def test_nothing_is_there_yet_and_a_plan_leaves_it_so(tmp_path: Path) -> None:
    steps = plan(small_config(tmp_path / "outputs"))
    assert states(steps) == ["sft run", "reward run", "ppo run", "eval run"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_made_again(config: Config) -> None:
    steps = plan(config)
    assert states(steps) == ["sft cached", "reward cached", "ppo cached", "eval cached"]
    assert not any(step.needs_work for step in steps)


def test_a_changed_stage_runs_with_those_after_it(small_run: Path) -> None:
    steps = plan(small_config(small_run, "reward.lr=0.5"))
    assert states(steps) == ["sft cached", "reward run", "ppo run", "eval run"]


def test_a_rerun_takes_those_after_it_along(small_run: Path) -> None:
    steps = plan(small_config(small_run, "rerun=[ppo]"))
    assert states(steps) == ["sft cached", "reward cached", "ppo run", "eval run"]
    assert [step.redo for step in steps] == [False, False, True, True]


def test_interrupted_work_is_resumed(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    step = by_stage(config)["sft"]
    begin(config, step)
    assert states(plan(config)) == ["sft resume", "reward run", "ppo run", "eval run"]


def begin(
    config: Config,
    step: Step,
    code: dict[str, str] | None = None,
    inputs: dict[str, str] | None = None,
    replaces: str | None = None,
) -> None:
    folder = store_of(config).staging(step.stage, step.key)
    StartedNote(code or step.code, inputs or {}, replaces).write(folder)
    (folder / "work").write_text("half done")


def test_work_begun_by_other_code_stops_the_plan(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    step = by_stage(config)["sft"]
    begin(config, step, {**step.code, "rlhf_exp/algo/losses.py": "other"})
    steps = plan(config)
    assert states(steps)[0] == "sft changed"
    assert steps[0].files == ("rlhf_exp/algo/losses.py",)
    with pytest.raises(UserError, match=r"(?s)sft .*losses\.py.*rerun=\[sft\].*cache=trust"):
        refuse_changed(steps)
    config.cache = CachePolicy.trust
    assert states(plan(config))[0] == "sft resume"
    config.cache, config.rerun = CachePolicy.strict, ["sft"]
    assert states(plan(config))[0] == "sft run"


def test_work_begun_from_other_weights_begins_again(run_copy: Path) -> None:
    config = small_config(run_copy, "reward.lr=0.5")
    step, sft = by_stage(config)["reward"], artifact(run_copy, "sft")
    begin(config, step, inputs={"sft": weights_digest(sft)})
    assert states(plan(config))[1] == "reward resume"
    begin(config, step, inputs={"sft": "other"})
    assert states(plan(config))[1] == "reward run"


def test_work_that_replaces_another_result_begins_again(run_copy: Path) -> None:
    config = small_config(run_copy, "rerun=[ppo]")
    step = by_stage(config)["ppo"]
    begin(config, step, replaces=artifact(run_copy, "ppo").manifest.created)
    assert states(plan(config))[2] == "ppo resume"
    begin(config, step, replaces="2020-01-01")
    assert states(plan(config))[2] == "ppo run"
    # Without `rerun` the result in the store is as good as ever.
    assert states(plan(small_config(run_copy)))[2] == "ppo cached"


def test_results_of_parents_made_anew_stop_the_plan(run_copy: Path) -> None:
    found = artifact(run_copy, "sft")
    files = json.loads((found.path / "manifest.json").read_text())["files"]
    files["model/model.safetensors"]["sha256"] = "0" * 64
    edit_manifest(found, files=files)
    steps = plan(small_config(run_copy))
    # All that started from these weights, the evaluation included.
    assert states(steps) == ["sft cached", "reward changed", "ppo changed", "eval changed"]
    assert steps[1].files == ("sft (made anew)",)


def test_results_by_other_code_stop_the_plan(run_copy: Path) -> None:
    found = artifact(run_copy, "reward")
    code = {**found.manifest.code, "rlhf_exp/algo/losses.py": "other", "rlhf_exp/gone.py": "x"}
    edit_manifest(found, code=code)
    steps = plan(small_config(run_copy))
    assert states(steps) == ["sft cached", "reward changed", "ppo cached", "eval cached"]
    assert steps[1].files == ("rlhf_exp/algo/losses.py", "rlhf_exp/gone.py")
    trusted = plan(small_config(run_copy, "cache=trust"))
    assert states(trusted)[1] == "reward cached"
    assert trusted[1].files == steps[1].files


def test_what_says_things_and_computes_nothing_is_not_code() -> None:
    listed = stage_code("ppo")
    assert "rlhf_exp/algo/losses.py" in listed
    assert "rlhf_exp/training/ppo.py" in listed
    assert not [path for path in listed if path.startswith(("rlhf_exp/config", "rlhf_exp/store"))]
    assert "rlhf_exp/algo/advantages.py" not in stage_code("sft")


def test_each_engine_has_code_of_its_own() -> None:
    native, trlx = stage_code("ppo"), stage_code("trlx_ppo")
    trl = stage_code("trl_dpo")
    engines = ("rlhf_exp/engines", "rlhf_exp/trl")
    assert not [path for path in (*native, *stage_code("dpo")) if path.startswith(engines)]
    # What another interpreter runs counts too.
    shared = {f"rlhf_exp/engines/worker/{name}.py" for name in ("__main__", "engine_line")}
    assert shared | {"rlhf_exp/trlx/worker/trlx_trainer.py"} <= trlx.keys()
    assert shared | {"rlhf_exp/trl/worker/trl_pairs.py"} <= trl.keys()
    assert not [path for path in trl if path.startswith("rlhf_exp/trlx")]
    config = Config()

    def modules(engine: EngineName) -> list[str]:
        config.engine.name = engine
        return [module_of(config, stage) for stage in ("sft", "ppo", "dpo")]

    assert modules(EngineName.native) == ["sft", "ppo", "dpo"]
    assert modules(EngineName.trlx) == ["sft", "trlx_ppo", "dpo"]
    assert modules(EngineName.trl) == ["sft", "trl_ppo", "trl_dpo"]


def test_each_stage_needs_those_before_it() -> None:
    config = Config()
    found = {}
    for stage in StageName:
        config.stage = stage
        found[stage.name] = stages_of(config)
    whole = ("sft", "reward", "ppo", "eval")
    assert found == {
        "sft": ("sft",),
        "reward": ("sft", "reward"),
        "dpo": ("sft", "dpo"),
        "best_of": ("sft", "reward", "best_of"),
        "ppo": ("sft", "reward", "ppo"),
        "eval": whole,
        "pipeline": whole,
    }
    config.stage, config.eval.suite = StageName.pipeline, Suite.none
    assert stages_of(config) == ("sft", "reward", "ppo")
    config.stage, config.reward.init = StageName.reward, RewardInit.base
    assert stages_of(config) == ("reward",)


def test_a_reward_function_needs_no_reward_model_unless_the_values_start_from_it() -> None:
    config = Config()
    config.ppo.reward.function = "mine.py:score"
    assert stages_of(config) == ("sft", "ppo", "eval")
    config.ppo.value_init = ValueInit.reward
    assert stages_of(config) == ("sft", "reward", "ppo", "eval")


def test_a_model_folder_is_given_by_its_content(small_run: Path, tmp_path: Path) -> None:
    model = artifact(small_run, "sft").path / "model"
    trained = by_stage(small_config(small_run))
    given = by_stage(small_config(small_run, f"sft.use={model}"))
    assert (given["sft"].state, given["sft"].model) == (StepState.given, str(model))
    # Training it and being given it are different things, as far as a key can tell.
    assert given["sft"].key != trained["sft"].key
    assert states(list(given.values()))[1:] == ["reward run", "ppo run", "eval run"]
    copied = shutil.copytree(model, tmp_path / "elsewhere")
    again = by_stage(small_config(small_run, f"sft.use={copied}"))
    assert {name: step.key for name, step in again.items()} == {
        name: step.key for name, step in given.items()
    }


@pytest.mark.parametrize("how", ["folder", "name", "key", "stage and key"])
def test_a_result_is_given_as_itself(how: str, small_run: Path) -> None:
    found = artifact(small_run, "sft")
    use = {
        "folder": str(found.path),
        "name": "small",
        "key": found.key[:10],
        "stage and key": f"sft/{found.key[:10]}",
    }[how]
    steps = by_stage(small_config(small_run, f"sft.use={use}"))
    assert steps["sft"].state == StepState.given
    assert steps["sft"].model == str(found.path / "model")
    # What is built on it is what the pipeline would build.
    trained = by_stage(small_config(small_run))
    assert {name: step.key for name, step in steps.items()} == {
        name: step.key for name, step in trained.items()
    }
    assert steps["ppo"].state == StepState.cached


def test_a_hub_id_is_given_by_its_name(small_run: Path) -> None:
    steps = by_stage(small_config(small_run, "sft.use=somebody/model"))
    assert (steps["sft"].state, steps["sft"].model) == (StepState.given, "somebody/model")
    other = by_stage(small_config(small_run, "sft.use=somebody/other"))
    assert other["sft"].key != steps["sft"].key


def test_mistakes_in_use_are_named(run_copy: Path) -> None:
    def message(override: str) -> str:
        with pytest.raises(UserError) as caught:
            plan(small_config(run_copy, override))
        return str(caught.value)

    assert "sft.use=smal: no such folder, run or key" in message("sft.use=smal")
    assert "small" in message("sft.use=smal"), "near names are listed"
    records = records_of(small_config(run_copy))
    records.write(RunRecord("other", "sft", {"sft": artifact(run_copy, "sft").key}))
    assert "ppo.use=other: that run has no ppo, only sft" in message("ppo.use=other")
    records.write(RunRecord("lost", "sft", {"sft": "0123456789abcdef"}))
    expected = "sft.use=lost: its sft 0123456789abcdef is no longer in the store"
    assert expected in message("sft.use=lost")
    folder = artifact(run_copy, "eval").path
    assert "has no model" in message(f"ppo.use={folder}")


def test_a_plan_does_not_change_its_config(config: Config) -> None:
    before = copy.deepcopy(config)
    plan(config)
    assert config == before
