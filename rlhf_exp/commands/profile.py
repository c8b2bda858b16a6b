"""`rlhf-exp profile RUN`: where the time of a PPO run goes, and what to change.

Each phase of an iteration is compared with the least time that its operations and bytes need
(`models/time_estimate.py`) at the rates of this machine, which are measured in a second, or of a
GPU's data sheet. Operations and bytes of all processes stand against the limits of all devices;
processes on one processor share its limits.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_exp.commands.runs import OutputFolder, composed_points, table
from rlhf_exp.config.compose import from_dict
from rlhf_exp.config.experiment import Config, EngineName
from rlhf_exp.config.training import RolloutEngineName
from rlhf_exp.errors import UserError
from rlhf_exp.hardware import DATA_SHEETS, MachineLimits, cpu_limits, gpu_limits
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.memory_estimate import FLOAT32, HALF_WITH_MASTER, Workload, kv_cache_bytes
from rlhf_exp.models.time_estimate import PHASES, Work, phase_seconds
from rlhf_exp.pipeline.iteration_time import work_of
from rlhf_exp.pipeline.plan_table import gib, shape_for
from rlhf_exp.pipeline.precision import FASTER, with_precision
from rlhf_exp.processes.environment import cores, threads_per_process
from rlhf_exp.store.run_records import RunRecord
from rlhf_exp.tracking.local import METRICS, read_metrics

TIMES = dict(zip(PHASES, ("rollout", "score", "assess", "update"), strict=True))
"""The phases, and the names of their times: `time/rollout_s` and so on."""
_LARGE = 0.2
"""A phase with this share of an iteration is worth a change."""
_CLOSE = 0.5
"""From this share of its limit on, a phase is left alone."""


@dataclass(frozen=True)
class PhaseProfile:
    """A phase of an iteration.

    Attributes:
        name: One of `PHASES`, or `rest`.
        seconds: Median time.
        work: Operations and bytes of its parts, of all processes; empty where they are not known.
        least: Seconds that its parts need at the machine's limits; `None` where these are not
            known.
        memory: Most bytes of the main process in it, if they were recorded.
    """

    name: str
    seconds: float
    work: Mapping[str, Work]
    least: float | None = None
    memory: int | None = None

    @property
    def total(self) -> Work:
        """The work of all parts."""
        return sum(self.work.values(), Work())

    @property
    def share_of_limit(self) -> float | None:
        """The least time over the time."""
        return None if not self.least or not self.seconds else self.least / self.seconds


@dataclass(frozen=True)
class Advice:
    """A change that would save time.

    Attributes:
        override: What to add to the command line.
        reason: Why.
    """

    override: str
    reason: str


@dataclass(frozen=True)
class RunProfile:
    """Where a run's time goes.

    Attributes:
        run: Its name and final key.
        iterations: How many the medians are of.
        seconds: Of an iteration.
        sampled: Response tokens of an iteration, over all processes.
        prompt: Mean tokens of a prompt.
        response: Mean tokens of a response.
        dtype: The number format of forward and backward passes.
        devices: How many share the work.
        phases: The phases, in order, and the rest.
        limits: Those of one device; `None` where they are not known.
        memory: Most bytes of the main process.
        notes: What limits the comparison.
        advice: What to change, the most promising first.
    """

    run: str
    iterations: int
    seconds: float
    sampled: float
    prompt: float
    response: float
    dtype: str
    devices: int
    phases: tuple[PhaseProfile, ...]
    limits: MachineLimits | None
    memory: int | None
    notes: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()

    def phase(self, name: str) -> PhaseProfile:
        """Return a phase by name."""
        return next(phase for phase in self.phases if phase.name == name)


def profile(outputs: Path, run: str, device: str | None = None, form: str = "text") -> str:
    """Return where a run's time goes, as tables or as JSON.

    Args:
        outputs: The output folder.
        run: A finished or running run with a PPO stage.
        device: A GPU by name, for its data sheet's limits; by default this machine is measured.
        form: `text` or `json`.

    Raises:
        UserError: There is no such run, or it has not finished an iteration of native PPO.
    """
    record, config, folder = _run_of(OutputFolder(outputs), run)
    rows = _iterations(folder, run)
    shape = _shape_of(config, folder)
    limits, notes = _limits(config, rows, shape, device, record)
    found = profiled(f"{record.name}/{record.key}", config, rows, shape, limits, notes)
    if form == "json":
        return json.dumps(_to_json(found), indent=1, allow_nan=False) + "\n"
    return _text(found)


def profiled(
    run: str,
    config: Config,
    rows: Sequence[Mapping[str, float]],
    shape: Architecture | None,
    limits: MachineLimits | None,
    notes: Sequence[str] = (),
) -> RunProfile:
    """Return the profile of a run.

    Args:
        run: Its name.
        config: Its config, with a number format.
        rows: Metrics of its iterations.
        shape: The policy's; `None` where it is not known.
        limits: Those of one device, or of the processor that all processes share.
        notes: What limits the comparison.
    """
    prompt = _median(rows, "prompt/length_mean")
    if prompt is None:
        prompt = float(config.ppo.seq_length - config.ppo.generation.max_new_tokens)
        notes = [*notes, f"the run did not record its prompts' lengths: {prompt:.0f} are assumed"]
    response = _median(rows, "response/length_mean") or 0.0
    work = {} if shape is None else work_of(config, shape, prompt, response)
    if shape is None:
        notes = [*notes, "operations and bytes are not known of a model of this family"]
    if config.ppo.generation.ahead:
        notes = [*notes, "with ppo.generation.ahead, `sampling` is what updates wait for it"]
    on_gpus = _used_gpus(rows)
    devices = config.distributed.processes if on_gpus else 1
    dtype = config.computes_in.name
    phases = []
    for name, metric in TIMES.items():
        seconds, parts = _median(rows, f"time/{metric}_s") or 0.0, work.get(name, {})
        # A reward model on a device of its own works alone.
        alone = name == "scoring" and config.ppo.reward.device is not None
        least = None
        if limits is not None and parts:
            count = 1 if alone else devices
            least = phase_seconds(parts, count * limits.flops[dtype], count * limits.bandwidth)
        memory = _highest(rows, f"memory/{name}_bytes")
        phases.append(PhaseProfile(name, seconds, parts, least, memory))
    speed = _median(rows, "throughput/samples_per_s")
    whole = sum(phase.seconds for phase in phases)
    seconds = max(config.ppo.rollouts / speed, whole) if speed else whole
    phases.append(PhaseProfile("rest", seconds - whole, {}))
    found = RunProfile(
        run,
        len(rows),
        seconds,
        config.ppo.rollouts * response,
        prompt,
        response,
        dtype,
        devices,
        tuple(phases),
        limits,
        _highest(rows, "memory/reserved_bytes") or _highest(rows, "memory/peak_bytes"),
        tuple(notes),
    )
    advice = [] if shape is None else list(advice_for(found, config, shape, on_gpus))
    return replace(found, advice=tuple(advice))


def advice_for(
    found: RunProfile, config: Config, shape: Architecture, on_gpus: bool
) -> Iterator[Advice]:
    """Yield what would save time, with the reason.

    Args:
        found: The run's profile.
        config: Its config.
        shape: The policy's.
        on_gpus: Whether it runs on GPUs.
    """
    limits = found.limits
    if limits is not None and found.dtype == "float32":
        half, single = limits.flops["bfloat16"], limits.flops["float32"]
        if half >= FASTER * single:
            yield Advice(
                "distributed.precision=auto",
                f"{limits.device} does {half / 1e9:.0f} GFLOP/s in bfloat16, {single / 1e9:.0f} in "
                "float32; other results, with a key of their own",
            )
    yield from _on_sampling(found, config, shape, on_gpus)
    yield from _on_scoring(found, config)
    yield from _on_updating(found, config, on_gpus)
    threads, processes = config.distributed.threads, config.distributed.processes
    if not on_gpus and threads and threads * processes < cores():
        yield Advice(
            "distributed.threads=null",
            f"{threads * processes} of {cores()} cores compute",
        )


def _on_sampling(
    found: RunProfile, config: Config, shape: Architecture, on_gpus: bool
) -> Iterator[Advice]:
    sampling, generation = found.phase("sampling"), config.ppo.generation
    share = sampling.seconds / found.seconds
    rows = -(-config.ppo.rollouts // config.distributed.processes)
    if share < _LARGE or found.limits is None or sampling.least is None:
        return
    if generation.batch < rows:
        wider = replace(config, ppo=replace(config.ppo, generation=replace(generation, batch=rows)))
        work = work_of(wider, shape, found.prompt, found.response)["sampling"]
        flops = found.devices * found.limits.flops[found.dtype]
        least = phase_seconds(work, flops, found.devices * found.limits.bandwidth)
        needs = Workload(0, round(found.prompt + generation.max_new_tokens), 0, decoded_rows=rows)
        precision = FLOAT32 if found.dtype == "float32" else HALF_WITH_MASTER
        cache = kv_cache_bytes(shape, needs, precision)
        fits = _sharing(config, on_gpus) * ((found.memory or 0) + cache) < 0.9 * found.limits.memory
        steps = "each step reads all weights for as many rows as decode together"
        if fits and (least < 0.9 * sampling.least or (sampling.share_of_limit or 1) < _CLOSE):
            yield Advice(
                f"ppo.generation.batch={rows}",
                f"now {generation.batch}; {steps}: at least {least:.2g} s in place of "
                f"{sampling.least:.2g} s, with a cache of {gib(cache)} GiB; the same results",
            )

    limit = sampling.share_of_limit
    native = generation.engine is RolloutEngineName.native
    if on_gpus and native and limit is not None and limit < 0.3:
        yield Advice(
            "ppo.generation.engine=vllm",
            f"sampling takes {share:.0%} of an iteration at {limit:.0%} of its limit: many small "
            "kernels; other samples, with a key of their own",
        )


def _on_scoring(found: RunProfile, config: Config) -> Iterator[Advice]:
    scoring, reward = found.phase("scoring"), config.ppo.reward
    if scoring.seconds / found.seconds < _LARGE:
        return
    if reward.device is not None and config.distributed.processes > 1:
        yield Advice(
            "ppo.reward.placement=shared",
            f"one device scores for {scoring.seconds:.2g} s while {config.distributed.processes} "
            "wait; each can hold a reward model if memory allows it",
        )
    elif not reward.model_scores:
        what = (
            f"the {reward.kind} takes {scoring.seconds:.2g} s for {config.ppo.rollouts} responses"
        )
        yield Advice("a faster reward", f"{what}: answer all rows of a call at once")
    elif config.ppo.train_blocks and config.reward.train_blocks is None and not reward.terms:
        yield Advice(
            f"reward.train_blocks={config.ppo.train_blocks}",
            "a reward model over the policy's frozen trunk costs its top blocks only; another "
            "reward model, with other results",
        )


def _sharing(config: Config, on_gpus: bool) -> int:
    """Return how many processes have a device's memory together: all that a processor has."""
    return 1 if on_gpus else config.distributed.processes


def _on_updating(found: RunProfile, config: Config, on_gpus: bool) -> Iterator[Advice]:
    updating, ppo = found.phase("updating"), config.ppo
    share = -(-ppo.batch // config.distributed.processes)
    if updating.seconds / found.seconds < _LARGE:
        return
    memory, limits = updating.memory or found.memory, found.limits
    taken = None if memory is None else _sharing(config, on_gpus) * memory
    room = taken is not None and limits is not None and taken < 0.5 * limits.memory
    limit = updating.share_of_limit
    if (
        limit is not None
        and limit < _CLOSE
        and ppo.micro_batch
        and ppo.micro_batch < share
        and room
    ):
        yield Advice(
            f"ppo.micro_batch={min(share, 2 * ppo.micro_batch)}",
            f"now {ppo.micro_batch}; passes of few rows reach {limit:.0%} of the limit, and half "
            "of the memory is free; the same results",
        )
    if ppo.gradient_checkpointing and room:
        yield Advice(
            "ppo.gradient_checkpointing=false",
            "blocks are computed twice to save memory, and half of it is free; the same results",
        )


def _run_of(outputs: OutputFolder, run: str) -> tuple[RunRecord, Config, Path]:
    """Return the record, config and folder of a run's PPO stage, finished or not."""
    record = outputs.run(run, ("ppo",))
    key = record.keys.get("ppo")
    if key is None:
        raise UserError(
            f"profile {run}: the run has no PPO stage, only {', '.join(record.keys)}; what is "
            "profiled are the phases of a PPO iteration"
        )
    artifact = outputs.store.lookup("ppo", key)
    folder = outputs.store.unfinished("ppo", key) if artifact is None else artifact.path
    if folder is None:
        raise UserError(f"profile {run}: its PPO has not begun (status: {record.status})")
    if artifact is not None:
        config = from_dict(artifact.manifest.config)
    else:
        (composed,) = composed_points(record.overrides, None)
        config, _ = with_precision(composed)
    if config.engine.name is not EngineName.native:
        raise UserError(
            f"profile {run}: its PPO is by engine={config.engine.name.name}, whose phases are not "
            "timed; engine=native is profiled"
        )
    return record, config, folder


def _iterations(folder: Path, run: str) -> list[dict[str, float]]:
    """Return the metrics of the iterations, if possible without the first, which warms up."""
    path = folder / METRICS
    rows = read_metrics(path) if path.is_file() else []
    timed = [row for row in rows if f"time/{TIMES['sampling']}_s" in row]
    if not timed:
        raise UserError(f"profile {run}: no iteration of its PPO is over yet ({path})")
    return timed[1:] or timed


def _shape_of(config: Config, folder: Path) -> Architecture | None:
    """Return the policy's shape: that of the model made, else what the config says."""
    from rlhf_exp.models.architecture import TYPES
    from rlhf_exp.models.pretrained import architecture_of, load_config

    if (folder / "model" / "config.json").is_file():
        model = load_config(str(folder / "model"))
        return architecture_of(model) if model.model_type in TYPES else None
    return shape_for(config.model)


def _limits(
    config: Config,
    rows: Sequence[Mapping[str, float]],
    shape: Architecture | None,
    device: str | None,
    record: RunRecord,
) -> tuple[MachineLimits | None, list[str]]:
    """Return the limits of the device that a run used, and what is to be said of them."""
    if device is not None:
        if device not in DATA_SHEETS:
            raise UserError(f"--device {device}: expected one of {', '.join(DATA_SHEETS)}")
        return DATA_SHEETS[device], [
            "limits of a data sheet: what can be reached is some 10 % less"
        ]
    notes = []
    host = None if record.process is None else record.process.host
    if host not in (None, socket.gethostname()):
        notes.append(f"the run's machine was {host}; the limits are those of this one")
    width = 1024 if shape is None else min(shape.width, 4096)
    if not _used_gpus(rows):
        processes = config.distributed.processes
        threads = processes * threads_per_process(config.distributed.threads, processes)
        return cpu_limits(min(threads, cores()), min(width, 1024)), notes
    limits = gpu_limits(width)
    if limits is None:
        names = "|".join(DATA_SHEETS)
        notes = [f"the run used GPUs, and here is none: --device {names} has a data sheet's limits"]
    return limits, notes


def _used_gpus(rows: Sequence[Mapping[str, float]]) -> bool:
    return any("memory/reserved_bytes" in row for row in rows)


def _median(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return median(values) if values else None


def _highest(rows: Sequence[Mapping[str, float]], name: str) -> int | None:
    values = [row[name] for row in rows if name in row]
    return int(max(values)) if values else None


def _text(found: RunProfile) -> str:
    """Return a profile as text."""
    lines = [
        f"{found.run}: {found.iterations} iterations of {found.seconds:.3g} s (medians), "
        f"{found.sampled:.0f} tokens sampled in each, {found.dtype}",
    ]
    if (limits := found.limits) is not None:
        rates = " and ".join(
            f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in limits.flops.items()
        )
        several = f"{found.devices} x " if found.devices > 1 else ""
        lines.append(
            f"limits of {several}{limits.device}: {rates}, {limits.bandwidth / 1e9:.0f} GB/s, "
            f"{gib(limits.memory)} GiB"
        )
    lines += [f"note: {note}" for note in found.notes]
    header = ("", "seconds", "share", "at least", "of limit", "GFLOP/s", "GB/s", "memory, GiB")
    cells = [_cells(phase, found.seconds) for phase in found.phases]
    whole = ("iteration", f"{found.seconds:.3g}", *[""] * 5, gib(found.memory or 0))
    text = "\n".join(lines) + "\n\n" + table(header, [*cells, whole])
    sampling = found.phase("sampling").seconds
    if sampling:
        text += (
            f"\nsampled: {found.sampled / sampling:.0f} tokens/s while sampling, "
            f"{found.sampled / found.seconds:.0f} over the whole iteration\n"
        )
    parts = [row for phase in found.phases for row in _parts(phase, found)]
    if parts:
        text += "\n" + table(("where the time must go", "at least", "GFLOP", "GB", "by"), parts)
    if found.advice:
        text += "\nwhat to change:\n"
        text += "".join(f"  {one.override}: {one.reason}\n" for one in found.advice)
    elif found.limits is not None:
        text += "\nwhat to change: nothing that is known here\n"
    return text


def _cells(phase: PhaseProfile, whole: float) -> tuple[str, ...]:
    total, seconds = phase.total, phase.seconds
    rates = ["", ""]
    if phase.work and seconds:
        rates = [f"{total.flops / seconds / 1e9:.3g}", f"{total.bytes / seconds / 1e9:.3g}"]
    limit = phase.share_of_limit
    return (
        phase.name,
        f"{seconds:.3g}",
        f"{seconds / whole:.0%}",
        "" if phase.least is None else f"{phase.least:.3g}",
        "" if limit is None else f"{limit:.0%}",
        *rates,
        "" if phase.memory is None else gib(phase.memory),
    )


def _parts(phase: PhaseProfile, found: RunProfile) -> Iterator[tuple[str, ...]]:
    """Yield a row for each part of a phase: its least time, and what it is bound by."""
    if found.limits is None:
        return
    flops, bandwidth = found.limits.flops[found.dtype], found.limits.bandwidth
    for name, work in phase.work.items():
        if not (work.flops or work.bytes):
            continue
        by = "arithmetic" if work.flops / flops > work.bytes / bandwidth else "memory"
        least = work.seconds(found.devices * flops, found.devices * bandwidth)
        numbers = (f"{least:.3g}", f"{work.flops / 1e9:.4g}", f"{work.bytes / 1e9:.4g}")
        yield (f"{phase.name}: {name}", *numbers, by)


def _to_json(found: RunProfile) -> dict[str, Any]:
    """Return a profile as JSON values."""
    values = asdict(found)
    for phase, shown in zip(found.phases, values["phases"], strict=True):
        shown |= {"share_of_limit": phase.share_of_limit, **asdict(phase.total)}
    return values
