"""One-step-off rollouts: the next iteration is sampled while this one trains.

Its responses come from the weights before this iteration's updates; importance weights make up for
that (`algo/importance.py`). Source: Noukhovitch et al. 2024, asynchronous RLHF.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest


class AheadEngine:
    """Answers as another engine does, and samples an iteration's responses beforehand.

    Whatever else is asked of it waits until that is done, so that the other engine is never used by
    two at a time and what is sampled does not depend on timing.

    Args:
        engine: Samples; its weights stay as they were refreshed while the policy trains, and its
            `answer` communicates with no other process of the training.
        request: How training prompts are answered.
    """

    def __init__(self, engine: RolloutEngine, request: RolloutRequest) -> None:
        self._engine, self._request = engine, request
        self._pending: _Pending | None = None

    def begin(self, iteration: int, prompts: Prompts) -> None:
        """Begin to answer an iteration's prompts, with the weights of the last refresh."""
        assert self._pending is None, "an iteration is sampled only one ahead"
        self._pending = _Pending(iteration, lambda: self._engine.answer(prompts, self._request))

    def take(self, iteration: int) -> Samples | None:
        """Return what was sampled for this iteration, on the CPU; `None` if nothing was.

        Raises:
            Exception: what sampling has raised.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.iteration != iteration:
            return None
        return pending.samples()

    def state(self) -> dict[str, Any] | None:
        """Return this process's responses of the next iteration as JSON values; `None`: none."""
        if self._pending is None:
            return None
        return {"iteration": self._pending.iteration, "rows": _to_rows(self._pending.samples())}

    def load_state(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take back this process's rows of what `state` returned."""
        samples = _from_rows(rows, self._request.params.pad_id)
        self._pending = _Pending(iteration, lambda: samples)

    def refresh(self, version: int) -> None:
        """See `RolloutEngine`."""
        self._wait()
        self._engine.refresh(version)

    def answer(self, prompts: Prompts, request: RolloutRequest) -> Samples:
        """See `RolloutEngine`."""
        self._wait()
        return self._engine.answer(prompts, request)

    def release(self) -> None:
        """Keep the memory: sampling goes on beside the update."""

    def close(self) -> None:
        """See `RolloutEngine`."""
        self._wait()
        self._engine.close()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.thread.join()


class _Pending:
    """Samples that a thread is making."""

    def __init__(self, iteration: int, sample: Callable[[], Samples]) -> None:
        self.iteration = iteration
        self._sample = sample
        self._samples: Samples | None = None
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()
        # A daemon: a process that is told to end must not wait for it.
        self.thread = threading.Thread(target=self._run, name="rollouts ahead", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._threads)  # counts for a thread alone
            # Copied to the host: that waits for this thread's work on a device, and for it alone.
            self._samples = self._sample().to(torch.device("cpu"))
        except BaseException as error:
            self._error = error

    def samples(self) -> Samples:
        self.thread.join()
        if self._error is not None:
            raise self._error
        assert self._samples is not None, "the thread has ended without samples or an error"
        return self._samples


_NUMBERS = ("prompt_lengths", "content_lengths", "finish", "index")


def _to_rows(samples: Samples) -> list[dict[str, Any]]:
    """Return responses without padding, as JSON values; float32 numbers survive it exactly."""
    whole = (samples.prompt_lengths + samples.response_lengths).tolist()
    numbers = {name: getattr(samples, name).tolist() for name in _NUMBERS}
    return [
        {name: values[row] for name, values in numbers.items()}
        | {
            "tokens": samples.tokens[row, :length].tolist(),
            "logprobs": samples.logprobs[row, : int(samples.response_lengths[row])].tolist(),
        }
        for row, length in enumerate(whole)
    ]


def _from_rows(rows: Sequence[Mapping[str, Any]], pad_id: int) -> Samples:
    def padded(name: str, padding: int) -> Tensor:
        values = [torch.tensor(row[name]) for row in rows]
        return pad_sequence(values, batch_first=True, padding_value=padding)

    return Samples(
        tokens=padded("tokens", pad_id),
        logprobs=padded("logprobs", 0),
        response_lengths=torch.tensor([len(row["logprobs"]) for row in rows]),
        **{name: torch.tensor([row[name] for row in rows]) for name in _NUMBERS},
    )
