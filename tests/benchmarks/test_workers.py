"""The harness against workers that are told what to do; the TRL side needs its environment."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from side_by_side import worker as harness
from side_by_side.protocol import Reading
from side_by_side.reward import SCALE, counted_share
from side_by_side.setting import SHAPES, Setting
from side_by_side.worker import Worker, WorkerFailed

ROOT = Path(__file__).resolve().parents[2]
FAKE = """
import sys
from side_by_side.protocol import Line, Reading, peak_bytes, resident_bytes
line = Line()
print("libraries print what they like")
line.ready(resident_bytes())
for number in range(3):
    line.wait()
    if number == 2:
        sys.exit("out of luck")
    held = bytearray(60_000_000 if number == 0 else 1)
    for place in range(0, len(held), 4096):
        held[place] = 1
    line.answer(Reading({"total": float(number)}, peak_bytes(), samples=7))
    del held
"""


def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> Worker:
    """Start a worker whose module is `source`."""
    (tmp_path / "told_worker.py").write_text(source)
    original = harness.environment
    monkeypatch.setattr(
        harness,
        "environment",
        lambda threads: (
            original(threads) | {"PYTHONPATH": f"{original(threads)['PYTHONPATH']}:{tmp_path}"}
        ),
    )
    setting = Setting(folder=str(tmp_path))
    log = tmp_path / "log.txt"
    return Worker("told", Path(sys.executable), ["told_worker"], setting, log, threads=1)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_worker_answers_each_question_and_its_failure_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(tmp_path, monkeypatch, FAKE) as worker:
        first, second = worker.iterate(), worker.iterate()
        assert (first.seconds["total"], second.seconds["total"]) == (0.0, 1.0)
        # Touching 15 000 pages takes the processor some milliseconds, doing nothing does not.
        assert first.seconds["cpu"] > second.seconds["cpu"] >= 0.0
        assert first.samples == 7
        # The first iteration held 60 MB; the peak is taken afresh for the second.
        assert first.peak_bytes - second.peak_bytes > 40_000_000
        with pytest.raises(WorkerFailed, match=r"(?s)told ended with 1.*out of luck"):
            worker.iterate()
    assert "libraries print what they like" in (tmp_path / "log.txt").read_text()


def test_a_worker_that_cannot_start_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkerFailed, match="no library here"):
        start(tmp_path, monkeypatch, "raise ImportError('no library here')")


def test_the_setting_travels_as_one_line() -> None:
    setting = Setting(folder="/somewhere", model="30m", train="top2", seed=3)
    assert "\n" not in setting.to_json()
    assert Setting.from_json(setting.to_json()) == setting
    assert setting.trained_blocks == 2


def test_the_share_counts_response_tokens_of_the_first_quarter() -> None:
    # Vocabulary 8: tokens 0 and 1 count. The prompt (2 tokens) does not, of 4 response tokens
    # 1, 2, 1 and 4 of them are counted: after each token 10 * (1, 1, 2, ...) / 4.
    tokens = torch.tensor([[0, 0, 1, 2, 0, 7], [6, 7, 1, 1, 0, 0]])
    share = counted_share(tokens, prompt_tokens=2, vocabulary=8)
    assert share[0].tolist() == [0.0, 0.0, SCALE / 4, SCALE / 4, SCALE / 2, SCALE / 2]
    assert share[1, -1] == SCALE


class Stop(Exception):
    """Raised where the harness would want no more."""


class Answers:
    """The worker's end of the line, without a process at the other end."""

    def __init__(self, wanted: int) -> None:
        self.readings: list[Reading] = []
        self.wanted = wanted

    def ready(self, started_bytes: int) -> None:
        assert started_bytes > 0

    def wait(self) -> None:
        if len(self.readings) == self.wanted:
            raise Stop

    def answer(self, reading: Reading) -> None:
        self.readings.append(reading)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    from side_by_side.prepare import prepare

    folder = str(tmp_path_factory.mktemp("models"))
    setting = Setting(folder, rollouts=4, prompt_tokens=5, response_tokens=3, prompts=8)
    setting = replace(setting, train="top2", epochs=1, minibatches=2)
    prepare(setting)
    return setting


def parameters(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_models_and_prompts_are_prepared(small: Setting) -> None:
    shape = SHAPES["tiny"]
    # GPT-NeoX: a block has 12 D^2 weights, 9 D biases of its matrices and two norms of 2 D each.
    blocks = shape.layers * (12 * shape.width**2 + 13 * shape.width)
    trunk = shape.vocabulary * shape.width + blocks + 2 * shape.width
    assert parameters(small.path("policy")) == trunk + shape.vocabulary * shape.width
    assert parameters(small.path("reward")) == trunk + shape.width
    prompts = np.load(small.path("prompts.npy"))
    assert prompts.shape == (8, 5)
    assert 0 <= prompts.min() <= prompts.max() < shape.vocabulary


@pytest.mark.parametrize(
    ("counted", "precision"), [(False, "float32"), (True, "float32"), (False, "bfloat16")]
)
def test_an_iteration_of_the_engine_is_measured_phase_by_phase(
    small: Setting, counted: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from side_by_side import native_worker

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    answers = Answers(wanted=2)
    with pytest.raises(Stop):
        native_worker.iterate(
            replace(small, counted_reward=counted, precision=precision),
            answers,  # type: ignore[arg-type]
            1,
        )
    for reading in answers.readings:
        assert (reading.samples, reading.tokens, reading.updates) == (4, 12, 2)
        seconds = reading.seconds
        parts = [seconds[name] for name in ("sample", "score", "update")]
        assert min(parts) > 0
        assert sum(parts) <= seconds["total"]
        assert reading.reward is not None
        if counted:
            # A counted share is a number of tokens out of 12, times its scale.
            counts = reading.reward * 12 / SCALE
            assert counts == pytest.approx(round(counts), abs=1e-4)


def test_sampling_alone_is_measured(small: Setting) -> None:
    from side_by_side import native_worker

    answers = Answers(wanted=1)
    with pytest.raises(Stop):
        native_worker.sample_only(small, answers, 1)  # type: ignore[arg-type]
    (only,) = answers.readings
    assert (only.samples, only.tokens, only.updates) == (4, 12, 0)


@pytest.mark.slow
def test_both_sides_of_a_comparison_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ppo.py"), "--out", str(tmp_path)]
    sides = ["native", "native-bf16", "generate"]
    sizes = ["--rollouts=4", "--prompt-tokens=5", "--response-tokens=3", "--threads=1"]
    done = subprocess.run(
        [*command, *sizes, "--rounds=1", "--sides", *sides],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("*.json")
    assert written.with_suffix(".md").read_text() in done.stdout
    found = json.loads(written.read_text())
    assert list(found["readings"]) == sides
    assert list(found["rows"]) == ["generate / native", "generate / native-bf16"]
    assert found["rates"].keys() == {"float32", "bfloat16"}
    for (only,) in found["readings"].values():
        assert (only["samples"], only["tokens"]) == (4, 12)
