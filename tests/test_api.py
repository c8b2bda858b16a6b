"""The Python interface: results as a user of a notebook reads them, and errors as exceptions."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

import rlhf_exp
from rlhf_exp.errors import JobsFailed, UserError
from tests.lab import SMALL, artifact


def test_importing_it_loads_nothing() -> None:
    program = (
        "import rlhf_exp, sys; heavy = {'torch', 'hydra', 'pandas'}\n"
        "print(*(one for one in sys.modules if one in heavy or one.startswith('rlhf_exp.')))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "\n")
    assert {"run", "compose", "Run", "Sweep"} <= set(dir(rlhf_exp))
    with pytest.raises(AttributeError, match="no attribute 'Runs'"):
        rlhf_exp.Runs  # noqa: B018


def test_a_run_is_what_the_command_line_runs(run_copy: Path, tmp_path: Path) -> None:
    """Everything is in the store: nothing trains again. The process is as it was afterwards."""
    argv, hooks = sys.argv, (sys.excepthook, logging.getLogRecordFactory())
    handlers = list(logging.getLogger().handlers)
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        mine = GlobalHydra.instance().hydra
        run = rlhf_exp.run([*SMALL, "name=mine"], outputs=run_copy)
        assert GlobalHydra.instance().hydra is mine
    assert isinstance(run, rlhf_exp.Run)
    assert (run.name, run.status, run.overrides[-2]) == ("mine", "done", "name=mine")
    assert run.key == artifact(run_copy, "eval").key
    assert repr(run) == f"<Run mine/{run.key}: done>"
    assert sys.argv is argv
    assert (sys.excepthook, logging.getLogRecordFactory()) == hooks
    assert logging.getLogger().handlers == handlers


def test_a_multirun_is_a_sweep(run_copy: Path) -> None:
    sweep = rlhf_exp.run(
        ["-m", *SMALL, "name=pair", "stage=sft", "ppo.lr=1e-4,3e-4"], outputs=run_copy
    )
    assert isinstance(sweep, rlhf_exp.Sweep)
    # The learning rate of PPO is no part of SFT: both points are the same run.
    assert repr(sweep) == "<Sweep pair: 1 of 1 runs done>"
    assert [run.key for run in sweep.runs] == [artifact(run_copy, "sft").key]


def test_what_is_not_run_returns_nothing(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rlhf_exp.run([*SMALL, "plan=true"], outputs=run_copy) is None
    assert rlhf_exp.run([*SMALL, "--cfg", "job", "-p", "sft.lr"], outputs=run_copy) is None
    assert "0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo.lrr=1", "sft.stepz=2"], "(?s)ppo.lrr=1: there is no such key.*sft.stepz=2"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--help"], "is for the command line: rlhf-exp run --help"),
        ("experiment=smoke", r"expected a list of texts, such as \['experiment=smoke'\]"),
        (["experiment=smoke", "seed=0,1"], "seed=0,1"),
        (["data.preferences=nowhere.jsonl", "data=hh_local"], "nowhere.jsonl"),
    ],
)
def test_errors_are_exceptions(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rlhf_exp.run(arguments, outputs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_failed_points_of_a_multirun_are_an_exception(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def score(prompts, responses):\n    raise RuntimeError('no score today')\n")
    given = [*SMALL, "name=lost", "stage=ppo", f"ppo.reward.function={broken}:score"]
    with pytest.raises(JobsFailed):
        rlhf_exp.run(["-m", *given], outputs=tmp_path / "outputs")
    table = rlhf_exp.Sweep("lost", tmp_path / "outputs").table()
    assert table["status"].tolist() == ["failed"]
    assert "no score today" in table["error"][0]


def test_composing() -> None:
    config = rlhf_exp.compose(["experiment=smoke", "ppo.lr=0.25"])
    assert (config.ppo.lr, config.name) == (0.25, "smoke")
    with pytest.raises(UserError, match="2 configs; compose one at a time"):
        rlhf_exp.compose(["experiment=smoke", "ppo.lr=1,2"])
    with pytest.raises(UserError, match=r"ppo\.batch=0: must be at least 1"):
        rlhf_exp.compose(["ppo.batch=0"])


def test_a_config_folder_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n# Mine.\ndefaults:\n  - smoke\nname: folder\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert rlhf_exp.compose(["experiment=mine"], config_dir=tmp_path).name == "folder"


def test_metrics(small_run: Path) -> None:
    run = rlhf_exp.Run("small", small_run)
    lines = (artifact(small_run, "ppo").path / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    table = run.metrics("ppo")
    assert set(table["stage"]) == {"ppo"}
    assert table["global_step"].tolist() == sorted({row["global_step"] for row in logged})
    last = [row["loss/policy"] for row in logged if "loss/policy" in row][-1]
    assert table["loss/policy"].dropna().iloc[-1] == last
    every = run.metrics()
    assert list(dict.fromkeys(every["stage"])) == ["sft", "reward", "ppo"]
    assert list(every.columns[:2]) == ["stage", "global_step"]
    with pytest.raises(UserError, match="trains no 'eval', only sft, reward, ppo"):
        run.metrics("eval")


def test_samples_config_and_results(small_run: Path) -> None:
    run = rlhf_exp.Run("small", small_run)
    samples = run.samples()
    found = artifact(small_run, "eval")
    lines = (found.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert samples["text"].tolist() == [json.loads(line)["text"] for line in lines]
    side_by_side = samples.pivot(index="row", columns="model", values="text")
    assert side_by_side.shape == (8, 2)  # eval.prompts=8, SFT and PPO
    assert run.config.eval.prompts == 8
    assert (
        run.results["ppo published_step"]
        == artifact(small_run, "ppo").manifest.metrics["published_step"]
    )
    assert run.folders["ppo"] == artifact(small_run, "ppo").path
    assert run.report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_models(run_copy: Path) -> None:
    run = rlhf_exp.Run("small", run_copy)
    text = run.tokenizer()("How do I bake bread?", return_tensors="pt")
    logits = run.model()(**text).logits
    assert (
        not logits.equal(run.model("sft")(**text).logits) or run.results["ppo published_step"] == 0
    )
    with pytest.raises(UserError, match="has no reward model, only sft, ppo"):
        run.model("reward")
    weights = artifact(run_copy, "ppo").path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run.model()


def test_names(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run 'smal' .*names near it: small"):
        rlhf_exp.Run("smal", small_run)
    with pytest.raises(UserError, match="no run is recorded yet"):
        rlhf_exp.Sweep("small", tmp_path)
    assert rlhf_exp.Run(outputs=small_run).name == "small"


def test_a_sweeps_table_has_numbers(small_run: Path) -> None:
    table = rlhf_exp.Sweep("small", small_run).table()
    (row,) = table.to_dict("records")
    assert (
        row["eval eval/reward/b"] == artifact(small_run, "eval").manifest.metrics["eval/reward/b"]
    )
    assert (row["status"], row["error"]) == ("done", "")
