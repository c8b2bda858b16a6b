from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline import hub
from rlhf_exp.pipeline.hub import (
    Need,
    Pin,
    Pins,
    check_cached,
    check_reachable,
    missing,
    needs,
    pinned,
)
from rlhf_exp.pipeline.inputs import ResolvedModel
from rlhf_exp.pipeline.plan import Step, StepState, plan
from tests.lab import ROOT
from tests.pipeline.stand_in_hub import COMMIT, stand_in_hub

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickles"}
MODEL = Need("model.path", "model", "org/small", None)


def cached(home: Path, name: str, content: bytes) -> Path:
    """Put a large file into a cache of the hub, as `huggingface_hub` lays it out; return it."""
    folder = home / "models--org--small"
    digest = hashlib.sha256(content).hexdigest()
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs" / digest).write_bytes(content)
    path = folder / "snapshots" / COMMIT / name
    path.symlink_to(Path("../../blobs") / digest)
    return path


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_damaged_file_of_the_hubs_cache_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    check_cached("org/small", revision)  # not there yet
    path = cached(tmp_path, "model.safetensors", b"weights of a model")
    check_cached("org/small", revision)
    path.resolve().write_bytes(b"weights of a modem")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged.*Remove .*/blobs/"):
        check_cached("org/small", revision)


def fetch(home: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "rlhf_exp.cli", "fetch", *arguments]
    return subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, check=False
    )


def absent_with(home: Path, output_dir: Path) -> str:
    """Return what a machine with that cache lacks, in a process that reads its settings anew."""
    program = f"""
from pathlib import Path
from rlhf_exp.pipeline.hub import Need, missing
need = Need("model.path", "model", "org/small", None)
print(missing(Path({str(output_dir)!r}), [need]))
"""
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_model_is_fetched_pinned_and_then_there(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    arguments = ["model.path=org/small", f"output_dir={outputs}"]
    with stand_in_hub({"org/small": FILES}) as (address, asked):
        ended = fetch(tmp_path, address, *arguments)
        assert ended.returncode == 0, ended.stderr
        assert f"model org/small (model.path): revision {COMMIT}, 2 files" in ended.stdout
        assert not any("pytorch_model.bin" in line for line in asked), "pickles are not wanted"
    pin = Pins(outputs).get(MODEL)
    assert pin == Pin(COMMIT, ["config.json", "model.safetensors"])
    assert absent_with(tmp_path, outputs) == "[]"
    assert "org/small" in absent_with(tmp_path / "elsewhere", outputs)
    (cached,) = tmp_path.glob("hub/models--org--small/snapshots/*/model.safetensors")
    cached.unlink()
    assert "org/small" in absent_with(tmp_path, outputs)


def test_pickled_weights_are_fetched_where_there_are_no_others(tmp_path: Path) -> None:
    program = b"cos\nsystem\n(S'touch trap'\ntR."  # unpickled, it would make a file
    files = {"hf_ckpt.pt": program, "training_args.bin": b"", "README.md": b"", "x.msgpack": b""}
    overrides = ["reward.use=org/judge@main", "reward.trunk=org/trunk", "stage=ppo"]
    with stand_in_hub({"org/judge": files, "org/trunk": {"config.json": b"{}"}}) as (address, _):
        ended = fetch(tmp_path, address, "experiment=smoke", *overrides, f"output_dir={tmp_path}/o")
    assert ended.returncode == 0, ended.stderr
    pins = Pins(tmp_path / "o")
    judge = pins.get(Need("reward.use", "model", "org/judge", "main"))
    assert judge == Pin(COMMIT, ["hf_ckpt.pt"])
    assert pins.get(Need("reward.trunk", "model", "org/trunk", None)) == Pin(
        COMMIT, ["config.json"]
    )
    assert not list(tmp_path.rglob("trap"))


def test_what_the_hub_does_not_have(tmp_path: Path) -> None:
    with stand_in_hub({}) as (address, _):
        ended = fetch(tmp_path, address, "model.path=org/small", f"output_dir={tmp_path}/outputs")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: model org/small (model.path): cannot be fetched (")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "outputs" / "pins.json").exists()


def test_nothing_to_fetch(tmp_path: Path) -> None:
    ended = fetch(tmp_path, "http://127.0.0.1:9", "experiment=smoke")
    assert (ended.returncode, ended.stdout) == (0, "nothing of this run comes from the hub\n")


def test_what_a_run_needs() -> None:
    config = compose(["experiment=hh_gptj_6b"]).config
    given = Step("reward", "k", StepState.given, model="org/judge")
    assert [str(need) for need in needs(config, [given])] == [
        "model EleutherAI/gpt-j-6b (model.path)",
        "dataset Dahoas/rm-static (data.path)",
        "model org/judge (reward.use)",
    ]


def test_a_judge_from_the_hub_is_fetched_and_pinned(tmp_path: Path) -> None:
    asked = ["eval.judge.names=[model]", "eval.judge.model=org/judge", f"output_dir={tmp_path}"]
    config = compose(["experiment=smoke", *asked]).config
    need = Need("eval.judge.model", "model", "org/judge", None)
    assert needs(config, [Step("eval", "k", StepState.run)]) == [need]
    assert needs(config, [Step("sft", "k", StepState.run)]) == []
    Pins(tmp_path).set(need, Pin(COMMIT, []))
    assert pinned(config).eval.judge.revision == COMMIT


def test_models_of_an_evaluation_are_needed_too(tmp_path: Path) -> None:
    extra = {
        "org/other": ResolvedModel("k1", "org/other"),
        "referee": ResolvedModel("k2", "org/judge"),
        "mine": ResolvedModel("k3", str(tmp_path)),
    }
    step = Step("eval", "k", StepState.run, extra=extra)
    assert [str(need) for need in needs(compose([]).config, [step])] == [
        "model org/other (eval.models)",
        "model org/judge (eval.reward_quality.referee)",
    ]


def test_pins_stand_for_open_revisions(tmp_path: Path) -> None:
    config = compose(["experiment=hh_gptj_6b", f"output_dir={tmp_path}", "stage=sft"]).config
    assert pinned(config) == config
    before = plan(config)[0].key
    data = Need("data.path", "dataset", "Dahoas/rm-static", None)
    Pins(tmp_path).set(replace(MODEL, id="EleutherAI/gpt-j-6b"), Pin("a" * 40, []))
    Pins(tmp_path).set(data, Pin("b" * 40, []))
    found = pinned(config)
    assert (found.model.revision, found.data.revision) == ("a" * 40, "b" * 40)
    assert plan(found)[0].key != before
    config.model.revision = "v1"
    assert pinned(config).model.revision == "v1"


def test_an_explicit_revision_is_not_another_ones_pin(tmp_path: Path) -> None:
    Pins(tmp_path).set(MODEL, Pin(COMMIT, []))
    wanted = [replace(MODEL, revision=revision) for revision in (COMMIT, "v1", None)]
    assert missing(tmp_path, wanted) == [replace(MODEL, revision="v1")]


def test_pins_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / hub.PINS).write_text("{")
    with pytest.raises(UserError, match=r"pins\.json: not JSON"):
        Pins(tmp_path).get(MODEL)


def eval_config(tmp_path: Path, *overrides: str) -> Config:
    return compose([f"output_dir={tmp_path}", *overrides], [CONF]).config


PROMPTS = Need("eval.toxicity.data", "dataset", "allenai/real-toxicity-prompts", None)
CLASSIFIER = Need("eval.toxicity.scorer", "model", "org/judge", None)
EVALUATED = [Step("eval", "key", StepState.run)]


def test_what_a_toxicity_evaluation_reads(tmp_path: Path) -> None:
    scorer = "eval.toxicity.scorer=org/judge"
    assert needs(eval_config(tmp_path, "eval=blog", scorer), EVALUATED) == [PROMPTS, CLASSIFIER]
    assert needs(eval_config(tmp_path, "eval=blog"), EVALUATED) == [PROMPTS]
    assert needs(eval_config(tmp_path, "eval=blog"), [Step("sft", "key", StepState.run)]) == []
    assert needs(eval_config(tmp_path, "eval=quick", scorer), EVALUATED) == [CLASSIFIER]
    assert needs(eval_config(tmp_path, "eval=quick"), EVALUATED) == []
    assert needs(eval_config(tmp_path, "eval=reward_quality", scorer), EVALUATED) == []
    stored = eval_config(tmp_path, "stage=eval", "eval=blog", scorer, "eval.samples=run")
    assert needs(stored, EVALUATED) == [CLASSIFIER]
    (tmp_path / "own.jsonl").touch()
    own = eval_config(tmp_path, "eval=blog", f"eval.toxicity.data={tmp_path}/own.jsonl")
    assert needs(own, EVALUATED) == []


def test_pins_stand_for_what_a_toxicity_evaluation_leaves_open(tmp_path: Path) -> None:
    pins = Pins(tmp_path)
    pins.set(PROMPTS, Pin("abc", []))
    pins.set(CLASSIFIER, Pin("def", []))
    found = pinned(eval_config(tmp_path, "eval=blog", "eval.toxicity.scorer=org/judge"))
    assert found.eval.toxicity.revision == "abc"
    assert found.eval.toxicity.scorer_revision == "def"
    own = pinned(eval_config(tmp_path, "eval=blog", "eval.toxicity.revision=mine"))
    assert own.eval.toxicity.revision == "mine"


def test_a_fetched_set_is_read_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    for module, name in (
        ("evaluation.toxicity.prompts", "load_prompts"),
        ("data.sources", "load_splits"),
    ):
        monkeypatch.setattr(
            f"rlhf_exp.{module}.{name}",
            lambda path, commit, name=name: read.append((name, path, commit)),
        )
    hub._prepare(PROMPTS, "abc")
    hub._prepare(Need("data.path", "dataset", "org/pairs", None), "def")
    assert read == [
        ("load_prompts", PROMPTS.id, "abc"),
        ("load_splits", "org/pairs", "def"),
    ]


def test_a_hub_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(UserError, match=r"does not answer .* no model org/small \(model.path\)"):
        check_reachable(tmp_path, [MODEL])
    assert not constants.HF_HUB_OFFLINE
    cached(tmp_path, "model.safetensors", b"weights")
    check_reachable(tmp_path, [MODEL])
    (record,) = caplog.records
    assert "model org/small (model.path) is read from this machine's cache" in record.message
    # No library asks again, also in processes started from here.
    assert huggingface_hub.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    check_reachable(tmp_path, [MODEL])
    assert len(caplog.records) == 1


def test_a_hub_that_answers_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with stand_in_hub({"org/small": FILES}) as (address, _):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        check_reachable(tmp_path, [MODEL])
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
