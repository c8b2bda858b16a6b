"""The vLLM engine and the real worker, over a stand-in for vLLM itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import FinishReason, Prompts, Samples
from rlhf_exp.distributed.world import Setup, World, world_of
from rlhf_exp.errors import UserError
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.processes.failures import FailedElsewhere
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.vllm import server as server_module
from rlhf_exp.vllm.engine import VllmEngine, VllmSettings
from rlhf_exp.vllm.server import LocalServer, RemoteServer, Server, ServerGone
from tests.vllm.stand_in import StandInLLM, StandInServer, stand_in_servers

PAD, EOS, ROWS = 0, 1, 6


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_RETRY_S", 0.01)


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, padding and end first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<eos>": EOS}
    vocabulary |= {letter: number + 2 for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def a_policy(tied: bool = False) -> Policy:
    shape = Architecture("llama", 1, 64, 2, 64, 258, 64, tied=tied)
    model = build_causal_lm(shape, seed=5, eos_id=EOS, pad_id=PAD)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # so that tokens are not all alike to it
    return Policy(model, value_head=False)


def some_prompts(rows: int = ROWS) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 258, (rows, 5), generator=generator)
    lengths = torch.tensor([5 - row % 3 for row in range(rows)])
    return Prompts(tokens, lengths, torch.arange(rows) + 40, torch.arange(rows) + 7)


def a_request(stopper: Stopper | None = None, **params: Any) -> RolloutRequest:
    return RolloutRequest(SamplingParams(8, 1.0, 16, EOS, PAD, **params), 3, stopper)


@contextmanager
def engine_over(
    servers: list[Server], policy: Policy, world: World, owner: str = "ppo-1"
) -> Iterator[VllmEngine]:
    settings = VllmSettings(owner, torch.float32, 64, 16)
    engine = VllmEngine(policy, byte_tokenizer(), servers, settings, world)
    yield engine
    engine.close()


@contextmanager
def lab(
    world: World, *faults: str, count: int = 1, policy: Policy | None = None
) -> Iterator[tuple[VllmEngine, Policy, list[StandInServer]]]:
    policy = policy or a_policy()
    with stand_in_servers(count, *faults) as stand_ins:
        remote: list[Server] = [RemoteServer(stand_in.url) for stand_in in stand_ins]
        with engine_over(remote, policy, world) as engine:
            yield engine, policy, stand_ins


def change(policy: Policy, by: float = 0.3) -> None:
    with torch.no_grad():
        for number, weight in enumerate(policy.model.parameters()):
            noise = torch.Generator().manual_seed(number)
            weight.add_(torch.randn(weight.shape, generator=noise) * by)


def gap(policy: Policy, samples: Samples) -> float:
    own = policy.logprobs(
        samples.tokens, samples.prompt_lengths, samples.response_lengths, temperature=1.0
    )
    return float((own.detach() - samples.logprobs).abs().max())


def test_answers_are_of_the_weights_that_were_pushed(world: World) -> None:
    with lab(world) as (engine, policy, _):
        engine.refresh(0)
        first = engine.answer(some_prompts(), a_request())
        again = engine.answer(some_prompts(), a_request())
        assert torch.equal(first.tokens, again.tokens)
        assert torch.equal(first.logprobs, again.logprobs)
        assert gap(policy, first) < 1e-4
        change(policy)
        assert gap(policy, engine.answer(some_prompts(), a_request())) > 0.1, "the old weights"
        engine.refresh(0)  # of the same version: nothing is pushed
        assert gap(policy, engine.answer(some_prompts(), a_request())) > 0.1
        engine.refresh(1)
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4


def test_samples_are_laid_out_as_the_native_samplers(world: World) -> None:
    prompts = some_prompts()
    with lab(world) as (engine, _, _):
        engine.refresh(0)
        samples = engine.answer(prompts, a_request())
    assert torch.equal(samples.index, prompts.index)
    assert torch.equal(samples.prompt_lengths, prompts.lengths)
    inside = response_mask(samples.response_lengths, samples.logprobs.shape[1])
    assert (samples.logprobs[~inside] == 0).all()
    assert (samples.logprobs[inside] < 0).all()
    for row in range(ROWS):
        start = int(prompts.lengths[row])
        end = start + int(samples.response_lengths[row])
        assert torch.equal(samples.tokens[row, :start], prompts.tokens[row, :start])
        assert (samples.tokens[row, end:] == PAD).all()


def test_ends_are_by_our_own_rules(world: World) -> None:
    """A row ends with an end token, a stop string or the most tokens, whatever vLLM makes of it."""
    with lab(world) as (engine, _, _):
        engine.refresh(0)
        plain = engine.answer(some_prompts(), a_request())
        start = int(plain.prompt_lengths[0])
        said = plain.tokens[0, start : start + 8].tolist()
        assert plain.finish[0] == FinishReason.LENGTH
        third = said[2]
        assert third not in said[:2]
        by_token = engine.answer(some_prompts(), a_request(end_ids=frozenset({third})))
        assert by_token.finish[0] == FinishReason.EOS
        assert (by_token.response_lengths[0], by_token.content_lengths[0]) == (3, 2)
        # The stand-in goes on after a stop string: what follows is cut off.
        tokenizer = byte_tokenizer()
        row = next(n for n in range(ROWS) if tokenizer.decode([int(_token(plain, n, 3))]).isalnum())
        stop = tokenizer.decode([int(_token(plain, row, 3))])
        stopped = engine.answer(some_prompts(), a_request(Stopper(tokenizer, [stop])))
        assert stopped.finish[row] == FinishReason.STOP
        assert stopped.response_lengths[row] <= 4
        length = int(stopped.response_lengths[row])
        assert torch.equal(stopped.logprobs[row, :length], plain.logprobs[row, :length])


def _token(samples: Samples, row: int, number: int) -> int:
    return int(samples.tokens[row, int(samples.prompt_lengths[row]) + number])


def test_a_stop_that_vllm_alone_sees_is_none(world: World) -> None:
    stopper = Stopper(byte_tokenizer(), ["never said"])
    with lab(world, "stops early") as (engine, _, _):
        engine.refresh(0)
        samples = engine.answer(some_prompts(), a_request(stopper))
        plain = engine.answer(some_prompts(), a_request())
    assert torch.equal(samples.tokens, plain.tokens)


@pytest.mark.parametrize("fault", ["forgets", "keeps its cache"])
def test_weights_that_did_not_take_effect_are_an_error(world: World, fault: str) -> None:
    with lab(world, fault) as (engine, policy, _):
        engine.refresh(0)
        engine.answer(some_prompts(), a_request())
        change(policy, by=1.0)
        with pytest.raises(UserError, match=r"nats a token from the policy's.*also after a new"):
            engine.refresh(1)


def test_the_cache_of_prompts_is_reset_at_pushes_and_requests(world: World) -> None:
    with lab(world) as (engine, policy, _):
        engine.refresh(0)
        assert StandInLLM.resets == 2  # the push, and the answers that are checked
        engine.answer(some_prompts(), a_request())
        assert StandInLLM.resets == 3
        change(policy)
        engine.refresh(1)
        assert StandInLLM.resets == 5


def test_a_failed_transfer_is_repeated_on_a_new_engine(world: World) -> None:
    with lab(world, "fails") as (engine, policy, _):
        engine.refresh(0)
        change(policy)
        engine.refresh(1)
        assert StandInLLM.updates == 3
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4


def test_a_server_that_dies_is_given_the_weights_again(world: World) -> None:
    with lab(world) as (engine, policy, stand_ins):
        engine.refresh(0)
        expected = engine.answer(some_prompts(), a_request())
        change(policy)  # training has gone on: what is pushed again is what was pushed
        stand_ins[0].deaths_left = 2
        found = engine.answer(some_prompts(), a_request())
        assert stand_ins[0].deaths_left == 0
        stand_ins[0].forget()  # between two requests
        later = engine.answer(some_prompts(), a_request())
    for samples in (found, later):
        assert torch.equal(samples.tokens, expected.tokens)
        assert torch.equal(samples.logprobs, expected.logprobs)


def test_a_server_that_dies_again_and_again_is_an_error(world: World) -> None:
    with lab(world) as (engine, _, stand_ins):
        engine.refresh(0)
        stand_ins[0].deaths_left = 99
        with pytest.raises(UserError, match="fails again and again"):
            engine.answer(some_prompts(), a_request())


@pytest.mark.parametrize("rows", [1, ROWS])
def test_servers_share_the_rows(world: World, rows: int) -> None:
    with lab(world) as (engine, _, _):
        engine.refresh(0)
        alone = engine.answer(some_prompts(rows), a_request())
    with lab(world, count=2) as (engine, _, stand_ins):
        engine.refresh(0)
        together = engine.answer(some_prompts(rows), a_request())
        assert {one.worker.weights for one in stand_ins} == {engine._weights}
    assert torch.equal(alone.tokens, together.tokens)
    assert torch.equal(alone.logprobs, together.logprobs)


def test_a_server_is_one_runs_at_a_time(world: World) -> None:
    with lab(world) as (engine, policy, stand_ins):
        engine.refresh(0)
        remote: list[Server] = [RemoteServer(stand_ins[0].url)]
        with engine_over(remote, policy, world, owner="ppo-2") as other:
            with pytest.raises(UserError, match="in use by ppo-1, whose last request was 0 s ago"):
                other.refresh(0)
            engine.close()
            other.refresh(0)


def test_a_server_wants_its_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_servers(1) as stand_ins:
        stand_ins[0].handler.key = "abc"
        with pytest.raises(UserError, match=r"the key in RLHF_EXP_VLLM_KEY is another"):
            RemoteServer(stand_ins[0].url).start()
        monkeypatch.setenv("RLHF_EXP_VLLM_KEY", "abc")
        RemoteServer(stand_ins[0].url).start()


def test_an_address_without_a_server_is_named() -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9 did not answer for 0 s.*rlhf-exp vllm-serv"):
        RemoteServer("http://127.0.0.1:9").start(patience_s=0.0)


def test_something_else_at_the_address_is_named(world: World) -> None:
    with stand_in_servers(1) as stand_ins:
        stand_ins[0].worker.status = dict  # type: ignore[assignment,method-assign]
        with pytest.raises(UserError, match=r"ppo\.generation\.urls: at http.* is no server"):
            RemoteServer(stand_ins[0].url).start()


def test_a_tied_head_is_pushed_once(world: World) -> None:
    with lab(world, policy=a_policy(tied=True)) as (engine, policy, _):
        engine.refresh(0)
        change(policy)
        engine.refresh(1)
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-4


class ThreadWorld(World):
    """A process that is a thread: what processes tell each other goes through a list."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.device, self.processes, self.rank = torch.device("cpu"), len(said), rank
        self.setup, self.is_main = Setup("ddp", "float32"), rank == 0
        self._strategy = None
        self._said, self._barrier = said, barrier

    def all_gather_object(self, item: Any) -> list[Any]:
        self._said[self.rank] = item
        self._barrier.wait(30)
        found = list(self._said)
        self._barrier.wait(30)
        return found


@pytest.mark.parametrize("central", [True, False])
def test_every_process_gets_the_answers_to_its_own_rows(world: World, central: bool) -> None:
    """Two processes with two rows and four, by the main one's server or by one each."""
    prompts = some_prompts()
    shares = (prompts.select(slice(0, 2)), prompts.select(slice(2, 6)))
    said: list[Any] = [None, None]
    policies = [a_policy() for _ in range(2)]  # not in the threads, which share one generator
    barrier = threading.Barrier(2)
    with stand_in_servers(2) as stand_ins:
        alone: list[Server] = [RemoteServer(stand_ins[0].url)]
        with engine_over(alone, a_policy(), world) as engine:
            engine.refresh(0)
            whole = engine.answer(prompts, a_request())

        def process(rank: int) -> Samples:
            own: list[Server] = []
            if rank == 0 or not central:
                own.append(RemoteServer(stand_ins[rank].url))
            settings = VllmSettings("ppo-1", torch.float32, 64, 16, central=central)
            here = ThreadWorld(rank, said, barrier)
            engine = VllmEngine(policies[rank], byte_tokenizer(), own, settings, here)
            engine.refresh(0)
            samples = engine.answer(shares[rank], a_request())
            engine.close()
            return samples

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(process, (0, 1)))
    for samples, rows in zip(found, (slice(0, 2), slice(2, 6)), strict=True):
        width, columns = samples.tokens.shape[1], samples.logprobs.shape[1]
        assert torch.equal(samples.tokens, whole.tokens[rows, :width])
        assert torch.equal(samples.logprobs, whole.logprobs[rows, :columns])


def test_what_one_process_cannot_do_fails_in_all(world: World) -> None:
    said: list[Any] = [None, None]
    policies = [a_policy() for _ in range(2)]  # not in the threads, which share one generator
    barrier = threading.Barrier(2)
    with stand_in_servers(1) as stand_ins:

        def process(rank: int) -> str:
            own: list[Server] = [RemoteServer(stand_ins[0].url)] if rank == 0 else []
            settings = VllmSettings("ppo-1", torch.float32, 64, 16)
            here = ThreadWorld(rank, said, barrier)
            engine = VllmEngine(policies[rank], byte_tokenizer(), own, settings, here)
            engine.refresh(0)
            stand_ins[0].deaths_left = 99
            with pytest.raises((UserError, FailedElsewhere)) as failed:
                engine.answer(some_prompts(2), a_request())
            return str(failed.value)

        with ThreadPoolExecutor(2) as pool:
            main, other = pool.map(process, (0, 1))
    assert "fails again and again" in main
    assert other.startswith("process 0 failed:")


def test_a_process_of_this_machine_is_started_again(tmp_path: Path) -> None:
    """The process is Python with the real worker; where there is no vLLM, it ends at once."""
    server = LocalServer(sys.executable, tmp_path / "vllm.log", {})
    server.start()
    with pytest.raises(
        ServerGone, match=r"it has ended \(exit code 1\)[\s\S]*No module named 'vllm'"
    ):
        server.ask("/open", owner="a", model={})
    first = server.pid
    server.restart(ServerGone("it has ended"))
    assert server.pid != first
    assert server.died == 1
    server.close("a")
    assert server.pid is None


def test_the_noise_is_of_seed_and_rollout(world: World) -> None:
    prompts = some_prompts()
    with lab(world) as (engine, _, _):
        engine.refresh(0)
        whole = engine.answer(prompts, a_request())
        alone = engine.answer(prompts.select(torch.tensor([4])), a_request())
        length = int(alone.response_lengths[0])
        assert torch.equal(alone.tokens[0], whole.tokens[4, : alone.tokens.shape[1]])
        assert torch.equal(alone.logprobs[0], whole.logprobs[4, :length])
        other = engine.answer(prompts, RolloutRequest(SamplingParams(8, 1.0, 16, EOS, PAD), seed=4))
        assert not torch.equal(other.tokens, whole.tokens)
