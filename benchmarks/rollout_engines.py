"""Seconds of the rollout engines: native and vLLM, in float32 and bfloat16, in turn.

    python benchmarks/rollout_engines.py --python .venv-vllm/bin/python
    python benchmarks/rollout_engines.py --python .venv-vllm/bin/python --size 30M --rows 64

A model with random weights answers prompts of one length, every answer as long as the last (no end
token is drawn), so that engines do equal work. A refresh hands over all weights, and vLLM's is
checked, as in training. Medians over the repetitions; the first is left out. Seconds are those of
processors, this process and vLLM's together: other work on the machine disturbs them less than the
clock.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf_exp.batch import Prompts  # noqa: E402
from rlhf_exp.config.training import VLLM_PYTHON  # noqa: E402
from rlhf_exp.distributed.world import World, open_world  # noqa: E402
from rlhf_exp.models.architecture import Architecture  # noqa: E402
from rlhf_exp.models.policy import Policy  # noqa: E402
from rlhf_exp.models.pretrained import build_causal_lm  # noqa: E402
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest  # noqa: E402
from rlhf_exp.rollout.native_engine import NativeEngine  # noqa: E402
from rlhf_exp.rollout.sampler import SamplingParams  # noqa: E402
from rlhf_exp.vllm.engine import VllmEngine, VllmSettings  # noqa: E402
from rlhf_exp.vllm.server import LocalServer  # noqa: E402

SHAPES = {
    "1.4M": Architecture("llama", 4, 128, 4, 384, 2048, 256),
    "30M": Architecture("llama", 6, 512, 8, 1408, 16384, 256),
}
PROMPT, ANSWER = 80, 48


def prompts_of(rows: int, vocabulary: int) -> Prompts:
    """Return random prompts."""
    drawn = torch.randint(2, vocabulary, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    number = torch.arange(rows)
    return Prompts(drawn, torch.full((rows,), PROMPT), number, number)


def server_seconds(server: LocalServer) -> float:
    """Return the processor seconds that a server has used."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def vllm(
    policy: Policy, python: str, folder: Path, rows: int, dtype: torch.dtype
) -> tuple[VllmEngine, Callable[[], float]]:
    """Return vLLM on this machine's processors, with one thread, and what it has used of them."""
    server = LocalServer(python, folder / f"{dtype}.log", {"OMP_NUM_THREADS": "1"})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    settings = VllmSettings("benchmark", dtype, PROMPT + ANSWER, rows)
    engine = VllmEngine(policy, tokenizer, [server], settings, WORLD)
    return engine, partial(server_seconds, server)


def seconds(
    engine: RolloutEngine,
    elsewhere: Callable[[], float],
    prompts: Prompts,
    version: int,
    rows: int,
) -> list[float]:
    """Return the seconds of a refresh and of the answers."""
    params = SamplingParams(ANSWER, 1.0, rows, eos_id=-1, pad_id=0)

    def used() -> float:
        return time.process_time() + elsewhere()

    began = used()
    engine.refresh(version)
    refreshed = used()
    samples = engine.answer(prompts, RolloutRequest(params, version))
    ended = used()
    engine.release()
    assert int(samples.response_lengths.min()) == ANSWER
    return [refreshed - began, ended - refreshed]


WORLD: World = open_world("float32", threads=1)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default=os.environ.get(VLLM_PYTHON), help="has vLLM")
    parser.add_argument("--size", choices=SHAPES, default="1.4M")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if options.python is None:
        parser.error(f"--python names an interpreter with vLLM (or {VLLM_PYTHON})")
    shape = SHAPES[options.size]
    policy = Policy(build_causal_lm(shape, seed=0, eos_id=1, pad_id=0), value_head=False)
    prompts = prompts_of(options.rows, shape.vocabulary)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        make = partial(vllm, policy, options.python, Path(folder), options.rows)
        engines: dict[str, tuple[RolloutEngine, Callable[[], float]]] = {
            "native float32": (NativeEngine(policy), float),
            "native bfloat16": (NativeEngine(policy, torch.bfloat16), float),
            "vLLM float32": make(torch.float32),
            "vLLM bfloat16": make(torch.bfloat16),
        }
        for engine, _ in engines.values():
            stack.enter_context(closing(engine))
            engine.refresh(-1)  # also starts vLLM
        found: dict[str, list[list[float]]] = {name: [] for name in engines}
        for version in range(options.repeat + 1):
            for name, (engine, elsewhere) in engines.items():
                timed = seconds(engine, elsewhere, prompts, version, options.rows)
                found[name].append(timed)
    print(f"llama {options.size}, {options.rows} rows of {PROMPT} + {ANSWER} tokens, one thread\n")
    print("| engine | refresh, s | answers, s | tokens a second |\n|---|---:|---:|---:|")
    for name, rows in found.items():
        refresh, answers = (median(column) for column in zip(*rows[1:], strict=True))
        rate = options.rows * ANSWER / answers
        print(f"| {name} | {refresh:.3f} | {answers:.2f} | {rate:.0f} |")


if __name__ == "__main__":
    main()
