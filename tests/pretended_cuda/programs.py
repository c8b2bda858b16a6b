"""What the tests run on a pretended CUDA, in a process of its own.

`python -m tests.pretended_cuda.programs FOLDER PROGRAM...` prints a line of JSON: what each program
has returned.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.pretended_cuda.pretend import TALLY, Counts, install, pretending  # before torch

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from rlhf_exp.algo import logprobs
from rlhf_exp.batch import Prompts, to_device
from rlhf_exp.distributed.ddp import SingleProcess
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.rollout.sampler import ACCELERATOR_STRIDE, SamplingParams, sample
from tests.training.lab import SECTION, build_task

WIDTH, LAYERS = 16, 2
LLAMA_STYLE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_neox": lambda: GPTNeoXConfig(**LLAMA_STYLE),
    "gptj": lambda: GPTJConfig(
        vocab_size=61,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        rotary_dim=4,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": lambda: LlamaConfig(**LLAMA_STYLE, num_key_value_heads=2),
}


def refusals(folder: Path) -> dict[str, str]:
    """Return the errors of operations that a GPU would refuse."""
    here, there = torch.ones(3), torch.ones(3, device="cuda:0")
    attempts: dict[str, Callable[[], object]] = {
        "cpu and gpu": lambda: here + there,
        "two gpus": lambda: there + torch.ones(3, device="cuda:1"),
        "gpu index of a cpu tensor": lambda: here[torch.zeros(2, dtype=torch.int64, device="cuda")],
        "numpy": lambda: there.numpy(),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = ""
        except (RuntimeError, TypeError) as error:
            found[name] = str(error)
    return found


def counting(folder: Path) -> dict[str, Counts]:
    """Return what small operations count."""
    values = torch.arange(4.0, device="cuda")
    attempts: dict[str, Callable[[], object]] = {
        "add": lambda: values + 1.0,
        "view": lambda: values.view(2, 2),
        "item": lambda: values.sum().item(),
        "tolist": lambda: values.tolist(),
        "upload": lambda: torch.ones(2).to("cuda"),
        "pinned upload": lambda: to_device(torch.ones(2), "cuda"),
        "boolean index": lambda: values[values > 1.0],
        "index on the cpu": lambda: values[torch.tensor([1])],
        "nonzero": lambda: values.nonzero(),
    }
    found = {}
    for name, attempt in attempts.items():
        TALLY.clear()
        attempt()
        found[name] = TALLY.counts()
    return found


def decode(folder: Path) -> dict[str, Counts]:
    """Return what a stride of decoding takes, by family: the difference of two lengths."""
    found = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config()).bfloat16().cuda().eval()
        tokens, numbers = torch.randint(1, 61, (4, 9)), torch.arange(4)
        prompts = Prompts(tokens, torch.tensor([5, 9, 7, 6]), numbers, numbers).to("cuda")
        counts = []
        for strides in (1, 2, 1, 2):  # the first calls also do what is done once
            length = 1 + strides * ACCELERATOR_STRIDE
            TALLY.clear()
            sample(model, prompts, SamplingParams(length, 1.0, 4, -1, 0), seed=0)
            counts.append(TALLY.counts())
        found[family] = {name: counts[3][name] - counts[2][name] for name in counts[0]}
    return found


def update(folder: Path) -> dict[str, dict[str, Counts]]:
    """Return what a micro-batch, an optimizer step and an iteration of PPO take.

    By the blocks that train: `top` (over a frozen trunk) and `all`.
    """
    found = {}
    section = replace(SECTION, rollouts=8, batch=8, micro_batch=2, epochs=2)
    for name, train_blocks in (("top", 1), ("all", None)):
        with world_of("bfloat16", threads=1) as world:
            task = build_task(world, section, train_blocks=train_blocks)
            parameters = [p for p in task.module.parameters() if p.requires_grad]
            build = partial(torch.optim.AdamW, parameters, lr=1e-3)
            task.attach(world.prepare(task.module, build, 1.0))

            counts = []
            with marking() as marks:
                for iteration in range(2):
                    TALLY.clear()
                    task.iterate(iteration, partial(step, world))
                    counts.append(TALLY.counts())
            found[name] = {
                "micro_batch": spans(marks, "backward")[-1],
                "step": spans([mark for mark in marks if mark[0] == "step"], "step")[-1],
                "iteration": counts[-1],
            }
    return found


def step(world: World, losses: Iterable[Tensor]) -> None:
    """Take an optimizer step."""
    for loss in losses:
        world.backward(loss)
    world.strategy.step()


def head_gradients(folder: Path) -> dict[str, float]:
    """Return how far gradients of log-probabilities in chunks are from those of a CPU."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 6), torch.randn(11, 6)
    targets = torch.randint(0, 11, (13,))
    five_rows = patch.multiple(logprobs, ACCELERATOR_CHUNK_LOGITS=5 * 11, MAX_KEPT_LOGITS=0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        gradients = []
        for device in ("cpu", "cuda"):
            leaves = [v.detach().to(device, dtype).requires_grad_() for v in (hidden, weight)]
            with five_rows:
                result, _ = logprobs.gather_logprobs(*leaves, None, targets.to(device), 1.0)
                result.sum().backward()
            gradients.append([leaf.grad.cpu().float() for leaf in leaves])
        off = [(one - other).abs().max().item() for one, other in zip(*gradients, strict=True)]
        found[str(dtype)] = max(off)
    return found


def smoke(folder: Path) -> dict[str, dict[str, float]]:
    """Run the stages of an experiment; return their metrics."""
    from tests.distributed.lab import PARENTS, Job, run_job  # many imports: for this one only

    found = {}
    for stage in ("sft", "reward", "ppo", "eval"):
        models = {role: str(folder / role / "model") for role in PARENTS[stage]}
        sizes = ["distributed.precision=bfloat16", "ppo.train_blocks=1"]
        metrics = run_job(folder, Job(stage, stage, sizes, models))
        found[stage] = {name: value for name, value in metrics.items() if math.isfinite(value)}
        found[stage] |= {"metrics": float(len(metrics))}
    return found


Marks = list[tuple[str, Counts]]


@contextmanager
def marking() -> Iterator[Marks]:
    """Note the counts after each backward pass and optimizer step."""
    marks: Marks = []
    kinds = ("backward", "step")
    originals = [getattr(SingleProcess, kind) for kind in kinds]

    def noting(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            result = function(*args)
            marks.append((kind, TALLY.counts()))
            return result

        return noted

    for kind, function in zip(kinds, originals, strict=True):
        setattr(SingleProcess, kind, noting(function, kind))
    try:
        yield marks
    finally:
        for kind, function in zip(kinds, originals, strict=True):
            setattr(SingleProcess, kind, function)


def spans(marks: Marks, kind: str) -> list[Counts]:
    """Return what was counted between neighbouring marks of this kind."""
    return [
        {name: after[1][name] - before[1][name] for name in after[1]}
        for before, after in pairwise(marks)
        if before[0] == after[0] == kind
    ]


PROGRAMS: dict[str, Callable[[Path], Any]] = {
    program.__name__: program
    for program in (refusals, counting, decode, update, head_gradients, smoke)
}


def main(folder: Path, names: list[str]) -> None:
    """Run programs and print what they return."""
    install()
    with pretending():
        print(json.dumps({name: PROGRAMS[name](folder) for name in names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
