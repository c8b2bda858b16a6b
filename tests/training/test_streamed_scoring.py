"""Responses are scored while others are sampled, and come to what scoring them afterwards does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.distributed.world import world_of
from rlhf_exp.errors import UserError
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.training.scorers import CentralScorer
from rlhf_exp.training.streamed_scoring import ROUNDS, StreamedScorer

ROWS, ANSWER = 2 * ROUNDS, 3
REQUEST = RolloutRequest(SamplingParams(ANSWER, 1.0, ROWS, eos_id=0, pad_id=9), seed=0)
PROMPTS = Prompts(
    tokens=torch.arange(2 * ROWS).view(ROWS, 2) + 10,
    lengths=torch.tensor([1, 2] * ROUNDS),
    index=torch.arange(ROWS),
    rollout=torch.arange(ROWS),
)


def samples_of(prompts: Prompts) -> Samples:
    """Return responses of three tokens, of which row r has r % 3 + 1 of content."""
    tokens = torch.full((ROWS, 2 + ANSWER), 9)
    for row, length in enumerate(prompts.lengths.tolist()):
        tokens[row, :length] = prompts.tokens[row, :length]
        tokens[row, length : length + ANSWER] = torch.arange(ANSWER) + 100 * row
    return Samples(
        tokens=tokens,
        prompt_lengths=prompts.lengths,
        response_lengths=torch.full((ROWS,), ANSWER),
        content_lengths=torch.arange(ROWS) % 3 + 1,
        finish=torch.zeros(ROWS, dtype=torch.int64),
        index=prompts.index,
        logprobs=torch.zeros(ROWS, ANSWER),
    )


class Engine:
    """Tells of some rows in a mixed order, and answers when `then` returns."""

    def __init__(self, told: list[int], then: Callable[[], object] = lambda: None) -> None:
        self.told, self.then = told, then

    def answer(self, prompts: Prompts, request: RolloutRequest) -> Samples:
        samples = samples_of(prompts)
        assert request.on_row is not None
        for row in self.told:
            start = int(prompts.lengths[row])
            response = samples.tokens[row, start : start + ANSWER].tolist()
            request.on_row(row, response, int(samples.content_lengths[row]))
        self.then()
        return samples


def sums(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
    """Score by the sum of a row's tokens, without what stands beyond its content."""
    columns = torch.arange(tokens.shape[1])
    inside = columns < (prompt_lengths + content_lengths)[:, None]
    return ((tokens * inside).sum(1) + 0.5 * prompt_lengths).float()


def asked(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    return samples.tokens, samples.prompt_lengths, samples.content_lengths


def streamed(scorer: Any, engine: Engine) -> StreamedScorer:
    inner: Any = engine
    return StreamedScorer(scorer, inner, REQUEST)


@pytest.mark.parametrize("told", [[], [7, 3, 5], list(reversed(range(ROWS)))])
def test_scores_are_those_of_the_rows(told: list[int]) -> None:
    """However many the engine tells of before it is done."""
    scorer = streamed(sums, Engine(told))
    samples = scorer.sample(PROMPTS)
    assert torch.equal(scorer(*asked(samples)), sums(*asked(samples)))


def test_the_first_are_scored_while_others_are_sampled() -> None:
    """The engine does not answer before two rounds are scored, each of an eighth of the rows."""
    sizes: list[int] = []
    enough = threading.Event()

    def scorer(*rows: Tensor) -> Tensor:
        sizes.append(len(rows[0]))
        if len(sizes) == 2:
            enough.set()
        return sums(*rows)

    in_time: list[bool] = []
    engine = Engine([9, 2, 4, 11, 0], lambda: in_time.append(enough.wait(30)))
    beside = streamed(scorer, engine)
    samples = beside.sample(PROMPTS)
    assert in_time == [True]
    assert torch.equal(beside(*asked(samples)), sums(*asked(samples)))
    assert sizes == [2] * ROUNDS


def test_other_responses_are_scored_as_they_are() -> None:
    scorer = streamed(sums, Engine([1]))
    samples = scorer.sample(PROMPTS)
    others = (samples.tokens + 1, *asked(samples)[1:])
    assert torch.equal(scorer(*others), sums(*others))
    assert torch.equal(scorer(*asked(samples)), sums(*asked(samples))), "nothing is kept"


def test_an_error_of_the_scorer_is_raised_where_scores_are_asked_for() -> None:
    def failing(*rows: Tensor) -> Tensor:
        raise UserError("the server is gone")

    scorer = streamed(failing, Engine(list(range(ROWS))))
    samples = scorer.sample(PROMPTS)
    with pytest.raises(UserError, match="the server is gone"):
        scorer(*asked(samples))


def test_the_thread_ends_with_an_engine_that_fails() -> None:
    def failing() -> None:
        raise RuntimeError("out of tokens")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of tokens"):
        streamed(sums, Engine([1, 2, 3], failing)).sample(PROMPTS)
    for thread in threading.enumerate():
        if thread.name == "scoring":
            thread.join(30)
    assert threading.active_count() <= before


def one_process(rank: int, folder: Path) -> None:
    """Score through the first process, while both exchange something else."""
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with world_of("float32", threads=1, strategy="ddp") as world:
        main: Any = sums if world.is_main else None
        exchanged: list[int] = []
        engine = Engine(list(range(ROWS)), lambda: exchanged.extend(world.all_gather_object(rank)))
        scorer = streamed(CentralScorer(main, world.for_thread()), engine)
        samples = scorer.sample(PROMPTS)
        scores = scorer(*asked(samples))
    torch.save((exchanged, scores), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_one_process_scores_for_all_beside_sampling(tmp_path: Path) -> None:
    spawn(one_process, (tmp_path,), nprocs=2)
    expected = sums(*asked(samples_of(PROMPTS)))
    for rank in range(2):
        exchanged, scores = torch.load(tmp_path / f"{rank}.pt")
        assert exchanged == [0, 1]
        assert torch.equal(scores, expected)
