"""The conversation with a worker, of which what it would say is written down.

The worker's process, with programs of our own in its place and this interpreter to run them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_exp.config.training import KlConfig, PpoRewardConfig, Select, SelectBy
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.engines.process import EngineProcess, program_of
from rlhf_exp.engines.session import RunInputs, Session
from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import worker_environment
from rlhf_exp.tracking.tracker import NullTracker
from rlhf_exp.training.result import Diverged, TrainingResult
from rlhf_exp.trlx.metrics import dialect
from rlhf_exp.trlx.plan import WORKER
from tests.trlx.lab import section_with

Message = dict[str, Any]
# 2 rollouts, one batch, one epoch: an iteration is one optimizer step.
SMALL = {"steps": 2, "rollouts": 2, "batch": 2, "epochs": 1, "eval_prompts": 2}
UPDATE = {
    "losses/total_loss": 0.5,
    "losses/policy_loss": 0.1,
    "losses/value_loss": 0.4,
    "policy/clipfrac": 0.0,
    "policy/approx_kl": 0.0,
    "old_values/mean": 0.0,
    "values/clipfrac": 0.0,
    "lr": 1e-4,
    "grad_norm": 1.0,
    "peak": 1.0,
    "time/update": 1.0,
}
ROLLOUT = {
    "kl_ctl_value": 0.05,
    "policy/sqrt_kl": 0.0,
    "rollout_scores/running_std": 1.0,
    "time/rollout_generate": 0.1,
    "time/rollout_score": 0.1,
}


class Script:
    """In the process's place: says these things, and keeps the answers."""

    def __init__(self, *messages: Message) -> None:
        self.messages = [dict(one) for one in messages]
        self.answers: list[Message] = []

    def receive(self) -> Message:
        return self.messages.pop(0)

    def send(self, **message: Any) -> None:
        self.answers.append(message)


class Notes(NullTracker):
    run_id = "r1"

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool, dict[str, float]]] = []
        self.tables: list[Any] = []
        self.alerts: list[str] = []

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        self.rows.append((step, more, dict(metrics)))

    def table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        self.tables.append((name, columns, rows, step))

    def alert(self, title: str, text: str, step: int) -> None:
        self.alerts.append(text)


def first_tokens(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
    """Score a response by its first token, and 100 for each token of its prompt."""
    rows = zip(tokens, prompt_lengths, content_lengths, strict=True)
    return torch.tensor(
        [float(row[p] if c else 0) + 100.0 * float(p) for row, p, c in rows], dtype=torch.float32
    )


def prompts_of(*rows: list[int]) -> TokenizedPrompts:
    ids = [np.array(row, dtype=np.int32) for row in rows]
    return TokenizedPrompts(RaggedArray.of(ids), RaggedArray.of(ids), 0, 0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["What is it? It is so."], 270)


@pytest.fixture
def inputs(tokenizer: PreTrainedTokenizerBase) -> RunInputs:
    return RunInputs(
        first_tokens,
        prompts=prompts_of([11], [12, 13], [14]),
        originals=torch.tensor([1.0, 2.0, 3.0]),
        validation=prompts_of([15, 16], [17]),
        section=section_with(**SMALL, kl=KlConfig(coef=0.5)),
        codec=Codec(tokenizer, "hh"),
    )


def score(evaluation: bool, firsts: list[int], **more: Any) -> Message:
    ids = [[first, 9] for first in firsts]
    message = {"kind": "score", "evaluation": evaluation, "index": [0, 1], "ids": ids}
    return {**message, "ended": [True, True], **more}


def evaluated(step: int, firsts: list[int], kl: list[float]) -> list[Message]:
    return [score(True, firsts), {"kind": "evaluated", "step": step, "kl": kl}]


def iteration(step: int, **update: float) -> list[Message]:
    return [
        score(False, [5, 6]),
        {"kind": "log", "step": step - 1, "stats": ROLLOUT},
        {"kind": "experience", "seconds": 1.0, "kl": [0.5, 1.5]},
        {"kind": "log", "step": step, "stats": {**UPDATE, **update}},
    ]


def whole(*firsts: list[int]) -> list[Message]:
    """A run of two steps whose evaluations score by these."""
    first, second, third = (
        evaluated(step, scores, [float(step), float(step)]) for step, scores in enumerate(firsts)
    )
    one, two = iteration(1), iteration(2)
    # As trlx does it: experience, evaluation, update; the last evaluation before the last report.
    return [
        {"kind": "ready", "parameters": 10, "trainable": 4},
        *one[:3],
        *first,
        *second,
        one[3],
        *two[:3],
        *third,
        two[3],
        {"kind": "done"},
    ]


def run(inputs: RunInputs, *messages: Message, **more: Any) -> tuple[Script, Notes, TrainingResult]:
    script, notes = Script(*messages), Notes()
    reward = PpoRewardConfig(missing_eos_penalty=more.pop("penalty", 0.0))
    inputs = replace(inputs, section=replace(inputs.section, reward=reward))
    given: Any = {"before_write": lambda: None, "on_step": lambda step, metrics: None, **more}
    process: Any = script
    session = Session(process, 2, inputs, dialect(scaled=True), notes, **given)
    outcome = session.run(Path("plan.json"))
    assert script.answers[0] == {"plan": "plan.json"}
    return script, notes, outcome


def test_scores_of_rollouts_and_of_evaluations(inputs: RunInputs) -> None:
    script, notes, outcome = run(inputs, *whole([3, 7], [9, 7], [3, 3]), penalty=0.25)
    answers = [one["scores"] for one in script.answers if "scores" in one]
    # Training: first token + 100 a prompt token - the original's: 5 + 100 - 1, 6 + 200 - 2.
    assert answers[0] == [104.0, 204.0]
    # Evaluations: raw. Prompts of 2 and 1 tokens.
    assert answers[1] == [203.0, 107.0]
    (first, *_) = notes.rows
    assert first[:2] == (0, False)
    assert first[2]["eval/reward_mean"] == 155.0
    assert first[2]["eval/reward_std"] == 48.0
    assert first[2]["eval/length_mean"] == 3.0, "two tokens and the end"
    assert first[2]["eval/objective"] == pytest.approx(155 / 48)
    assert [(step, more) for step, more, _ in notes.rows] == [
        (0, False),
        (1, True),
        (1, False),
        (2, True),
        (2, False),
    ]
    assert notes.rows[2][2]["reward/mean"] == 155.5  # (105 + 206) / 2
    assert notes.rows[2][2]["kl/sequence"] == 1.0
    assert [table[3] for table in notes.tables] == [0, 1, 2]
    assert outcome.last_step == 2


def test_an_answer_that_does_not_end_pays(inputs: RunInputs) -> None:
    messages = whole([3, 7], [9, 7], [3, 3])
    messages[1]["ended"] = [False, True]
    script, notes, _ = run(inputs, *messages, penalty=0.25)
    assert script.answers[1]["scores"] == [103.75, 204.0]
    assert notes.rows[2][2]["response/length_mean"] == 2.5
    assert notes.rows[2][2]["reward/mean"] == 155.5, "raw"


def saves(script: Script) -> list[bool]:
    return [one["save"] for one in script.answers if "save" in one]


def test_the_best_weights_are_saved(inputs: RunInputs) -> None:
    """Means 155, 158, 153; less 0.5 nats times 48 for each step: the objectives are ...

    155/48 = 3.23, 158/48 - 0.5 = 2.79, 153/48 - 1 = 2.19: the first is the best.
    """
    script, _, outcome = run(inputs, *whole([3, 7], [9, 7], [3, 3]))
    assert saves(script) == [True, False, False]
    assert (outcome.published_step, outcome.best_step) == (0, 0)
    assert outcome.objective == pytest.approx(155 / 48)
    assert outcome.metrics["eval/reward_mean"] == 155.0
    # 230/48 - 0.5 = 4.29 is better than the first.
    script, _, outcome = run(inputs, *whole([3, 7], [80, 80], [3, 3]))
    assert saves(script) == [True, True, False]
    assert outcome.metrics["published_step"] == 1.0


def test_the_last_weights_are_saved_where_they_are_asked_for(inputs: RunInputs) -> None:
    last = replace(inputs, section=replace(inputs.section, select=Select.last))
    script, _, outcome = run(last, *whole([3, 7], [9, 7], [3, 3]))
    assert saves(script) == [False, False, True]
    assert (outcome.published_step, outcome.best_step) == (2, 0)
    assert outcome.metrics["eval/reward_mean"] == 153.0


def test_a_budget_of_kl_binds(inputs: RunInputs) -> None:
    """Step 2 has the most reward and 2 nats, which is more than allowed."""
    section = replace(inputs.section, kl=KlConfig(coef=0.5, budget=1.5))
    bound = replace(inputs, section=section)
    script, _, outcome = run(bound, *whole([3, 7], [9, 7], [90, 90]))
    assert saves(script) == [True, True, False]
    assert outcome.published_step == 1


def test_wins_over_the_first_answers_select_where_they_are_asked_for(inputs: RunInputs) -> None:
    """Against 3 and 7, 2 loses and 99 wins; 5 and 9 both win."""
    section = replace(inputs.section, select_by=SelectBy.win_rate)
    by_wins = replace(inputs, section=section)
    script, notes, outcome = run(by_wins, *whole([3, 7], [2, 99], [5, 9]))
    rates = [row["eval/win_rate"] for *_, row in notes.rows if "eval/win_rate" in row]
    assert rates == [0.5, 0.5, 1.0], "against itself all are ties"
    assert saves(script) == [True, False, True]
    assert outcome.objective == 1.0


def test_a_search_gives_the_run_up(inputs: RunInputs) -> None:
    asked: list[tuple[int, int]] = []

    def given_up(step: int, steps: int) -> bool:
        asked.append((step, steps))
        return step == 1

    messages = whole([3, 7], [9, 7], [3, 3])
    until = [one.get("step") for one in messages].index(1) + 1
    script, _, outcome = run(inputs, *messages[:until], {"kind": "done"}, given_up=given_up)
    assert asked == [(0, 2), (1, 2)]
    assert [one["stop"] for one in script.answers if "stop" in one] == [False, True]
    assert outcome.pruned
    assert outcome.last_step == 1


def test_a_loss_that_is_no_number_stops_the_run(inputs: RunInputs) -> None:
    messages = [*iteration(1, **{"losses/total_loss": float("nan")})]
    script, notes = Script(*messages), Notes()
    process: Any = script
    session = Session(
        process,
        2,
        inputs,
        dialect(scaled=True),
        notes,
        before_write=lambda: None,
        on_step=lambda step, metrics: None,
    )
    with pytest.raises(Diverged, match="the loss at step 1 is nan"):
        session.run(Path("plan.json"))
    assert len(notes.alerts) == 1


def test_nothing_is_saved_without_leave(inputs: RunInputs) -> None:
    def refuse() -> None:
        raise PermissionError("the lease is lost")

    with pytest.raises(PermissionError):
        run(inputs, *whole([3, 7], [9, 7], [3, 3]), before_write=refuse)


ROOT = Path(__file__).parents[2]
_HEAD = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(program_of(WORKER)[0])!r})
from engine_line import WorkerChannel
line = WorkerChannel(int(sys.argv[1]))
"""


def program(folder: Path, body: str) -> Path:
    path = folder / "worker.py"
    path.write_text(_HEAD + body)
    return path


def process(folder: Path, body: str) -> EngineProcess:
    return EngineProcess("trlx", sys.executable, folder / "trlx.log", [program(folder, body)])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(pid: int, within: float = 20.0) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_questions_and_answers(tmp_path: Path) -> None:
    body = """
line.send(kind="hello", versions={"trlx": "0.7.0"})
print("as trlx prints", flush=True)
numbers = line.ask(kind="score", ids=[[1, 2], []])["scores"]
line.send(kind="log", sum=sum(numbers), text="\\u20ac", odd=float("nan"))
"""
    with process(tmp_path, body) as worker:
        assert worker.greet() == {"trlx": "0.7.0"}
        assert worker.receive() == {"kind": "score", "ids": [[1, 2], []]}
        worker.send(scores=[0.5, 1.25])
        found = worker.receive()
    assert (found["sum"], found["text"]) == (1.75, "€")
    assert found["odd"] != found["odd"]
    assert (tmp_path / "trlx.log").read_text() == "as trlx prints\n"


def test_an_interpreter_is_found_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    body = program(tmp_path, "line.send(kind='hello', versions={'cwd': os.getcwd()})")
    with EngineProcess("trlx", "bin/python", tmp_path / "work" / "trlx.log", [body]) as worker:
        assert worker.greet() == {"cwd": str(tmp_path / "work")}


def test_an_exception_reaches_the_user_with_its_traceback(tmp_path: Path) -> None:
    body = """
line.send(kind="failed", error="ValueError: no", traceback="Traceback\\n  File x, line 3\\n")
"""
    with process(tmp_path, body) as worker, pytest.raises(UserError) as caught:
        worker.receive()
    text = str(caught.value)
    assert text.startswith("trlx failed: ValueError: no\n")
    assert "File x, line 3" in text
    assert str(tmp_path / "trlx.log") in text


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("print('out of memory', flush=True); os._exit(3)", "exit code 3"),
        ("os.write(2, b'out of memory'); os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("raise ImportError('out of memory')", "exit code 1"),
    ],
)
def test_a_worker_that_dies_is_told_with_what_it_said(tmp_path: Path, body: str, how: str) -> None:
    with process(tmp_path, body) as worker, pytest.raises(UserError) as caught:
        worker.receive()
    assert f"({how})" in str(caught.value) or f"(killed by {how})" in str(caught.value)
    assert "out of memory" in str(caught.value)
    with process(tmp_path, body) as worker:
        assert ends(worker._process.pid)
        worker.send(scores=[1.0])  # lost, without a sound
        with pytest.raises(UserError, match="has ended before its work was done"):
            worker.receive()


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.python=.*nowhere: cannot be started"):
        EngineProcess("trlx", str(tmp_path / "nowhere"), tmp_path / "trlx.log", program_of(WORKER))


HANGS = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
line.send(kind="hello", pids=[os.getpid(), child.pid])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def test_leaving_ends_the_worker_and_what_it_has_started(tmp_path: Path) -> None:
    with process(tmp_path, HANGS) as worker:
        pids = worker.receive()["pids"]
        assert all(map(alive, pids))
    assert all(ends(pid, 5.0) for pid in pids)


def test_a_worker_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    body = """
line.send(kind="hello", pid=os.getpid())
time.sleep(600)
"""
    parent = f"""
import os, sys
from pathlib import Path
from rlhf_exp.engines.process import EngineProcess
worker = EngineProcess("trlx", sys.executable, Path({str(tmp_path / "trlx.log")!r}),
                       [Path({str(program(tmp_path, body))!r})])
print(worker.receive()["pid"], flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", parent]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ends(int(ended.stdout))


def test_the_worker_is_alone_and_offline(tmp_path: Path) -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "1"}
    given |= {"PYTHONPATH": "/elsewhere", "SLURM_PROCID": "3", "HOME": "/home/x", "HF_HOME": "/h"}
    assert worker_environment(given) == {
        "HOME": "/home/x",
        "HF_HOME": "/h",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    os.environ["PYTHONHOME"] = "/nowhere"
    try:
        with process(tmp_path, "line.send(kind='hello', versions=dict(os.environ))") as worker:
            assert "PYTHONHOME" not in worker.greet()
    finally:
        del os.environ["PYTHONHOME"]
