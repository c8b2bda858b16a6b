"""Rollout engines: who answers prompts while a stage trains, whatever holds the weights meanwhile.

An engine samples from a policy's weights as they were when it was last refreshed. One engine serves
training and validation, each with a request of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.rollout.transcript import OnRow, Stopper


@dataclass(frozen=True)
class RolloutRequest:
    """How prompts are to be answered.

    Attributes:
        params: lengths, temperature, truncation, end tokens.
        seed: of the noise; a response is a function of it, the prompt with its `rollout` number,
            and the weights.
        stopper: finds stop strings, or None.
        capture: whether to keep the states that enter the first training block; `Samples.states`
            stays None where the engine does not have them exactly.
        close: a token whose state after each response's content is kept too, or None.
        on_ended: told how many responses have ended, for a progress display, or None.
        on_row: told each response as it ends, or None; an engine that does not know them before all
            have ended need not call it.
    """

    params: SamplingParams
    seed: int
    stopper: Stopper | None = None
    capture: bool = False
    close: int | None = None
    on_ended: Callable[[int], None] | None = None
    on_row: OnRow | None = None


class RolloutEngine(Protocol):
    """Answers prompts with a policy's weights as of the last refresh."""

    def refresh(self, version: int) -> None:
        """Take over the policy's weights as they are now.

        All processes call it, with sharded parameters gathered (`World.gathered`).

        Args:
            version: changes whenever the weights do; with the last refresh's, nothing is done.
        """

    def answer(self, prompts: Prompts, request: RolloutRequest) -> Samples:
        """Return a response to each of this process's prompts, in their order.

        Args:
            prompts: at least one row, on the policy's device.
            request: how to answer.

        Returns:
            Samples on the policy's device. Their log-probabilities are the engine's own.
        """

    def release(self) -> None:
        """Give memory back that the update needs; the next `refresh` or `answer` takes it again."""

    def close(self) -> None:
        """End what the engine has started; it answers no more."""
