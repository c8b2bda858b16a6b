"""`rlhf-exp` on the results of one small run."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.cli import main
from rlhf_exp.pipeline.plan import records_of
from rlhf_exp.store.run_records import Process, Records, RunRecord, Status
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.progress_bar import StageProgress
from tests.lab import artifact, run, small_config


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> Path:
    """The small run and another with a larger learning rate, in one folder."""
    import shutil

    folder = shutil.copytree(small_run, tmp_path_factory.mktemp("two") / "outputs")
    run(folder, "name=bold", "ppo.lr=0.01")
    return folder


def run_command(capsys: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--outputs", str(outputs), *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--outputs", str(outputs), *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    return found.err


def test_status(two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_command(capsys, two_runs, "status").splitlines()
    states = [line.split()[:3] for line in lines if line.startswith(("small", "bold"))]
    assert states == [["small", "done", "pipeline"], ["bold", "done", "pipeline"]]
    assert "small" not in run_command(capsys, two_runs, "status", "bold").split()
    assert "near it: small" in refused(capsys, two_runs, "status", "smal")
    assert run_command(capsys, tmp_path / "none", "status") == "no runs yet\n"


def test_status_shows_results_and_when_a_run_began(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, row = run_command(capsys, small_run, "status").splitlines()[:2]
    (state,) = json.loads(run_command(capsys, small_run, "status", "--json"))
    metrics = artifact(small_run, "ppo").manifest.metrics
    assert (state["name"], state["state"], state["progress"]) == ("small", "done", None)
    assert state["reward"] == metrics["eval/reward_mean"]
    assert state["kl"] == metrics["eval/kl_sequence"]
    (record,) = Records(small_run / "sweeps").sweep("small")
    assert (state["begun"], state["key"]) == (record.created, record.key)
    assert record.created[:16].replace("T", " ") in row
    assert state["overrides"] == list(record.overrides)
    shown = run_command(capsys, small_run, "status")
    assert "…" in shown  # the command line is long
    assert record.overrides[-1] not in shown
    for name, value in (("reward", state["reward"]), ("KL", state["kl"])):
        at = head.index(name)
        assert row[at:].split()[0] == f"{value:.4g}"


def test_status_shows_how_far_a_run_is(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"sft": artifact(run_copy, "sft").key, "ppo": "ab12", "eval": "cd34"}
    record = RunRecord("long", "pipeline", keys, status=Status.running, process=Process.current())
    Records(run_copy / "sweeps").write(record)
    store = Store(run_copy / "store")
    folder = store.staging("ppo", "ab12")
    now = [0.0]
    with StageProgress(
        "ppo", 480, ("reward/mean", "kl/sequence"), folder=folder, clock=lambda: now[0]
    ) as progress:
        now[0] = 3600.0
        progress.update(240, {"reward/mean": 1.5, "kl/sequence": 3.25, "loss": 1.0})
        capsys.readouterr()
        row = run_command(capsys, run_copy, "status", "long").splitlines()[1].split()
        (state,) = json.loads(run_command(capsys, run_copy, "status", "long", "--json"))
    assert row[:5] == ["long", "running", "ppo", "240/480", "1"]  # 1 h 00 min
    assert row[5:8] == ["h", "00", "min"]
    assert (state["reward"], state["kl"]) == (1.5, 3.25)
    told = state["progress"]
    assert (told["step"], told["steps"], told["seconds_left"]) == (240, 480, 3600.0)
    # A run that has ended is in no stage, whatever its folder still says.
    Records(run_copy / "sweeps").write(replace(record, status=Status.interrupted))
    assert "240/480" not in run_command(capsys, run_copy, "status", "long")


def test_status_of_a_policy_in_training_is_not_that_of_another(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = artifact(run_copy, "ppo")
    store = Store(run_copy / "store")
    dpo = shutil.copytree(done.path, run_copy / "store" / "dpo" / done.key)
    manifest = json.loads((dpo / "manifest.json").read_text())
    manifest |= {"stage": "dpo", "metrics": manifest["metrics"] | {"eval/kl_sequence": 7.0}}
    (dpo / "manifest.json").write_text(json.dumps(manifest))
    keys = {"dpo": done.key, "ppo": "ab12"}
    record = RunRecord("both", "pipeline", keys, status=Status.running, process=Process.current())
    Records(run_copy / "sweeps").write(record)

    def shown() -> tuple[float, float]:
        (state,) = json.loads(run_command(capsys, run_copy, "status", "both", "--json"))
        return state["reward"], state["kl"]

    assert shown() == (manifest["metrics"]["eval/reward_mean"], 7.0)
    watched = ("reward/mean", "kl/sequence")
    with StageProgress("ppo", 8, watched, folder=store.staging("ppo", "ab12")) as progress:
        progress.update(1, {"reward/mean": 1.5, "kl/sequence": 3.25})
    capsys.readouterr()
    assert shown() == (1.5, 3.25)


def test_status_as_json_has_null_for_what_diverged(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord("odd", "ppo", {"ppo": "ab13"}, objective=math.nan, status=Status.failed)
    Records(run_copy / "sweeps").write(record)
    (state,) = json.loads(run_command(capsys, run_copy, "status", "odd", "--json"))
    assert state["objective"] is None


def test_status_tells_why_a_run_failed(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = records_of(small_config(run_copy))
    error = "Traceback\n  line 3\nZeroDivisionError: [bold]division"
    keys = {"sft": "0123456789abcdef"}
    records.write(RunRecord("broken", "sft", keys, status=Status.failed, error=error))
    assert "ZeroDivisionError: [bold]division" in run_command(capsys, run_copy, "status", "broken")


def test_status_names_the_log_of_what_failed_in_a_process_of_its_own(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord("one", "sft", {"sft": "ab12"}, status=Status.failed, error="no", log="a.log")
    Records(run_copy / "sweeps").write(record)
    assert "Logs of what failed:\nab12: a.log\n" in run_command(capsys, run_copy, "status", "one")


def test_status_of_a_run_whose_process_was_killed(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Process.current()
    records = Records(run_copy / "sweeps")
    record = RunRecord("one", "sft", {"sft": "ab12"}, status=Status.running, process=own)
    records.write(record)
    assert records.sweep("one") == [record]
    assert " running " in run_command(capsys, run_copy, "status", "one")
    records.write(replace(record, process=replace(own, started="1")))
    shown = run_command(capsys, run_copy, "status", "one")
    assert " interrupted " in shown
    assert "its process was killed; the same command goes on" in shown


def test_report(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(run_command(capsys, two_runs, "report", "latest").strip())
    page = path.read_text()
    assert path.parent == two_runs / "reports"
    assert "<title>bold" in page
    assert artifact_of(two_runs, "bold", "ppo") in page
    assert "http-equiv" in page
    # From the key of one stage: with the stages it was made from, and no more.
    key = artifact_of(two_runs, "small", "reward")
    page = Path(run_command(capsys, two_runs, "report", key).strip()).read_text()
    assert artifact_of(two_runs, "small", "sft") in page
    assert artifact_of(two_runs, "small", "ppo") not in page


def artifact_of(outputs: Path, name: str, stage: str) -> str:
    return records_of(small_config(outputs)).resolve(name).keys[stage]


def test_compare(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_command(capsys, two_runs, "compare", "small", "bold")
    config = [line.split() for line in text.splitlines() if line.startswith("ppo.")]
    assert config == [["ppo.lr", "0.001", "0.01"]]
    results = [
        json.loads(
            (
                two_runs / "store" / "eval" / artifact_of(two_runs, name, "eval") / "result.json"
            ).read_text()
        )
        for name in ("small", "bold")
    ]
    scores = [[row["score_b"] for row in result["rows"]] for result in results]
    mean = sum(b - a for a, b in zip(*scores, strict=True)) / len(scores[0])
    assert "B - A over the same 8 prompts" in text
    (line,) = (line for line in text.splitlines() if line.startswith("Reward, raw"))
    assert float(line.split()[2]) == pytest.approx(mean, rel=1e-3)
    low, high = float(line.split()[3]), float(line.split()[5])
    assert low <= mean <= high
    metrics = [line.split() for line in text.splitlines() if line.startswith("sft eval/loss")]
    assert metrics[0][-1] == "+0"
    assert "The configs are the same." in run_command(capsys, two_runs, "compare", "small", "small")


def test_runs_of_different_judges_are_not_compared_by_score(
    two_runs: Path, run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(run_copy, "name=other", "reward.lr=0.01")
    text = run_command(capsys, run_copy, "compare", "small", "other")
    assert "The reward models differ" in text
    assert "Reward, raw" not in text
    assert "Toxicity" in text


def test_an_exported_model_is_the_same_model(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    assert run_command(capsys, two_runs, "export", "small", str(folder)).strip() == str(folder)
    key = artifact_of(two_runs, "small", "ppo")
    ours = AutoModelForCausalLM.from_pretrained(two_runs / "store" / "ppo" / key / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("How are you?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert not (folder / "value_head.safetensors").exists()
    assert key in (folder / "README.md").read_text()
    assert "name another one" in refused(capsys, two_runs, "export", "small", str(folder))


def test_a_damaged_model_is_not_exported(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifact(run_copy, "ppo").path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is damaged" in refused(capsys, run_copy, "export", "small", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("against", [None, "sft", "bold"])
def test_chat(
    against: str | None,
    two_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\nAnd now?\n\nHello!\n"))
    second = [] if against is None else ["--against", against]
    lines = run_command(
        capsys, two_runs, "chat", "small", *second, "--temperature", "0"
    ).splitlines()
    speakers = [line.split(">")[0] for line in lines if ">" in line]
    assert speakers == ["ppo", *([against] if against else [])] * 3
    # After an empty line the conversation begins again: the same question, the same answer.
    answers = [line for line in lines if line.startswith("ppo>")]
    assert answers[0] == answers[2]


def test_a_conversation_longer_than_the_context(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 300 + "\n"))
    assert run_command(capsys, two_runs, "chat", "small").startswith("ppo>")


def test_a_message_in_another_encoding(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.TextIOWrapper(io.BytesIO("café\n".encode("latin-1")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["--outputs", str(two_runs), "chat", "small", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("ppo>")
    assert "bytes that are no UTF-8 are read as \ufffd" in shown.err


def test_chat_with_what_is_not_there(
    two_runs: Path, run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no run 'nobody'" in refused(capsys, two_runs, "chat", "small", "--against", "nobody")
    key = artifact_of(two_runs, "small", "sft")
    message = refused(capsys, two_runs, "chat", key, "--against", "ppo")
    assert "has no ppo model, only sft" in message


def test_store_ls_and_show(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = run_command(capsys, two_runs, "store", "ls")
    for name in ("small", "bold"):
        for stage in ("sft", "reward", "ppo", "eval"):
            assert artifact_of(two_runs, name, stage)[:8] in listed
    key = artifact_of(two_runs, "bold", "ppo")
    shown = run_command(capsys, two_runs, "store", "show", key[:10])
    assert key in shown
    assert artifact_of(two_runs, "bold", "sft") in shown
    assert "no artifact of" in refused(capsys, two_runs, "store", "show", "zzz")


def test_store_rm(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = artifact(run_copy, "eval")
    run_command(capsys, run_copy, "store", "rm", "--dry-run", found.key)
    assert found.path.is_dir()
    run_command(capsys, run_copy, "store", "rm", found.key)
    assert not found.path.exists()
    assert "no artifact of" in refused(capsys, run_copy, "store", "rm", found.key)


def test_store_gc(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    kept = {stage: artifact(run_copy, stage) for stage in ("sft", "reward", "ppo", "eval")}
    (record,) = (run_copy / "sweeps" / "small").glob("*.json")
    keys = {stage: kept[stage].key for stage in ("sft", "reward")}
    content = json.loads(record.read_text()) | {"keys": keys, "stage": "reward"}
    record.write_text(json.dumps(content))
    for one in kept.values():  # last used long ago
        os.utime(one.path / "manifest.json", (1e9, 1e9))
    run_command(capsys, run_copy, "store", "gc", "--dry-run")
    assert all(one.path.is_dir() for one in kept.values())
    run_command(capsys, run_copy, "store", "gc")
    assert {stage: one.path.is_dir() for stage, one in kept.items()} == {
        "sft": True,
        "reward": True,
        "ppo": False,
        "eval": False,
    }


def test_a_run_whose_results_are_gone(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.rmtree(run_copy / "store")
    message = refused(capsys, run_copy, "report", "small")
    assert "none of the run's results is in" in message
    assert "status: done" in message
