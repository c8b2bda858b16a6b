"""A run of trlx's worker: the process, and the conversation with it.

The worker is a process of another interpreter, at the other end of a connection. Its responses are
scored here, and its evaluations are judged here. Its output goes to a log. It ends with this
process, because the connection does; a Ctrl-C of the terminal is this process's alone.

n responses.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, pstdev
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.advantages import subtract_original_scores
from rlhf_exp.algo.preference import wins
from rlhf_exp.config.training import PpoConfig, Scale, Select
from rlhf_exp.data.batching import right_padded
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.processes.channel import Channel, Message
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.training.ppo_objective import SHOWN, objective, score_unit, selection_score
from rlhf_exp.training.result import Diverged, TrainingResult
from rlhf_exp.training.reward_scorer import Scorer, texts_of
from rlhf_exp.trlx.metrics import UPDATE, Iteration


@dataclass(frozen=True)
class RunInputs:
    """The scorer of responses, the prompts, and the rules for selecting weights.

    Attributes:
        scorer: Scores responses.
        prompts: The training prompts.
        originals: [prompts] float32, scores of the data set's own responses; `None`: they are not
            subtracted.
        validation: The validation prompts.
        section: Hyperparameters, also how the weights to publish are selected.
        codec: Codec of the policy.
    """

    scorer: Scorer
    prompts: TokenizedPrompts
    originals: Tensor | None
    validation: TokenizedPrompts
    section: PpoConfig
    codec: Codec


@dataclass(frozen=True)
class _Answers:
    """Scored responses: tokens [n, S], lengths [n, 2] of prompt and content, ended [n], raw [n]."""

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    raw: Tensor


class Session:
    """Serves a worker until it is done.

    Args:
        process: The worker, greeted.
        steps: Optimizer steps of the run; a whole number of iterations.
        inputs: Scorer, prompts and hyperparameters.
        tracker: Records the metrics.
        before_write: Called before weights are saved; raises if this process may no longer write.
        on_step: Told the step and the latest metrics, for a progress display.
        given_up: Whether a search gives the run up, asked after each evaluation with the step and
            the number of steps; `None`: there is no search.
    """

    def __init__(
        self,
        process: TrlxProcess,
        steps: int,
        inputs: RunInputs,
        tracker: Tracker,
        before_write: Callable[[], None],
        on_step: Callable[[int, Mapping[str, float]], None],
        given_up: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.process, self.steps, self.inputs = process, steps, inputs
        self.section = inputs.section
        self.tracker, self.before_write = tracker, before_write
        self.on_step, self.given_up = on_step, given_up
        self.facts: dict[str, int] = {}
        self._iteration = self._begin()
        self._answers: _Answers | None = None
        self._unit: float | None = None
        self._initial: Tensor | None = None
        self._best: tuple[float, int] | None = None
        self._published: dict[str, float] = {}
        self._step, self._saved, self._pruned = 0, 0, False

    def run(self, plan: Path) -> TrainingResult:
        """Let the worker carry out the plan.

        Raises:
            Diverged: A loss is not finite.
            UserError: The worker or the scorer has failed.
        """
        handlers: dict[str, Callable[..., None]] = {
            "ready": self._ready,
            "score": self._score,
            "experience": self._experience,
            "log": self._log,
            "evaluated": self._evaluated,
        }
        self.process.send(plan=str(plan))
        while (message := self.process.receive())["kind"] != "done":
            handlers[message.pop("kind")](**message)
        return self._outcome()

    def _ready(self, parameters: int, trainable: int) -> None:
        self.facts |= {"parameters": parameters, "trainable": trainable}

    def _score(
        self, evaluation: bool, index: list[int], ids: list[list[int]], ended: list[bool]
    ) -> None:
        """Send the scores: raw ones of an evaluation, else those that trlx clips and scales."""
        inputs, iteration = self.inputs, self._iteration
        source = inputs.validation if evaluation else inputs.prompts
        parts = [
            (source.prompt[row], np.array(answer, dtype=np.int64))
            for row, answer in zip(index, ids, strict=True)
        ]
        tokens, _ = right_padded(parts)
        lengths = torch.tensor([[len(part) for part in row] for row in parts])
        raw = inputs.scorer(tokens, lengths[:, 0], lengths[:, 1])
        finished = torch.tensor(ended)
        if evaluation:
            self._answers = _Answers(tokens, lengths, finished, raw)
            self.process.send(scores=raw.tolist())
            return
        scores = raw - self.section.reward.missing_eos_penalty * ~finished
        if inputs.originals is not None:
            scores = subtract_original_scores(scores, inputs.originals[torch.tensor(index)])
            iteration.deltas += scores.tolist()
        iteration.scores += raw.tolist()
        iteration.lengths += (lengths[:, 1] + finished).tolist()
        iteration.parts += 1
        self.process.send(scores=scores.tolist())

    def _experience(self, seconds: float, kl: list[float]) -> None:
        self._iteration.seconds, self._iteration.kl = seconds, kl

    def _log(self, step: int, stats: dict[str, float]) -> None:
        """Take in metrics that trlx logs; at the end of an iteration, record them."""
        iteration = self._iteration
        if UPDATE not in stats:
            iteration.rollouts = {**iteration.rollouts, **stats}
            return
        if not math.isfinite(stats[UPDATE]):
            raise self._diverged(f"the loss at step {step} is {stats[UPDATE]}", step)
        self._step = step
        iteration.updates.append(stats)
        metrics: dict[str, float] = {}
        if step % self.section.updates == 0:
            metrics = iteration.metrics()
            self.tracker.histogram("reward/histogram", iteration.scores, step)
            if iteration.kl:
                self.tracker.histogram("kl/histogram", iteration.kl, step)
            self.tracker.log(metrics, step)
            self._iteration = self._begin()
        self.on_step(step, metrics)

    def _evaluated(self, step: int, kl: list[float]) -> None:
        """Report an evaluation; say whether to save the weights, and whether to go on."""
        answers, section = self._answers, self.section
        assert answers is not None, "an evaluation has its answers scored first"
        raw: list[float] = answers.raw.tolist()
        if self._initial is None:
            self._initial = answers.raw
        metrics = {
            "eval/reward_mean": fmean(raw),
            "eval/reward_std": pstdev(raw),
            "eval/win_rate": float(wins(answers.raw, self._initial).mean()),
            "eval/kl_sequence": fmean(kl),
            "eval/length_mean": float((answers.lengths[:, 1] + answers.ended).double().mean()),
            "eval/ended_fraction": float(answers.ended.double().mean()),
        }
        if self._unit is None:
            self._unit = score_unit(section, metrics)
        metrics["eval/objective"] = objective(section, metrics, self._unit)
        columns, rows = self._table(answers, kl)
        self.tracker.table("eval/samples", columns, rows, step)
        # The iteration that ends here is logged right after.
        self.tracker.log(metrics, step, more=step > 0)
        self._step = step
        save = self._takes(metrics, selection_score(section, metrics, self._unit), step)
        if save:
            self.before_write()
        self._pruned = self.given_up is not None and self.given_up(step, self.steps)
        self.process.send(save=save, stop=self._pruned)
        self.on_step(step, metrics)

    def _takes(self, metrics: dict[str, float], score: float, step: int) -> bool:
        """Whether the weights of this step are to be published, as far as is known now."""
        better = self._best is None or score > self._best[0]
        if better:
            self._best = (score, step)
        select_best = self.section.select is Select.best
        takes = better if select_best else True
        if takes:
            self._published, self._saved = metrics, step
        return takes and (select_best or step >= self.steps)

    def _table(
        self, answers: _Answers, kl: list[float]
    ) -> tuple[list[str], list[list[str | float]]]:
        tokens, lengths = answers.tokens[:SHOWN], answers.lengths[:SHOWN]
        texts = texts_of(tokens, lengths[:, 0], lengths[:, 1], self.inputs.codec)
        rows = zip(*texts, answers.raw[:SHOWN].tolist(), kl[:SHOWN], strict=True)
        return ["prompt", "response", "score", "kl"], [list(row) for row in rows]

    def _outcome(self) -> TrainingResult:
        assert self._best is not None, "a run begins with an evaluation"
        objective, best = self._best
        metrics = self._published | {"published_step": float(self._saved)}
        metrics["best_objective"] = objective
        self.tracker.summary(metrics)
        return TrainingResult(
            metrics,
            objective,
            self.tracker.run_id,
            published_step=self._saved,
            steps_run=self._step,
            last_step=self._step,
            best_step=best,
            pruned=self._pruned,
        )

    def _diverged(self, what: str, step: int) -> Diverged:
        text = f"training stopped: {what}. Try a lower learning rate, or a larger ppo.kl.coef"
        self.tracker.alert("Training has diverged", text, step)
        return Diverged(text)

    def _begin(self) -> Iteration:
        return Iteration(scaled=self.section.reward.scale is Scale.running)


# By name, so that the code of the worker counts as code of the stage.
_WORKER = (
    "rlhf_exp.trlx.worker.__main__",
    "rlhf_exp.trlx.worker.trlx_line",
    "rlhf_exp.trlx.worker.trlx_trainer",
)
_TAIL = 15
# Variables that launchers set for their processes: the worker is alone. And Python's own, which
# would mix the two worlds.
_NOT_PASSED = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_"),
    *("SLURM_", "PYTHON"),
)


class TrlxProcess:
    """A worker, as a context manager that ends it.

    Args:
        python: Its interpreter.
        log: File for its output; replaced.
        program: The program that it runs: a file, or a folder with a `__main__.py`.
    """

    def __init__(self, python: str, log: Path, program: Path | None = None) -> None:
        self.log = log
        # It starts elsewhere. A link stays a link: it is what makes an environment.
        interpreter = Path(python).expanduser().absolute()
        here, there = socket.socketpair()
        self._line = Channel(Connection(here.detach()))
        with there, log.open("wb") as out:
            descriptor = there.fileno()
            try:
                self._process = subprocess.Popen(
                    [str(interpreter), "-I", str(program or worker_folder()), str(descriptor)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment(os.environ),
                    cwd=log.parent,
                    pass_fds=(descriptor,),
                    start_new_session=True,
                )
            except OSError as error:
                self._line.close()
                raise UserError(f"engine.python={python}: cannot be started ({error})") from error

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it, and all that it has started; it has nothing left to save."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._line.close()

    def greet(self) -> dict[str, str]:
        """Wait until the worker is there; return the versions of its libraries."""
        versions: dict[str, str] = self.receive()["versions"]
        return versions

    def send(self, **message: object) -> None:
        """Answer; a message to a worker that is gone is lost, and `receive` says so."""
        self._line.send(**message)

    def receive(self) -> Message:
        """Wait for the worker's next message.

        Raises:
            UserError: It has failed or is gone.
        """
        try:
            message = self._line.receive()
        except EOFError as error:
            raise UserError(self._gone()) from error
        if message["kind"] == "failed":
            raise UserError(
                f"trlx failed: {message['error']}\n\n{message['traceback'].rstrip()}\n\n"
                f"All that it printed is in {self.log}"
            )
        return message

    def _gone(self) -> str:
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        said = "\n".join(lines) or "It printed nothing."
        return f"trlx has ended before its work was done ({how}); its log, {self.log}:\n{said}"


def worker_folder() -> Path:
    """Return the folder of the worker's program."""
    spec = find_spec(_WORKER[0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the worker's environment: alone, offline, without a tracker of its own."""
    kept = {name: value for name, value in variables.items() if not name.startswith(_NOT_PASSED)}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
