"""Who does the stages of an experiment: this process, workers that it starts, or all that joined.

Planning, leases, waiting, publishing and the report are the leader's alone, outside of any process
group. The others do what they are told, and end when the leader does.

One stage's work as plain values, which cross processes, and doing it.

Ctrl-C and SIGTERM.

Ctrl-C while training: the first saves at the end of the iteration, the second leaves at once.
Everywhere else (loading, waiting for another process, evaluating) there is nothing to save, and
Ctrl-C leaves at once.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import Config, StrategyName
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.stage_graph import module_of
from rlhf_exp.processes import leader
from rlhf_exp.processes.environment import (
    LaunchEnvironment,
    find_launch_environment,
    leads,
    leave,
    threads_each,
)
from rlhf_exp.processes.failures import USER, code_of
from rlhf_exp.processes.leader import Workers
from rlhf_exp.processes.worker import Member
from rlhf_exp.search.pruning import PruningCallback, RunningTrial
from rlhf_exp.stages.context import StageResult
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.lease import Claim
from rlhf_exp.tracking.create import import_early

if TYPE_CHECKING:
    from torch.distributed import Store

    from rlhf_exp.stages.context import DataModule

Check = Callable[[], None]


class StageExecutor(Protocol):
    """Who does the stages, seen from the process that leads."""

    def run(self, order: StageJob, check: Check) -> StageResult:
        """Do a stage.

        Args:
            order: What to do.
            check: Raises if the lease is lost.
        """

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Let the others go.

        Args:
            error: What ended the experiment, if it was not its end.
            objective: What it has achieved, for the searches of the other processes.
        """


def executor_for(config: Config, place: LaunchEnvironment | None) -> StageExecutor:
    """Return who does the stages.

    Args:
        config: The experiment.
        place: This process's among others, rank 0; `None`: it is alone.

    Raises:
        UserError: There are other processes than the config asks for.
    """
    if config.distributed.strategy is StrategyName.single:
        return InProcessExecutor(config)
    return WorkersExecutor(config) if place is None else JoinedExecutor(config, place)


def settled_place(config: Config) -> LaunchEnvironment | None:
    """Return where this process stands among others, after a look at what the config asks for.

    Raises:
        UserError: There are other processes than the config asks for.
        SystemExit: The same, and rank 0 says so.
    """
    place = find_launch_environment()
    asked = config.distributed.processes
    if place is None:
        return None
    if place.processes != asked:
        if place.rank:
            raise SystemExit(USER)
        raise UserError(
            f"distributed.processes={asked}, but {place.starter} has started {place.processes}; "
            f"start {asked}, or set distributed.processes={place.processes}"
        )
    if config.distributed.strategy is StrategyName.single:
        leave()
        return None
    return place


def follow(config: Config, place: LaunchEnvironment) -> float | None:
    """Do what rank 0 says until the experiment is over; return its objective.

    Raises:
        SystemExit: It failed, or was stopped; rank 0 tells the user.
    """
    silence_console()
    member, store = leader.member(place)
    hand = StageRunner(with_threads(config, place.local_processes))

    def work(values: dict[str, Any]) -> dict[str, Any]:
        if values["config"] != digest_of(config):
            raise UserError(
                f"rank {place.rank} was given another command than rank 0: start all with one"
            )
        return hand.answer(values["order"], partial(polite_interrupts, tell=False))

    objective: float | None = member.serve(store, work)["objective"]
    return objective


class InProcessExecutor:
    """This process, by itself."""

    def __init__(self, config: Config) -> None:
        self.hand = StageRunner(config)

    def run(self, order: StageJob, check: Check) -> StageResult:
        """See `StageExecutor`."""
        return self.hand.do(order, polite_interrupts, check)

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Nobody to tell."""


class WorkersExecutor:
    """Workers on this machine, started for the first stage that needs them."""

    def __init__(self, config: Config) -> None:
        processes = config.distributed.processes
        settled = with_threads(config, processes)
        self.workers = Workers(processes, settled.distributed.threads or 1, _work, settled)

    def run(self, order: StageJob, check: Check) -> StageResult:
        """See `StageExecutor`."""
        with unwinding(), polite_interrupts(lambda: self.workers.saving) as asked:
            return StageResult(**self.workers.run(asdict(order), asked))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """See `StageExecutor`."""
        self.workers.end(code_of(error))


class JoinedExecutor:
    """This process, rank 0, and all others that were started with it."""

    def __init__(self, config: Config, place: LaunchEnvironment) -> None:
        self.config = config
        self.leader = leader.leader(place)
        self.hand = StageRunner(with_threads(config, place.local_processes))

    def run(self, order: StageJob, check: Check) -> StageResult:
        """See `StageExecutor`."""

        def work(_: object) -> dict[str, Any]:
            return asdict(self.hand.do(order, polite_interrupts, check))

        words = {"order": asdict(order), "config": digest_of(self.config)}
        return StageResult(**self.leader.run(words, work))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """See `StageExecutor`."""
        self.leader.end(error, objective=objective)


def _work(config: Config, member: Member, store: Store) -> None:
    """What a started worker runs."""
    if member.place.rank:
        silence_console()
    hand = StageRunner(config)
    member.serve(store, lambda values: hand.answer(values, member.saving))


def with_threads(config: Config, here: int) -> Config:
    """Return the config with the number of threads of each of the processes `here`."""
    threads = threads_each(config.distributed.threads, here)
    return replace(config, distributed=replace(config.distributed, threads=threads))


def digest_of(config: Config) -> str:
    """Return what tells one config from another."""
    return key_of(to_dict(config))


def silence_console() -> None:
    """Leave the console to rank 0; errors reach it through the line to the leader."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


Interrupts = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""While entered, Ctrl-C only asks to stop; yields whether it has."""


@dataclass(frozen=True)
class StageJob:
    """What a process needs to take part in a stage, beside the config.

    Attributes:
        stage: Its name.
        key: Its key.
        folder: Its staging folder.
        models: Model folder or hub id by role.
        parents: The keys of what it starts from, by role.
        inputs: Digests of their weights.
        claim: The lease under which it is made; `None` for what is not to be kept.
        cache: Folder of what can be computed again.
        probe: Whether only to measure a few iterations.
        trial: The trial of a search that this is, which may give it up.
    """

    stage: str
    key: str
    folder: str
    models: dict[str, str]
    parents: dict[str, str]
    inputs: dict[str, str]
    claim: Claim | None
    cache: str
    probe: bool = False
    trial: RunningTrial | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StageJob:
        """Return the order that `asdict` made JSON values of."""
        claim, trial = values["claim"], values["trial"]
        given = {
            "claim": None if claim is None else Claim(**claim),
            "trial": None if trial is None else RunningTrial.from_json(trial),
        }
        return cls(**values | given)


class StageRunner:
    """Does one stage after another in this process, with the data loaded once.

    Args:
        config: The experiment.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def materials(self) -> DataModule:
        """The data; late, for a run that finds everything done must not load torch."""
        from rlhf_exp.stages.context import DataModule

        return DataModule(self.config.data)

    def do(
        self, order: StageJob, interrupts: Interrupts, check: Callable[[], None] | None = None
    ) -> StageResult:
        """Run the stage.

        Args:
            order: What to do.
            interrupts: What Ctrl-C means meanwhile.
            check: Raises if this process may no longer write; by default it reads the claim.
        """
        if leads() and not order.probe:
            import_early(self.config.tracking.mode.value)
        from rlhf_exp.stages.context import StageContext
        from rlhf_exp.training.memory import ProbeFinished, Recorder

        # By name and late: a plan must not load torch.
        stage = importlib.import_module(f"rlhf_exp.stages.{module_of(self.config, order.stage)}")
        context = StageContext(
            stage=order.stage,
            key=order.key,
            folder=Path(order.folder),
            cache=Path(order.cache),
            models=order.models,
            parents=order.parents,
            inputs=order.inputs,
            materials=self.materials,
            before_write=check or (order.claim.check if order.claim else _allowed),
            polite_interrupts=_at_once if order.probe else interrupts,
            probe=Recorder() if order.probe else None,
            given_up=PruningCallback(order.trial, Path(order.folder)) if order.trial else None,
        )
        try:
            result: StageResult = stage.run(self.config, context)
        except ProbeFinished as end:
            return StageResult({}, measured=end.measured)
        return result

    def answer(self, values: dict[str, Any], interrupts: Interrupts) -> dict[str, Any]:
        """Run the stage of an order that came as JSON values; return its result as such."""
        return asdict(self.do(StageJob.from_json(values), interrupts))


@contextmanager
def _at_once() -> Iterator[Callable[[], bool]]:
    """Leave Ctrl-C as it is: there is nothing to save."""
    yield lambda: False


def _allowed() -> None:
    """Writing is always allowed."""


TERMINATED = 143  # what shells report for a process that SIGTERM ended


@contextmanager
def polite_interrupts(
    saves: Callable[[], bool] = lambda: True, tell: bool = True
) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the user has pressed Ctrl-C inside the block.

    Args:
        saves: Whether there is something to save now.
        tell: Whether to say what happens; one of several processes does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set() or not saves():
            raise KeyboardInterrupt
        asked.set()
        if tell:
            print(
                "\ninterrupted: saving at the end of this iteration (Ctrl-C again leaves at once, "
                "back to the last checkpoint)",
                file=sys.stderr,
                flush=True,
            )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        # Asked for during the last iteration: the block is done, what comes after it is not wanted.
        raise KeyboardInterrupt


@contextmanager
def unwinding() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit(143)`, so that what is held is let go, and others end, too.

    A handler that somebody else has set stays.
    """
    in_charge = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if in_charge:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
