"""Decoding by graphs: of a recorder that replays operations on the tensors they were recorded with.

What Python does anew at each step is not done again, so a tensor that does not keep its address, or
a number that changes on the host, shows as a wrong sample.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - there is no public one
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.rollout import sampler
from rlhf_exp.rollout.sampler import SamplingParams, rows_of_step, sample
from rlhf_exp.rollout.step_graphs import NoWaits, StepGraphs
from tests.rollout.test_sampler import FAMILIES, VOCABULARY

EOS = 7


class Operations(TorchDispatchMode):
    """Notes operations with their tensors, and what they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []
        self.overwritten: dict[int, tuple[Any, Any]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("item.default", "_local_scalar_dense.default"):
            raise RuntimeError("operation not permitted when stream is capturing\n")
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = args[number] if number < len(args) else kwargs[argument.name]
                storage = target.untyped_storage()
                if storage.data_ptr() not in self._made | self.overwritten.keys():
                    self.overwritten[storage.data_ptr()] = storage, storage.clone()
        given = {value.untyped_storage().data_ptr() for value in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self._made |= {value.untyped_storage().data_ptr() for value in tensors(out)} - given
        self.noted.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.noted:
            for again, recorded in zip(tensors(func(*args, **kwargs)), tensors(out), strict=True):
                if again.data_ptr() != recorded.data_ptr():
                    recorded.copy_(again)


def tensors(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


class OperationRecorder:
    """Stands in for CUDA graphs: a step is done, and then recorded without doing anything."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        step()
        with Operations() as operations:
            step()
        for storage, before in operations.overwritten.values():
            storage.copy_(before)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            operations.replay()

        return replay


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def prompts(rows: int = 23) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (rows,), generator=generator)
    tokens = torch.randint(8, VOCABULARY, (rows, 8), generator=generator)
    return Prompts(tokens, lengths, torch.arange(rows), torch.arange(rows))


def answer(model: PreTrainedModel, **changes: Any) -> Samples:
    """Answer 23 prompts in 15 slots; most responses end early, so that some slots are idle."""
    params = SamplingParams(24, 1.0, 15, EOS, 0, end_ids=frozenset(range(8, 12)), **changes)
    block: nn.Module = decoder_parts(model).blocks[1]
    return sample(model, prompts(), params, seed=5, capture=block, close=EOS)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> OperationRecorder:
    """Decode as on an accelerator, by graphs of operations."""
    found = OperationRecorder()
    monkeypatch.setattr(sampler, "on_accelerator", lambda device: True)
    monkeypatch.setattr(sampler, "step_recorder", lambda device: found)
    return found


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "llama", "gemma3"])
def test_samples_by_graphs_are_those_without(
    recorder: OperationRecorder, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    by_graphs = answer(build(family))
    assert recorder.replayed > recorder.recorded > 1
    monkeypatch.undo()  # on a CPU, token by token
    expected = answer(build(family))
    assert torch.equal(by_graphs.tokens, expected.tokens)
    assert torch.equal(by_graphs.finish, expected.finish)
    assert len(set(expected.response_lengths.tolist())) > 3, "rows end at different tokens"
    for name in ("logprobs", "states", "closing"):
        found, wanted = getattr(by_graphs, name), getattr(expected, name)
        assert torch.allclose(found, wanted, atol=1e-5), name


def test_a_truncated_distribution_by_graphs(
    recorder: OperationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_graphs = answer(build("llama"), top_k=5)
    monkeypatch.undo()
    assert torch.equal(by_graphs.tokens, answer(build("llama"), top_k=5).tokens)


def test_the_second_call_compares_nothing_any_more(recorder: OperationRecorder) -> None:
    model = build("gpt_neox")
    first = answer(model)
    steps = recorder.replayed
    passes = 0

    def count(*args: object) -> None:
        nonlocal passes
        passes += 1

    model.gpt_neox.register_forward_pre_hook(count)
    recorded = recorder.recorded
    assert torch.equal(answer(model).tokens, first.tokens)
    # Each shape is done once by Python and recorded once; the first call has replayed it once more.
    assert recorder.replayed == 2 * steps - recorded
    assert passes <= 2 * recorded + 4, "and a few prefills"


def test_a_step_that_reads_the_device_is_decoded_without_graphs(
    recorder: OperationRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    expected = answer(model)

    def reads(module: nn.Module, args: Any, output: Any) -> None:
        output.max().item()

    other = build("llama")
    other.model.layers[1].mlp.register_forward_hook(reads)
    replayed = recorder.replayed
    with caplog.at_level(logging.WARNING):
        assert torch.equal(answer(other).tokens, expected.tokens)
        assert torch.equal(answer(other).tokens, expected.tokens)
    assert recorder.replayed == replayed
    assert caplog.text.count("without graphs") == 1, "one warning for a model"
    assert "not permitted" in caplog.text


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda values: values.max().item(), True),
        (lambda values: bool((values > 0).any()), True),
        (lambda values: (values > 0).nonzero(), True),
        (lambda values: values[values > 0], True),
        (lambda values: values.index_put_((values > 0,), torch.tensor(0.0)), True),
        (lambda values: values[torch.tensor([2, 0])], False),
        (lambda values: values.softmax(0).cumsum(0).masked_fill_(values > 0, 0.0), False),
        (lambda values: values.to(torch.bfloat16), False),
    ],
)
def test_what_the_host_would_wait_for_is_known_before_it_is_recorded(
    work: Callable[[Tensor], object], waits: bool
) -> None:
    values = torch.linspace(-1.0, 1.0, 5)
    refused: AbstractContextManager[Any] = nullcontext()
    if waits:
        refused = pytest.raises(RuntimeError, match="waits for the device")
    with refused, NoWaits():
        work(values)


def test_other_threads_may_wait_while_a_step_is_tried() -> None:
    """Such as the one that trains while the next iteration is sampled, or that scores."""
    found: list[float] = []
    with NoWaits():
        other = threading.Thread(target=lambda: found.append(torch.ones(3).sum().item()))
        other.start()
        other.join()
    assert found == [3.0]


def test_a_replay_that_draws_other_tokens_is_found_and_undone(
    recorder: OperationRecorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answer(build("llama"))
    record = recorder.record

    def wrong(step: Callable[[], object]) -> Callable[[], object]:
        replay = record(step)

        def replay_and_spoil() -> None:
            replay()
            graphs[-1]._state[1] += 1  # other tokens to feed

        return replay_and_spoil

    graphs: list[StepGraphs] = []
    begin = StepGraphs.__init__

    def noted(self: StepGraphs, *args: Any) -> None:
        begin(self, *args)
        graphs.append(self)

    monkeypatch.setattr(recorder, "record", wrong)
    monkeypatch.setattr(StepGraphs, "__init__", noted)
    with caplog.at_level(logging.WARNING):
        found = answer(build("llama"))
    assert "gives other tokens by a CUDA graph" in caplog.text
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_the_host_looks_at_a_stride_while_the_next_one_runs(
    recorder: OperationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def read_later(values: Tensor) -> Callable[[], list[list[int]]]:
        number = sum(event.startswith("decoded") for event in order)
        order.append(f"decoded {number}")

        def read() -> list[list[int]]:
            order.append(f"read {number}")
            return values.tolist()

        return read

    monkeypatch.setattr(sampler, "read_later", read_later)
    sample(build("llama"), prompts(4), SamplingParams(33, 1.0, 4, -1, 0), seed=0)
    # One token by the prefill, then four strides of eight: the host knows that they are the last.
    assert order == [
        *("decoded 0", "decoded 1", "read 0", "decoded 2", "read 1", "decoded 3", "read 2"),
        "read 3",
    ]


@pytest.mark.parametrize(
    ("active", "slots", "rows"),
    [(1, 64, 1), (3, 64, 3), (9, 64, 10), (33, 64, 40), (49, 64, 56), (64, 64, 64), (49, 50, 50)],
)
def test_few_numbers_of_rows_serve_all_steps(active: int, slots: int, rows: int) -> None:
    """Between 32 and 64 there are 40, 48 and 56: at most a quarter is idle."""
    assert rows_of_step(active, slots) == rows
