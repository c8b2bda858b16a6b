"""PPO by trlx: with a stand-in for the worker, and (marker `trlx`) with trlx itself.

The latter need `RLHF_EXP_TRLX_PYTHON`, an interpreter made by `rlhf_exp/trlx/setup.sh`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.stages import trlx_ppo
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.store import Store
from rlhf_exp.trlx.convert import write_old_model
from tests.lab import LAUNCH, ROOT, artifact, run, small, weights
from tests.trlx.test_convert import model_of

STAND_IN = Path(__file__).parent / "stand_in_trlx"
THIS = f"engine.python={sys.executable}"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trlx_ppo, "program_of", lambda module: [STAND_IN])


def newest(outputs: Path) -> Artifact:
    return max(Store(outputs / "store").find("ppo/"), key=lambda one: one.manifest.created)


def logged(found: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("stand_in")
def test_what_trlx_leaves_is_an_artifact_like_any_other(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = artifact(run_copy, "ppo")
    monkeypatch.chdir(run_copy.parent)  # the worker starts elsewhere
    run(Path(run_copy.name), "engine=trlx", THIS, "ppo.select=last")
    found = newest(run_copy)
    found.verify()
    assert found.key != native.key
    assert found.manifest.parents == native.manifest.parents, "SFT and reward model are shared"
    # Trained: 0.5 was added to every weight after each of the three iterations.
    sft = load_file(artifact(run_copy, "sft").path / "model" / "model.safetensors")
    for name, value in load_file(found.path / "model" / "model.safetensors").items():
        torch.testing.assert_close(value, sft[name] + 1.5)
    AutoModelForCausalLM.from_pretrained(found.path / "model")
    rows = logged(found)
    assert [row["global_step"] for row in rows if "loss/total" in row] == [2, 4, 6]
    assert [row["global_step"] for row in rows if "eval/objective" in row] == [0, 2, 4, 6]
    assert found.manifest.metrics["published_step"] == 6.0
    facts = json.loads((found.path / "facts.json").read_text())
    assert facts["libraries"] == f"trlx 0.7.0, torch {torch.__version__}"
    assert (facts["parameters"], facts["prompts"]) == (10, 40)
    names = {path.name for path in found.path.iterdir()}
    assert "trlx.log" in names
    assert "trlx" not in names, "what was handed over stays nowhere"
    (evaluated,) = [
        one
        for one in Store(run_copy / "store").find("eval/")
        if one.manifest.parents["ppo"] == found.key
    ]
    assert "eval/reward/difference" in evaluated.manifest.metrics


@pytest.mark.usefixtures("stand_in")
def test_a_failure_leaves_nothing_that_is_in_the_way(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_TRLX", "fails")
    with pytest.raises(UserError, match=r"trlx failed: ValueError\('as told'\)\n\nTraceback: of"):
        run(run_copy, "stage=ppo", "engine=trlx", THIS)
    (staging,) = (run_copy / "store" / ".staging").glob("ppo-*")
    assert (staging / "trlx" / "plan.json").is_file(), "to look at"
    monkeypatch.delenv("STAND_IN_TRLX")
    run(run_copy, "stage=ppo", "engine=trlx", THIS)
    rows = logged(newest(run_copy))
    assert [row["global_step"] for row in rows if "eval/objective" in row] == [0, 2, 4, 6]
    # The native engine, under its own key, sees nothing of it.
    run(run_copy, "stage=ppo", "engine=native")
    assert len(Store(run_copy / "store").find("ppo/")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both(run_copy: Path, number: int) -> None:
    program = f"""
import sys
from pathlib import Path
from rlhf_exp.stages import trlx_ppo
trlx_ppo.program_of = lambda module: [Path({str(STAND_IN)!r})]
from tests.lab import run
run(Path({str(run_copy)!r}), "stage=ppo", "engine=trlx", {THIS!r})
"""
    environment = {**os.environ, "STAND_IN_TRLX": "hangs"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as parent:
        end = time.monotonic() + 120
        pid: list[Path] = []
        while not pid and time.monotonic() < end:
            pid = list((run_copy / "store" / ".staging").glob("ppo-*/trlx/pid"))
            time.sleep(0.05)
        assert pid, parent.communicate()
        worker = int(pid[0].read_text())
        parent.send_signal(number)
        parent.communicate(timeout=60)
    assert parent.returncode != 0
    end = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


# -- with trlx itself ---------------------------------------------------------------------------


@pytest.fixture
def trlx_python() -> str:
    found = os.environ.get("RLHF_EXP_TRLX_PYTHON")
    if not found:
        pytest.skip("RLHF_EXP_TRLX_PYTHON names no interpreter with trlx")
    return found


@pytest.mark.trlx
@pytest.mark.parametrize(
    ("family", "blocks", "frozen"),
    [
        ("llama", "null", ()),
        ("llama", "1", ("model.embed_tokens.", "model.layers.0.")),
        ("gpt_neox", "1", ("gpt_neox.embed_in.", "gpt_neox.layers.0.")),
        ("gptj", "1", ("transformer.wte.", "transformer.h.0.")),
        # trlx leaves the embeddings of positions out of what it freezes.
        ("gpt2", "1", ("transformer.wte.", "transformer.h.0.")),
    ],
)
def test_trlx_trains(
    tmp_path: Path, trlx_python: str, family: str, blocks: str, frozen: tuple[str, ...]
) -> None:
    run(
        tmp_path,
        "stage=ppo",
        f"model.architecture.type={family}",
        "engine=trlx",
        f"engine.python={trlx_python}",
        f"ppo.train_blocks={blocks}",
        "ppo.generation.batch=5",
        "ppo.select=last",
    )
    found = newest(tmp_path)
    rows = logged(found)
    assert [row["global_step"] for row in rows if "loss/total" in row] == [2, 4, 6]
    # The reference is the policy before training, whichever way trlx keeps it.
    first, *later = [row for row in rows if "eval/kl_sequence" in row]
    assert first["eval/kl_sequence"] == pytest.approx(0.0, abs=1e-5)
    assert any(abs(row["eval/kl_sequence"]) > 1e-4 for row in later)
    one, two, _ = [row for row in rows if "kl/sequence" in row]
    assert one["kl/sequence"] == pytest.approx(0.0, abs=1e-4)
    assert abs(two["kl/sequence"]) > 1e-4
    sft = load_file(artifact(tmp_path, "sft").path / "model" / "model.safetensors")
    trained = load_file(found.path / "model" / "model.safetensors")
    still = {name for name, value in trained.items() if torch.equal(value, sft[name])}
    assert still == {name for name in sft if name.startswith(frozen)}


@pytest.mark.trlx
def test_transformers_of_that_time_read_what_they_are_given(
    run_copy: Path, trlx_python: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(artifact(run_copy, "sft").path / "model")
    tokens, expected = torch.arange(20)[None] * 7, {}
    for family in ("gpt2", "gptj", "gpt_neox", "llama"):
        for tied in (False, True):
            model, folder = model_of(family, tied), tmp_path / f"{family}-{tied}"
            write_old_model(model, tokenizer, folder)
            with torch.no_grad():
                expected[str(folder)] = model(tokens).logits[0, -1].tolist()
    program = """
import json, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(20)[None] * 7
for folder, logits in json.load(sys.stdin).items():
    found = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits[0, -1]
    print("ERROR", folder, float((found - torch.tensor(logits)).abs().max()))
"""
    ended = subprocess.run(
        [trlx_python, "-I", "-c", program],
        input=json.dumps(expected),
        capture_output=True,
        text=True,
        check=True,
    )
    errors = [line.split() for line in ended.stdout.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 8
    assert all(float(error) < 1e-5 for *_, error in errors), errors


@pytest.mark.trlx
def test_what_goes_wrong_on_either_side_is_told(
    run_copy: Path, trlx_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["stage=ppo", "engine=trlx", f"engine.python={trlx_python}"]
    function = tmp_path / "mine.py"
    function.write_text("def score(prompts, responses):\n    raise KeyError('mine')\n")
    with pytest.raises(UserError, match=r"mine\.py:2: KeyError: 'mine'"):
        run(run_copy, *arguments, f"ppo.reward.function={function}:score")

    hand_over = trlx_ppo.hand_over

    def spoilt(*given: Any) -> Path:
        plan = hand_over(*given)
        content = json.loads(plan.read_text())
        content["check"]["logprobs"][0] -= 0.01
        plan.write_text(json.dumps(content))
        return plan

    monkeypatch.setattr(trlx_ppo, "hand_over", spoilt)
    with pytest.raises(UserError, match=r"log-probabilities differ by 0\.01 nats.*\n\nTraceback"):
        run(run_copy, *arguments)


@pytest.mark.trlx
def test_a_whole_experiment(run_copy: Path, trlx_python: str) -> None:
    """From the command line, with the interpreter looked at, to the report."""
    arguments = ["engine=trlx", f"engine.python={trlx_python}", "name=trlx"]
    command = [sys.executable, str(LAUNCH), *small(run_copy, *arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Report: " in ended.stdout
    assert weights(newest(run_copy)) != weights(artifact(run_copy, "sft"))
