"""Who does the stages of an experiment: this process, workers that it starts, or all that joined.

Planning, leases, waiting, publishing and the report are the leader's alone, outside of any process
group. The others do what they are told, and end when the leader does.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_exp.config.load import to_dict
from rlhf_exp.config.root import Config
from rlhf_exp.config.running import Strategy
from rlhf_exp.distributed import joined
from rlhf_exp.distributed.failure import USER, code_of
from rlhf_exp.distributed.member import Member
from rlhf_exp.distributed.place import Place, find_place, leave, threads_each
from rlhf_exp.distributed.workers import Workers
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.interrupt import polite_interrupts, unwinding
from rlhf_exp.pipeline.order import Hand, Order
from rlhf_exp.stages.result import StageResult
from rlhf_exp.store.fingerprint import key_of

if TYPE_CHECKING:
    from torch.distributed import Store

Check = Callable[[], None]


class Crew(Protocol):
    """Who does the stages, seen from the process that leads."""

    def run(self, order: Order, check: Check) -> StageResult:
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


def crew_for(config: Config, place: Place | None) -> Crew:
    """Return who does the stages.

    Args:
        config: The experiment.
        place: This process's among others, rank 0; `None`: it is alone.

    Raises:
        UserError: There are other processes than the config asks for.
    """
    if config.distributed.strategy is Strategy.single:
        return Single(config)
    return Started(config) if place is None else Joined(config, place)


def settled_place(config: Config) -> Place | None:
    """Return where this process stands among others, after a look at what the config asks for.

    Raises:
        UserError: There are other processes than the config asks for.
        SystemExit: The same, and rank 0 says so.
    """
    place = find_place()
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
    if config.distributed.strategy is Strategy.single:
        leave()
        return None
    return place


def follow(config: Config, place: Place) -> float | None:
    """Do what rank 0 says until the experiment is over; return its objective.

    Raises:
        SystemExit: It failed, or was stopped; rank 0 tells the user.
    """
    hush()
    member, store = joined.member(place)
    hand = Hand(with_threads(config, place.local_processes))

    def work(values: dict[str, Any]) -> dict[str, Any]:
        if values["config"] != digest_of(config):
            raise UserError(
                f"rank {place.rank} was given another command than rank 0: start all with one"
            )
        return hand.answer(values["order"], partial(polite_interrupts, tell=False))

    objective: float | None = member.serve(store, work)["objective"]
    return objective


class Single:
    """This process, by itself."""

    def __init__(self, config: Config) -> None:
        self.hand = Hand(config)

    def run(self, order: Order, check: Check) -> StageResult:
        """See `Crew`."""
        return self.hand.do(order, polite_interrupts, check)

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Nobody to tell."""


class Started:
    """Workers on this machine, started for the first stage that needs them."""

    def __init__(self, config: Config) -> None:
        processes = config.distributed.processes
        settled = with_threads(config, processes)
        self.workers = Workers(processes, settled.distributed.threads or 1, _work, settled)

    def run(self, order: Order, check: Check) -> StageResult:
        """See `Crew`."""
        with unwinding(), polite_interrupts(lambda: self.workers.saving) as asked:
            return StageResult(**self.workers.run(asdict(order), asked))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """See `Crew`."""
        self.workers.end(code_of(error))


class Joined:
    """This process, rank 0, and all others that were started with it."""

    def __init__(self, config: Config, place: Place) -> None:
        self.config = config
        self.leader = joined.leader(place)
        self.hand = Hand(with_threads(config, place.local_processes))

    def run(self, order: Order, check: Check) -> StageResult:
        """See `Crew`."""

        def work(_: object) -> dict[str, Any]:
            return asdict(self.hand.do(order, polite_interrupts, check))

        words = {"order": asdict(order), "config": digest_of(self.config)}
        return StageResult(**self.leader.run(words, work))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """See `Crew`."""
        self.leader.end(error, objective=objective)


def _work(config: Config, member: Member, store: Store) -> None:
    """What a started worker runs."""
    if member.place.rank:
        hush()
    hand = Hand(config)
    member.serve(store, lambda values: hand.answer(values, member.saving))


def with_threads(config: Config, here: int) -> Config:
    """Return the config with the number of threads of each of the processes `here`."""
    threads = threads_each(config.distributed.threads, here)
    return replace(config, distributed=replace(config.distributed, threads=threads))


def digest_of(config: Config) -> str:
    """Return what tells one config from another."""
    return key_of(to_dict(config))


def hush() -> None:
    """Leave the console to rank 0; errors reach it through the line to the leader."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
