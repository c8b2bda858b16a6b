"""vLLM itself, on processors (marker `vllm`).

`RLHF_EXP_VLLM_PYTHON` names an interpreter made by `rlhf_exp/vllm/setup.sh FOLDER cpu`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from rlhf_exp.batch import FinishReason, Prompts, Samples
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.errors import UserError
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.vllm.engine import VllmEngine, VllmSettings
from rlhf_exp.vllm.server import LocalServer, RemoteServer, Server
from tests.lab import LAUNCH, ROOT, artifact, small, weights
from tests.vllm.test_engine import (
    EOS,
    PAD,
    a_request,
    byte_tokenizer,
    change,
    gap,
    some_prompts,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("RLHF_EXP_VLLM_PYTHON")
    if not found:
        pytest.skip("RLHF_EXP_VLLM_PYTHON names no interpreter with vLLM")
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def a_policy(family: str = "llama", tied: bool = False, **settings: Any) -> Policy:
    shape = Architecture(family, 2, 64, 2, 128, 258, 128, tied=tied)
    model = build_causal_lm(shape, seed=5, eos_id=EOS, pad_id=PAD)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)  # so that tokens are not all alike to it
    return Policy(model, value_head=False, **settings)


@contextmanager
def vllm_of(
    python: str, folder: Path, policy: Policy, world: World, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[VllmEngine, LocalServer]]:
    server = LocalServer(python, folder / "vllm.log", VARIABLES)
    settings = VllmSettings("ppo-1", dtype, 128, 16)
    with closing(VllmEngine(policy, byte_tokenizer(), [server], settings, world)) as engine:
        yield engine, server


@pytest.fixture(scope="module")
def shared(
    python: str, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmEngine, Policy, LocalServer]]:
    """One vLLM for the tests that leave its policy as it is."""
    policy = a_policy(tied=True)
    with vllm_of(python, tmp_path_factory.mktemp("vllm"), policy, world) as (engine, server):
        engine.refresh(0)
        yield engine, policy, server


Shared = tuple[VllmEngine, Policy, LocalServer]


def first_tokens(samples: Samples) -> np.ndarray:
    rows = torch.arange(len(samples))
    return samples.tokens[rows, samples.prompt_lengths].numpy()


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.5}], ids=str
)
def test_the_distribution_is_the_native_samplers(shared: Shared, params: dict[str, float]) -> None:
    """The first tokens of 3000 answers to one prompt each, by both, in one table."""
    engine, policy, _ = shared
    rows = 3000
    prompt = some_prompts(1)
    prompts = Prompts(
        prompt.tokens.expand(rows, -1),
        prompt.lengths.expand(rows),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
    )
    values: dict[str, Any] = {"temperature": 1.0} | params
    sampling = SamplingParams(1, batch=16, eos_id=EOS, pad_id=PAD, **values)
    found = first_tokens(engine.answer(prompts, RolloutRequest(sampling, 3)))
    expected = first_tokens(sample(policy.model, prompts, sampling, 4))
    counts = np.stack([np.bincount(tokens, minlength=258) for tokens in (found, expected)])
    common = counts.sum(0) >= 20
    rare = counts[:, ~common].sum(1, keepdims=True)
    table = np.concatenate([counts[:, common], rare], axis=1)
    table = table[:, table.sum(0) > 0]
    assert chi2_contingency(table).pvalue > 1e-3
    if "top_k" in params:
        assert set(found) <= set(expected)
        assert len(set(found)) == 4


def test_the_gap_to_the_policy_is_rounding(shared: Shared) -> None:
    engine, policy, _ = shared
    assert gap(policy, engine.answer(some_prompts(64), a_request())) < 1e-4


def test_a_greedy_answer_is_the_native_samplers(shared: Shared) -> None:
    engine, policy, _ = shared
    request = a_request(greedy=True)
    found = engine.answer(some_prompts(), request)
    expected = sample(policy.model, some_prompts(), request.params, 0)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_an_answer_depends_on_its_own_row_alone(shared: Shared) -> None:
    engine, *_ = shared
    whole = engine.answer(some_prompts(40), a_request())
    rows = torch.tensor([3, 31])
    two = engine.answer(some_prompts(40).select(rows), a_request())
    width = two.tokens.shape[1]
    assert torch.equal(two.tokens, whole.tokens[rows, :width])
    assert torch.equal(two.logprobs, whole.logprobs[rows, : two.logprobs.shape[1]])


def test_stop_strings_end_rows_where_the_native_rules_do(shared: Shared) -> None:
    """Prompts of random bytes end within characters, so that vLLM sees other texts at first."""
    engine, *_ = shared
    stopper = Stopper(byte_tokenizer(), ["a", "éb", "\n\n", "Q"])
    rows = 400
    prompts = Prompts(
        torch.randint(2, 258, (rows, 6), generator=torch.Generator().manual_seed(1)),
        torch.full((rows,), 6),
        torch.arange(rows),
        torch.arange(rows),
    )
    params = SamplingParams(24, 1.0, 16, EOS, PAD)
    samples = engine.answer(prompts, RolloutRequest(params, 3, stopper))
    plain = engine.answer(prompts, RolloutRequest(params, 3))
    assert (samples.finish == FinishReason.STOP).sum() > 30
    for row in range(rows):
        said = plain.tokens[row, 6 : 6 + int(plain.response_lengths[row])].tolist()
        ends = [n for n in range(1, len(said) + 1) if stopper.content_length(said[:n]) is not None]
        stopped = said[: ends[0]] if ends else said
        length = int(samples.response_lengths[row])
        assert samples.tokens[row, 6 : 6 + length].tolist() == stopped
        if ends:
            assert int(samples.content_lengths[row]) == stopper.content_length(stopped)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj", "qwen2"])
def test_weights_are_pushed(python: str, world: World, tmp_path: Path, family: str) -> None:
    policy = a_policy(family)
    with vllm_of(python, tmp_path, policy, world) as (engine, _):
        engine.refresh(0)
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-3
        change(policy, by=0.05)
        engine.refresh(1)
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-3


def test_an_adapter_is_merged(python: str, world: World, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy = a_policy(lora=LoraSettings(4))
    with vllm_of(python, tmp_path, policy, world) as (engine, _):
        engine.refresh(0)
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if ".lora_B" in name:
                    weight.add_(torch.randn(weight.shape))
        samples = engine.answer(some_prompts(), a_request())
        assert gap(policy, samples) > 0.05
        engine.refresh(1)
        assert gap(policy, engine.answer(some_prompts(), a_request())) < 1e-3


def test_in_bfloat16_the_gap_is_larger(python: str, world: World, tmp_path: Path) -> None:
    policy = a_policy()
    with vllm_of(python, tmp_path, policy, world, torch.bfloat16) as (engine, _):
        engine.refresh(0)
        largest = gap(policy, engine.answer(some_prompts(), a_request()))
        assert 1e-3 < largest < 1.0


def test_a_head_that_keeps_old_weights_is_an_error(
    python: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not pack a tied head again, as vLLM by itself does not."""
    source = (ROOT / "rlhf_exp" / "vllm" / "worker" / "vllm_worker.py").read_text()
    line = "        self._llm.apply_model(_pack_heads_again)\n"
    assert line in source
    broken = tmp_path / "broken_worker.py"
    broken.write_text(source.replace(line, ""))
    monkeypatch.setattr("rlhf_exp.vllm.server.program", lambda: broken)
    policy = a_policy(tied=True)
    with (
        vllm_of(python, tmp_path, policy, world) as (engine, _),
        pytest.raises(UserError, match="nats a token from the policy's"),
    ):
        engine.refresh(0)


def test_weights_that_are_forgotten_are_an_error(shared: Shared) -> None:
    """A push that sends the weights of before, under a new name."""
    engine, policy, _ = shared
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    save, engine_module = None, sys.modules["rlhf_exp.vllm.engine"]
    save = engine_module.save_file
    try:
        change(policy, by=0.1)
        engine_module.save_file = lambda *_: None  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"nats a token from the policy's.*after a new start"):
            engine.refresh(7)
    finally:
        engine_module.save_file = save  # type: ignore[attr-defined]
        policy.model.load_state_dict(before)
        engine.refresh(8)


def test_a_vllm_that_is_killed_answers_the_same(shared: Shared) -> None:
    engine, _, server = shared
    expected = engine.answer(some_prompts(), a_request())
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)
    again = engine.answer(some_prompts(), a_request())
    assert torch.equal(again.tokens, expected.tokens)
    assert torch.equal(again.logprobs, expected.logprobs)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def start_server(python: str, tmp_path: Path) -> Iterator[Callable[[], tuple[str, Any]]]:
    """Starts `rlhf-exp vllm-server`; returns its address and process."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[str, subprocess.Popen[bytes]]:
        port = free_port()
        command = [sys.executable, "-m", "rlhf_exp.cli", "vllm-server", "--port", str(port)]
        with (tmp_path / f"server-{port}.log").open("wb") as out:
            process = subprocess.Popen(
                [*command, "--python", python, "--threads", "1"],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        started.append(process)
        return f"http://127.0.0.1:{port}", process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_servers_answer_as_one(
    shared: Shared, world: World, start_server: Callable[[], tuple[str, Any]]
) -> None:
    engine, policy, _ = shared
    expected = engine.answer(some_prompts(20), a_request())
    remote: list[Server] = [RemoteServer(start_server()[0]) for _ in range(2)]
    settings = VllmSettings("ppo-2", torch.float32, 128, 16)
    with closing(VllmEngine(policy, byte_tokenizer(), remote, settings, world)) as other:
        other.refresh(0)
        found = other.answer(some_prompts(20), a_request())
        status = remote[0].ask("/answer", owner="ppo-2", weights=other._weights, **NOTHING)
        assert status == {"rows": []}
        pid = _pid(remote[0])
        os.kill(pid, signal.SIGKILL)  # the command starts another one
        again = other.answer(some_prompts(20), a_request())
        assert remote[0].died >= 1
    for samples in (found, again):
        assert torch.equal(samples.tokens, expected.tokens)
        assert torch.equal(samples.logprobs, expected.logprobs)


NOTHING: dict[str, Any] = {"prompts": [], "seeds": [], "params": {}}


def _pid(server: Server) -> int:
    from urllib.request import urlopen

    with urlopen(f"{server.name}/status") as answer:
        return int(json.load(answer)["pid"])


def small_run(folder: Path, python: str, *overrides: str) -> list[str]:
    sizes = ("model.architecture.width=64", "ppo.seq_length=128", "ppo.select=last")
    vllm = ("ppo.generation.engine=vllm", f"ppo.generation.python={python}")
    return small(folder, *sizes, *vllm, "stage=ppo", *overrides)


def launched(folder: Path, command: list[str], kills: int = 0) -> None:
    """Run `launch.py`; kill its vLLM so often, each time after another iteration."""
    process = subprocess.Popen([sys.executable, str(LAUNCH), *command], cwd=ROOT)
    killed: set[int] = set()
    rows = 0
    while process.poll() is None:
        found = list(folder.glob("store/**/metrics.jsonl"))
        ppo = [path for path in found if "ppo" in str(path)]
        now = sum(len(path.read_text().splitlines()) for path in ppo)
        if len(killed) < kills and now > rows:
            for pid in _vllm_children(process.pid) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                rows = now + 1
        time.sleep(0.02)
    assert process.returncode == 0
    assert len(killed) == kills


def _vllm_children(parent: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            line = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"vllm_worker" in line:
            found.add(int(path.parent.name))
    return found


def test_a_run_whose_vllm_is_killed_twice_ends_with_the_same_weights(
    python: str, tmp_path: Path
) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    launched(plain, small_run(plain, python))
    launched(killed, small_run(killed, python), kills=2)
    assert weights(artifact(killed, "ppo")) == weights(artifact(plain, "ppo"))


def test_the_other_stages_sample_by_it(python: str, tmp_path: Path) -> None:
    run = small_run(tmp_path, python, "stage=pipeline", "eval.top_p=0.9", "eval.temperature=0.8")
    launched(tmp_path, run)
    found = artifact(tmp_path, "eval").path / "samples.jsonl"
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert {answer["model"] for answer in answers} == {"SFT", "PPO"}
    dpo = ("stage=dpo", "dpo.steps=2", "dpo.epochs=null", "dpo.batch=4", "dpo.eval_prompts=4")
    sampled = ("dpo.generation.engine=vllm", f"dpo.generation.python={python}")
    launched(tmp_path, small_run(tmp_path, python, *dpo, *sampled, "dpo.seq_length=128"))
    rows = (artifact(tmp_path, "dpo").path / "metrics.jsonl").read_text().splitlines()
    assert any("eval/kl_sequence" in row for row in rows)
    best = ("stage=best_of", "best_of.n=2", "best_of.prompts=4")
    launched(tmp_path, small_run(tmp_path, python, *best))
    assert artifact(tmp_path, "best_of").manifest.metrics["best_of/chosen_fraction"] >= 0
