"""What this project does on a GPU, what it costs and what lies within reach, in 9 minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only decoding updating
    python benchmarks/gpu.py --tiny           # everything in small, on a CPU too
    python benchmarks/gpu.py --wheels         # what a machine without a network needs

Models have random weights, so nothing is downloaded. Each section runs for itself: one that fails,
or finds no time left, costs only itself. What is found goes to `outputs/gpu/gpu.json` after each
section, and to `gpu.md` as tables at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from rlhf_exp.batch import Prompts  # noqa: E402
from rlhf_exp.hardware import MachineLimits, machine_limits  # noqa: E402
from rlhf_exp.models.architecture import Architecture  # noqa: E402
from rlhf_exp.models.memory_estimate import Precision, Workload, estimate_memory  # noqa: E402
from rlhf_exp.models.policy import Policy  # noqa: E402
from rlhf_exp.models.pretrained import build_causal_lm  # noqa: E402
from rlhf_exp.models.reference import build_reference  # noqa: E402
from rlhf_exp.models.time_estimate import (  # noqa: E402
    Iteration,
    Models,
    Work,
    decode_step,
    iteration_work,
)
from rlhf_exp.rollout import sampler  # noqa: E402
from rlhf_exp.rollout.sampler import SamplingParams, sample  # noqa: E402
from rlhf_exp.rollout.token_sampling import uniform  # noqa: E402
from rlhf_exp.stages.training import keep_small_updates  # noqa: E402

GPTJ_6B = Architecture("gptj", 28, 4096, 16, 16384, 50400, 2048)
LLAMA_8B = Architecture("llama", 32, 4096, 32, 14336, 128256, 8192, kv_heads=8)
OPT_1_3B = Architecture("gpt2", 24, 2048, 32, 8192, 50272, 2048, tied=True)
OPT_350M = Architecture("gpt2", 24, 1024, 16, 4096, 50272, 2048, tied=True)
GIB = 1 << 30
TEMPERATURE = 1.0
NO_END = -1
"""A token that is never sampled: all responses have the longest length."""


class Run:
    """One run of this program: the device, the sizes, the time left, and what was found.

    Attributes:
        device: where to measure.
        tiny: whether models and lengths are small.
        limits: the device's, once they are measured.
        found: results by section.
    """

    def __init__(self, out: Path, budget_s: float, tiny: bool) -> None:
        """Begin; results go to `out`."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tiny = tiny or self.device.type == "cpu"
        self.out, self._end = out, time.monotonic() + budget_s
        self.limits: MachineLimits | None = None
        self.found: dict[str, Any] = {}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def shape(self, shape: Architecture) -> Architecture:
        """Return the shape, or a small one of its family."""
        if not self.tiny:
            return shape
        few = None if shape.kv_heads is None else 2
        return replace(
            shape, layers=2, width=64, heads=4, ffn_width=128, vocabulary=512, kv_heads=few
        )

    def note(self, section: str, value: Any) -> None:  # noqa: ANN401 - JSON
        """Keep what a section has found so far."""
        self.found[section] = value
        path = self.out / "gpu.json"
        path.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], repeat: int = 3) -> float:
        """Return the time of the fastest of some calls, after one to warm up."""
        times = []
        for _ in range(1 + repeat):
            self.wait()
            began = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    def peak_gib(self) -> float | None:
        """Return the most memory of tensors since `free`, GiB."""
        if self.device.type == "cpu":
            return None
        return round(torch.cuda.max_memory_allocated() / GIB, 2)

    def free(self) -> None:
        """Give memory back, and measure its peak afresh."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def share(self, work: Work, seconds: float) -> float | None:
        """Return which share of the device's limit some bfloat16 work reached."""
        if self.limits is None:
            return None
        least = work.seconds(self.limits.flops["bfloat16"], self.limits.bandwidth)
        return round(least / seconds, 3)


Section = Callable[[Run], Any]
SECTIONS: dict[str, Section] = {}


def section(function: Section) -> Section:
    """Add a function to the sections, in the order of the file: the most telling first."""
    SECTIONS[function.__name__] = function
    return function


@section
def versions(run: Run) -> dict[str, Any]:
    """Versions of the libraries and the GPU."""
    facts: dict[str, Any] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in ("torch", "transformers", "tokenizers", "numpy", "deepspeed", "peft", "triton"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    facts["cuda"] = torch.version.cuda
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "nccl": torch.cuda.nccl.version(),
            "free GiB": round(free / GIB, 1),
            "total GiB": round(total / GIB, 1),
        }
    return facts


@section
def limits(run: Run) -> dict[str, Any]:
    """The rates that the device reaches."""
    found = run.limits = machine_limits(run.device, 256 if run.tiny else 4096)
    return {
        "device": found.device,
        **{f"TFLOP/s in {name}": round(rate / 1e12, 2) for name, rate in found.flops.items()},
        "TB/s": round(found.bandwidth / 1e12, 3),
    }


def random_model(run: Run, shape: Architecture) -> PreTrainedModel:
    """Return a bfloat16 model with random weights, made on the device."""
    with run.device:
        return build_causal_lm(shape, 0, dtype=torch.bfloat16).eval()


def random_prompts(run: Run, rows: int, length: int) -> Prompts:
    """Return prompts of one length."""
    tokens = torch.randint(1, 500, (rows, length), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(rows)
    return Prompts(tokens, torch.full((rows,), length), numbers, numbers).to(run.device)


@contextmanager
def graphs(used: bool) -> Iterator[None]:
    """Let the sampler use CUDA graphs, or not."""
    if used:
        yield
        return
    with mock.patch.object(sampler, "step_recorder", return_value=None):
        yield


@section
def decoding(run: Run) -> dict[str, Any]:
    """Tokens a second of random models, with CUDA graphs and without, beside the limit."""
    found: dict[str, Any] = {}
    prompt, new = (16, 9) if run.tiny else (384, 129)
    for name, shape, sizes in (
        ("GPT-J 6B", GPTJ_6B, (64, 192)),
        ("Llama 8B", LLAMA_8B, (64, 448)),
    ):
        if run.left < 150 and not run.tiny:
            break
        shape = run.shape(shape)
        model = random_model(run, shape)
        for rows in (4,) if run.tiny else sizes:
            for used in (True, False):
                label = f"{name}, {rows} rows{'' if used else ', without graphs'}"
                found[label] = attempt(decode, run, model, shape, rows, prompt, new, used)
                run.note("decoding", found)
                run.free()
        del model
        run.free()
    return found


def decode(
    run: Run,
    model: PreTrainedModel,
    shape: Architecture,
    rows: int,
    prompt: int,
    new: int,
    used: bool,
) -> dict[str, Any]:
    """Time one kind of decoding: the prompts alone, and with `new` tokens each."""
    prompts = random_prompts(run, rows, prompt)

    def answer(tokens: int) -> None:
        sample(model, prompts, SamplingParams(tokens, TEMPERATURE, rows, NO_END, 0), 1)

    with graphs(used):
        prefill = run.seconds(lambda: answer(1), 1)
        took = run.seconds(lambda: answer(new), 1)
    step = (took - prefill) / (new - 1)
    work = decode_step(shape, rows, prompt + new / 2, 2)
    sizes = Iteration(rows, prompt, 1, rows, rows, 1, 1, rows)
    first = iteration_work(Models(shape, weight_bytes=2), sizes)["sampling"]["prefill"]
    found = {
        "tokens/s": round(rows / step),
        "ms a step": round(step * 1e3, 2),
        "of limit": run.share(work, step),
        "prefill s": round(prefill, 3),
        "prefill, of limit": run.share(first, prefill),
        "peak GiB": run.peak_gib(),
    }
    if run.device.type == "cuda":
        found |= kernels(lambda: answer(9), lambda: answer(1), 8)
    return found


def kernels(longer: Callable[[], None], shorter: Callable[[], None], steps: int) -> dict[str, Any]:
    """Return kernels and launches of a decode step: the difference of two calls, `steps` apart."""
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for function in (longer, shorter):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
            function()
            torch.cuda.synchronize()
        events = watched.key_averages()
        on_device = sum(event.count for event in events if event.self_device_time_total > 0)
        launched = sum(event.count for event in events if "LaunchKernel" in event.key)
        counts.append((on_device, launched))
    (more, launches), (fewer, fewer_launches) = counts
    return {
        "kernels a step": round((more - fewer) / steps),
        "launches a step": round((launches - fewer_launches) / steps),
    }


@section
def updating(run: Run) -> dict[str, Any]:
    """A PPO micro-batch of the recipe, GPT-J with the top two blocks and with every layer."""
    found: dict[str, Any] = {}
    for label, blocks in (("top 2 blocks", 2), ("every layer", None)):
        if run.left < 60 and not run.tiny:
            break
        found[label] = attempt(update, run, run.shape(GPTJ_6B), blocks)
        run.note("updating", found)
        run.free()
    return found


def update(run: Run, shape: Architecture, blocks: int | None) -> dict[str, Any]:
    """Time forward and backward pass of a micro-batch; compare its memory with the plan's."""
    rows, tokens, new = (2, 32, 8) if run.tiny else (4, 512, 128)
    if run.tiny and blocks:
        blocks = 1
    policy = Policy(random_model(run, shape), blocks)
    keep_small_updates(policy)
    policy.to(run.device).train()
    reference = None if blocks is None else build_reference(policy)
    arguments: dict[str, Any] = {
        "tokens": torch.randint(1, 500, (rows, tokens), device=run.device),
        "prompt_lengths": torch.full((rows,), tokens - new, device=run.device),
        "response_lengths": torch.full((rows,), new, device=run.device),
        "temperature": TEMPERATURE,
        "width": new,
    }
    states = None
    if blocks is not None:
        with torch.autocast(run.device.type, torch.bfloat16):
            states = policy.trunk_states(arguments["tokens"])

    def step() -> None:
        with torch.autocast(run.device.type, torch.bfloat16):
            outputs = policy(states=states, **arguments)
        (outputs.logprobs.sum() + outputs.values.sum()).backward()
        # Gradients stay, as between micro-batches of an optimizer step.

    took = run.seconds(step)
    sizes = Iteration(rows, tokens - new, new, rows, rows, 1, 1, rows)
    models = Models(shape, blocks, weight_bytes=2, skips_masked=False)
    work = iteration_work(models, sizes)["updating"]
    passes = work["forward"] + work["backward"]
    half = Precision(2, activation=2)  # what trains, and its reference, in float32
    load = Workload(rows, tokens, new, cached_rows=rows if blocks else 0)
    kind = "none" if reference is None else "shared"
    planned = estimate_memory(shape, load, half, train_blocks=blocks, reference=kind)
    peak = run.peak_gib()
    plan = (planned.peak - planned.optimizer) / GIB  # no step is taken
    return {
        "ms": round(took * 1e3, 1),
        "of limit": run.share(passes, took),
        "peak GiB": peak,
        "planned GiB": round(plan, 2),
        "measured / planned": None if peak is None else round(peak / plan, 3),
    }


@section
def agreement(run: Run) -> dict[str, Any]:
    """The device against the CPU in float32: noise, tokens, log-probabilities, gradients."""
    found: dict[str, Any] = {}
    rows, steps = torch.arange(4096)[:, None], torch.arange(256)
    noise = uniform(7, rows.to(run.device), steps.to(run.device)).cpu()
    found["noise is equal"] = torch.equal(uniform(7, rows, steps), noise)
    for kind, kv_heads in (("gptj", None), ("gpt_neox", None), ("llama", 2)):
        shape = Architecture(kind, 3, 128, 4, 256, 512, 256, kv_heads=kv_heads)
        found[kind] = attempt(compare_with_cpu, run, shape)
        run.note("agreement", found)
    return found


def compare_with_cpu(run: Run, shape: Architecture) -> dict[str, Any]:
    """Answer the same prompts on both devices, and compare what training computes of them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 40, (24,), generator=generator)
    tokens = torch.randint(1, shape.vocabulary, (24, 40), generator=generator)
    prompts = Prompts(tokens, lengths, torch.arange(24), torch.arange(24))
    sides = []
    for device in (torch.device("cpu"), run.device):
        model = build_causal_lm(shape, 0, eos_id=0, pad_id=0)
        policy = Policy(model, train_blocks=2).to(device)
        asked = prompts.to(device)
        answers = sample(model, asked, SamplingParams(32, TEMPERATURE, 16, NO_END, 0), 3)
        fewer = sample(model, asked, SamplingParams(32, TEMPERATURE, 5, NO_END, 0), 3)
        outputs = policy.response_outputs(
            answers.tokens, answers.prompt_lengths, answers.response_lengths, TEMPERATURE
        )
        (outputs.logprobs.sum() + outputs.values.sum()).backward()
        gradient = torch.cat(
            [weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]
        )
        gap = (answers.logprobs - outputs.logprobs.detach()).abs().max()
        same = float((answers.tokens == fewer.tokens).double().mean())
        sides.append(
            (answers.tokens.cpu(), outputs.logprobs.detach().cpu(), gradient.cpu(), gap, same)
        )
    (tokens_cpu, logprobs_cpu, gradient_cpu, _, _), (tokens, logprobs, gradient, gap, same) = sides
    difference = (gradient - gradient_cpu).norm() / gradient_cpu.norm()
    return {
        "equal tokens": round(float((tokens == tokens_cpu).double().mean()), 4),
        "log-probabilities differ by": float((logprobs - logprobs_cpu).abs().max()),
        "gradient differs by": float(difference),
        "decoding and forward differ by": float(gap),
        "equal tokens with fewer rows": round(same, 4),
    }


@section
def chat(run: Run) -> dict[str, Any]:
    """DeepSpeed-Chat's published row: OPT 1.3B's shape, reward and critic of 350 M."""
    rows, prompt, new, micro = (4, 16, 8, 2) if run.tiny else (64, 256, 256, 8)
    actor = Policy(random_model(run, run.shape(OPT_1_3B)), None, value_head=False)
    keep_small_updates(actor)
    reference = random_model(run, run.shape(OPT_1_3B))
    reward = random_model(run, run.shape(OPT_350M)).base_model
    critic = random_model(run, run.shape(OPT_350M)).base_model.float().train()
    optimizers = [torch.optim.AdamW(module.parameters(), fused=True) for module in (actor, critic)]
    prompts = random_prompts(run, rows, prompt)
    rollout = random_model(run, run.shape(OPT_1_3B))
    seconds: dict[str, float] = {}

    def autocast() -> torch.autocast:
        return torch.autocast(run.device.type, torch.bfloat16)

    answers = sample(rollout, prompts, SamplingParams(new, TEMPERATURE, rows, NO_END, 0), 1)
    seconds["sampling"] = run.seconds(
        lambda: sample(rollout, prompts, SamplingParams(new, TEMPERATURE, rows, NO_END, 0), 1), 1
    )
    parts = torch.arange(rows).split(micro)

    def spans(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return answers.tokens[part], answers.prompt_lengths[part], answers.response_lengths[part]

    @torch.no_grad()
    def assess() -> None:
        with autocast():
            for part in parts:
                actor.response_outputs(*spans(part), TEMPERATURE)
                for model in (reference.base_model, reward, critic):
                    model(input_ids=answers.tokens[part], use_cache=False)

    seconds["scoring and assessing"] = run.seconds(assess, 1)

    def learn() -> None:
        for part in parts:
            with autocast():
                outputs = actor(
                    tokens=answers.tokens[part],
                    prompt_lengths=answers.prompt_lengths[part],
                    response_lengths=answers.response_lengths[part],
                    temperature=TEMPERATURE,
                    width=new,
                )
                values = critic(input_ids=answers.tokens[part], use_cache=False).last_hidden_state
            (outputs.logprobs.sum() + values.float().mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    seconds["updating"] = run.seconds(learn, 1)
    return {
        "pairs/s": round(rows / sum(seconds.values()), 2),
        **{f"{name} s": round(value, 3) for name, value in seconds.items()},
        "peak GiB": run.peak_gib(),
    }


@section
def attention(run: Run) -> dict[str, Any]:
    """One layer's attention of a decode step, 512 columns: which kernel reaches what."""
    found: dict[str, Any] = {}
    columns = 128 if run.tiny else 512
    for name, rows, heads, kv, width in (
        ("GPT-J, 64 rows", 64, 16, 16, 256),
        ("Llama, 64 rows", 64, 32, 8, 128),
        ("Llama, 448 rows", 448, 32, 8, 128),
    ):
        count = 2 if run.tiny else rows
        kind = {"device": run.device, "dtype": torch.bfloat16}
        keys, values = (torch.randn(count, kv, columns, width, **kind) for _ in range(2))
        queries = torch.randn(count, heads, 1, width, **kind)
        last = torch.randint(columns // 2, columns, (count, 1), device=run.device)
        mask = (torch.arange(columns, device=run.device) <= last)[:, None, None]
        packed = queries.view(count, kv, heads // kv, width)
        work = Work(4 * count * heads * width * columns, 2 * 2 * keys.numel())
        calls: dict[str, Callable[[], Tensor]] = {
            "sdpa": lambda q=packed, k=keys, v=values, m=mask: F.scaled_dot_product_attention(
                q, k, v, m
            ),
            "two products": lambda q=packed, k=keys, v=values, m=mask: (
                ((q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5)
                .masked_fill(~m, float("-inf"))
                .softmax(-1)
                .to(v.dtype)
                @ v
            ),
        }
        for way, call in calls.items():
            found[f"{name}, {way}"] = attempt(_timed_call, run, call, work)
    return found


def _timed_call(run: Run, call: Callable[[], Tensor], work: Work) -> dict[str, Any]:
    with torch.inference_mode():
        took = run.seconds(call, 20)
    return {"ms": round(took * 1e3, 3), "of limit": run.share(work, took)}


SMALL = (
    "experiment=smoke",
    "tracking=disabled",
    "eval=none",
    "sft.steps=2",
    "reward.steps=2",
    "ppo.steps=4",
    "ppo.rollouts=8",
    "ppo.batch=4",
    "ppo.epochs=2",
    "ppo.eval_prompts=4",
)


def launch(run: Run, *overrides: str) -> dict[str, Any]:
    """Run `launch.py` as a user would; return its exit code, seconds, and the end of its output."""
    began = time.monotonic()
    command = [sys.executable, "launch.py", *SMALL, f"output_dir={run.out / 'runs'}", *overrides]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=max(5.0, min(120.0, run.left)),
        )
    except subprocess.TimeoutExpired as error:
        return {"code": "timeout", "end": str(error.stdout)[-1500:]}
    found = {"code": done.returncode, "seconds": round(time.monotonic() - began, 1)}
    return found if done.returncode == 0 else found | {"end": (done.stdout + done.stderr)[-2500:]}


@section
def smoke(run: Run) -> dict[str, Any]:
    """The whole pipeline in float32 and, with a reward model over the trunk, in bfloat16."""
    half = ("distributed.precision=bfloat16", "ppo.train_blocks=1", "reward.train_blocks=1")
    found = {"float32": launch(run, "name=single")}
    run.note("smoke", found)
    found["bfloat16"] = launch(run, "name=half", *half, "ppo.value_trunk=branch")
    return found


@section
def tests(run: Run) -> dict[str, Any]:
    """The tests with the mark `gpu`: strategies over NCCL, bfloat16, graphs, agreement."""
    if run.device.type == "cpu":
        return {"left out": "no CUDA device"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-m", "gpu", "tests"]
    limit = max(10.0, run.left - 5)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = f"{error.stdout}\ntimeout"
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+)", text, re.MULTILINE)
    found: dict[str, Any] = {test: outcome.lower() for outcome, test in outcomes}
    return found | {"end": text[-1500:]}


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - passes through
    """Call a function; return what it returns, or the error it ends with."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:600]}


def run_sections(run: Run, names: list[str]) -> None:
    """Run the sections one by one; note what each found, or why not."""
    times: dict[str, float] = {}
    for name in names:
        began = time.monotonic()
        if run.left < 20 and not run.tiny:
            run.note(name, {"left out": "no time"})
            continue
        print(f"{name}: {SECTIONS[name].__doc__}", file=sys.stderr, flush=True)
        try:
            run.note(name, SECTIONS[name](run))
        except Exception:
            run.note(name, {"failed": traceback.format_exc()[-2000:]})
        run.free()
        times[name] = round(time.monotonic() - began, 1)
        run.note("seconds", times)


def markdown(found: dict[str, Any]) -> str:
    """Return what was found as one table a section."""
    lines = []
    for name, values in found.items():
        if not isinstance(values, dict):
            continue
        nested = {key: value for key, value in values.items() if isinstance(value, dict)}
        flat = {key: value for key, value in values.items() if key not in nested and key != "end"}
        lines += [f"### {name}", ""]
        if flat:
            lines += [
                "| | |",
                "|---|---|",
                *(f"| {key} | {value} |" for key, value in flat.items()),
            ]
            lines.append("")
        if nested:
            columns = list(dict.fromkeys(key for value in nested.values() for key in value))
            columns = [column for column in columns if column != "end"]
            lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
            for key, value in nested.items():
                cells = [str(value.get(column, "")).splitlines() or [""] for column in columns]
                lines.append(f"| {key} | " + " | ".join(cell[-1] for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)


def wheels() -> list[str]:
    """Return the pinned requirements of this project, DeepSpeed's and pytest's, but torch's own."""
    from packaging.requirements import Requirement

    pins: dict[str, str] = {}
    waiting = [
        Requirement(text) for text in ("rlhf-exp[deepspeed,lora]", "pytest", "pytest-timeout")
    ]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in pins or name == "torch" or name.startswith(("nvidia-", "triton", "cuda-")):
            continue
        try:
            found = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # for other systems
        pins[name] = found.version
        extras = wanted.extras or {""}
        waiting += [
            needed
            for needed in map(Requirement, found.requires or ())
            if needed.marker is None
            or any(needed.marker.evaluate({"extra": one}) for one in extras)
        ]
    return [f"{name}=={version}" for name, version in sorted(pins.items()) if name != "rlhf-exp"]


def main() -> None:
    """Measure, or list wheels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    add("--tiny", action="store_true", help="small models and lengths")
    add("--budget", type=float, default=500.0, help="seconds")
    add("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder for the results")
    add("--wheels", action="store_true", help="list what to carry to a machine without a network")
    options = parser.parse_args()
    if options.wheels:
        print("# python benchmarks/gpu.py --wheels > wheels.txt")
        print("# DS_BUILD_OPS=0 pip wheel --no-deps -r wheels.txt -w wheels   (here)")
        print("# pip install --no-deps --no-index wheels/*.whl                (there)")
        print("\n".join(wheels()))
        return
    run = Run(options.out, options.budget, options.tiny)
    run_sections(run, options.only)
    text = markdown(run.found)
    (run.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
