"""The engine that samples an iteration beforehand: order, errors, what a checkpoint holds."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.rollout.ahead_engine import AheadEngine
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import SamplingParams
from tests.rollout.test_sampler import LENGTHS, make_prompts

REQUEST = RolloutRequest(SamplingParams(4, 1.0, 4, 1, pad_id=9), seed=5)
PROMPTS = make_prompts(LENGTHS)
SAMPLES = Samples(
    tokens=torch.tensor([[5, 6, 7, 1], [8, 2, 9, 9]]),
    prompt_lengths=torch.tensor([1, 1]),
    response_lengths=torch.tensor([3, 1]),
    content_lengths=torch.tensor([2, 1]),
    finish=torch.tensor([0, 2]),
    index=torch.tensor([4, 0]),
    logprobs=torch.tensor([[-0.1, -1.0 / 3.0, -2.7182817], [-1e-7, 0.0, 0.0]]),
)


class Gated:
    """An engine that answers when it is let."""

    def __init__(self, error: Exception | None = None) -> None:
        self.gate, self.calls, self.error = threading.Event(), [""][:0], error

    def refresh(self, version: int) -> None:
        self.calls.append(f"refresh {version}")

    def answer(self, prompts: Prompts, request: RolloutRequest) -> Samples:
        assert request is REQUEST
        assert self.gate.wait(20)
        self.calls.append("answer")
        if self.error is not None:
            raise self.error
        return SAMPLES

    def release(self) -> None:
        self.calls.append("release")

    def close(self) -> None:
        self.calls.append("close")


def test_others_wait_until_the_iteration_is_sampled() -> None:
    inner = Gated()
    engine = AheadEngine(inner, REQUEST)
    engine.refresh(0)
    engine.begin(1, PROMPTS)
    engine.release()  # an update begins; sampling goes on
    assert inner.calls == ["refresh 0"]
    threading.Timer(0.1, inner.gate.set).start()
    engine.refresh(1)
    assert inner.calls == ["refresh 0", "answer", "refresh 1"]
    assert engine.take(1) is not None
    assert engine.take(1) is None
    engine.close()
    assert inner.calls[-1] == "close"


def test_responses_of_another_iteration_are_not_taken() -> None:
    inner = Gated()
    inner.gate.set()
    engine = AheadEngine(inner, REQUEST)
    engine.begin(4, PROMPTS)
    assert engine.take(5) is None


def test_an_error_in_the_thread_is_raised_where_the_responses_are_taken() -> None:
    inner = Gated(RuntimeError("the sampler broke"))
    inner.gate.set()
    engine = AheadEngine(inner, REQUEST)
    engine.begin(1, PROMPTS)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        engine.take(1)


def test_a_checkpoint_gives_back_the_same_bits() -> None:
    inner = Gated()
    inner.gate.set()
    first, second = AheadEngine(inner, REQUEST), AheadEngine(inner, REQUEST)
    assert first.state() is None
    first.begin(3, PROMPTS)
    state = json.loads(json.dumps(first.state()))
    second.load_state(state["iteration"], state["rows"])
    found = second.take(3)
    assert found is not None
    for name, value in vars(SAMPLES).items():
        if value is not None:
            assert torch.equal(getattr(found, name), value), name
    kept = first.take(3)  # what was asked for its state still has them
    assert kept is not None
    assert torch.equal(kept.tokens, SAMPLES.tokens)
