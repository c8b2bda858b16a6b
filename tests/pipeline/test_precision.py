from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from rlhf_exp import hardware
from rlhf_exp.config.checks_sweep import slurm_problems
from rlhf_exp.config.experiment import Config, Dtype, PrecisionName
from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.errors import UserError
from rlhf_exp.launchers.points import differing_overrides, points_of, precision_choices
from rlhf_exp.pipeline import executor
from rlhf_exp.pipeline.executor import digest_of
from rlhf_exp.pipeline.plan import plan, records_of
from rlhf_exp.pipeline.precision import slow_bfloat16, with_precision
from rlhf_exp.processes.channel import Message
from rlhf_exp.processes.environment import LaunchEnvironment
from rlhf_exp.stages.context import StageJob, StageResult
from tests.lab import artifact, launch, small_config

AUTO = "distributed.precision=auto"
Measure = Callable[[float, float], list[tuple[int, int]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Lets a processor have these GFLOP/s; the list has the layers that were measured."""
    layers: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def become(single: float, half: float) -> list[tuple[int, int]]:
        def rates(width: int, inner: int, device: torch.device) -> dict[str, float]:
            layers.append((width, inner))
            return {"float32": single * 1e9, "bfloat16": half * 1e9}

        monkeypatch.setattr(hardware, "linear_rates", rates)
        return layers

    return become


def chosen(config: Config) -> tuple[str, str]:
    found, choice = with_precision(config)
    assert choice is not None
    assert found.distributed.precision is choice.precision
    return choice.precision.name, str(choice)


def test_bfloat16_where_it_is_half_as_fast_again(measured: Measure, tmp_path: Path) -> None:
    layers = measured(89, 214)
    expected = "precision: bfloat16, measured 214 against 89 GFLOP/s"
    assert chosen(small_config(tmp_path, AUTO)) == ("bfloat16", expected)
    assert layers == [(32, 384)], "the model's own"
    measured(100, 149)
    expected = "precision: float32, measured 100 GFLOP/s, and bfloat16 only 149"
    assert chosen(small_config(tmp_path / "b", AUTO)) == ("float32", expected)


def test_wide_layers_are_measured_narrower(measured: Measure, tmp_path: Path) -> None:
    layers = measured(100, 150)
    config = small_config(tmp_path, AUTO)
    config.model.architecture.width, config.model.architecture.ffn_width = 4096, 16384
    assert chosen(config)[0] == "bfloat16"
    assert layers == [(1024, 4096)]


def test_a_processor_is_measured_once(measured: Measure, tmp_path: Path) -> None:
    layers = measured(100, 151)
    assert chosen(small_config(tmp_path, AUTO))[0] == "bfloat16"
    measured(100, 149)  # a busy moment
    assert chosen(small_config(tmp_path, AUTO))[0] == "bfloat16"
    assert len(layers) == 1
    assert chosen(small_config(tmp_path, AUTO, "model.architecture.width=64"))[0] == "float32"
    # What cannot be read is measured again.
    (tmp_path / "cache" / "precision.json").write_text('{"cpu: 1": {"float32": 1}, "x"')
    assert chosen(small_config(tmp_path, AUTO))[0] == "float32"


def test_other_formats_are_left_alone(measured: Measure, tmp_path: Path) -> None:
    layers = measured(1, 1)
    for precision in ("float32", "bfloat16"):
        config = small_config(tmp_path, f"distributed.precision={precision}")
        assert with_precision(config) == (config, None)
    config = small_config(tmp_path, AUTO, "model.dtype=bfloat16")
    assert chosen(config) == ("bfloat16", "precision: bfloat16, as model.dtype=bfloat16")
    assert layers == []


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(8, 0), (9, 0)], "bfloat16, for which GPU 0 has units"),
        ([(9, 0), (7, 5)], "float32, as GPU 1 has no units for bfloat16"),
    ],
)
def test_gpus_are_asked(
    capabilities: list[tuple[int, int]],
    expected: str,
    measured: Measure,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    layers = measured(1, 9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {gpu}")
    assert chosen(small_config(tmp_path, AUTO))[1] == f"precision: {expected}"
    assert layers == []


def test_it_shares_its_results_with_the_format_it_stands_for(
    measured: Measure, tmp_path: Path
) -> None:
    measured(100, 200)

    def keys(*overrides: str) -> list[str]:
        config, _ = with_precision(small_config(tmp_path, *overrides))
        return [step.key for step in plan(config)]

    auto = keys(AUTO)
    assert auto == keys("distributed.precision=bfloat16")
    assert set(auto).isdisjoint(keys())
    with pytest.raises(AssertionError, match="chosen before"):
        plan(small_config(tmp_path, AUTO))


def test_a_run_says_what_it_chose_and_its_command_goes_for_any_machine(
    measured: Measure, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measured(100, 200)
    line = "precision: bfloat16, measured 200 against 100 GFLOP/s"
    assert launch(tmp_path, "plan=true", AUTO) == 0
    assert line in capfd.readouterr().out.splitlines()
    assert launch(tmp_path, "stage=sft", "name=one", AUTO) == 0
    assert line in capfd.readouterr().err.splitlines()
    found = artifact(tmp_path, "sft")
    assert found.manifest.config["distributed"]["precision"] == "bfloat16"
    (record,) = records_of(small_config(tmp_path)).sweep("one")
    assert record.overrides[-1] == "distributed.precision=bfloat16"
    assert AUTO not in record.overrides
    (log,) = (tmp_path / "sweeps" / "one").rglob("*.log")
    assert f"  {line}\n" in log.read_text()
    # The other way round, it is there already.
    assert launch(tmp_path, "stage=sft", "plan=true", "distributed.precision=bfloat16") == 0
    assert re.search(r"sft +[0-9a-f]{16} +cached", capfd.readouterr().out)


def test_the_points_of_a_multirun_are_given_the_choice(measured: Measure, tmp_path: Path) -> None:
    measured(100, 200)
    lines = [["name=s", AUTO, f"ppo.lr={rate}"] for rate in (1e-4, 2e-4)]
    points = points_of([(line, small_config(tmp_path, *line)) for line in lines])
    assert [point.overrides for point in points] == [
        ("name=s", f"ppo.lr={rate}", "distributed.precision=bfloat16") for rate in (1e-4, 2e-4)
    ]
    assert {point.config.distributed.precision for point in points} == {PrecisionName.bfloat16}
    assert precision_choices(points) == ["precision: bfloat16, measured 200 against 100 GFLOP/s"]
    assert list(differing_overrides(points).values()) == ["ppo.lr=0.0001", "ppo.lr=0.0002"]


def test_processes_that_join_are_given_the_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(tmp_path, AUTO, "distributed=ddp")
    plain = small_config(tmp_path, "distributed.precision=bfloat16", "distributed=ddp")
    seen: list[Config] = []

    class Runner:
        def __init__(self, config: Config) -> None:
            seen.append(config)

        def run(self, *_: object) -> StageResult:
            return StageResult({})

    class Worker:
        environment = LaunchEnvironment(1, 2, 1, 2, "127.0.0.1", 1, "torchrun")

        def serve(self, _: object, work: Callable[[Message], Message]) -> Message:
            job = asdict(StageJob("sft", "k", str(tmp_path), str(tmp_path), {}))
            message = {"job": job, "config": digest_of(plain), "values": None}
            work(message | {"precision": "bfloat16"})
            with pytest.raises(UserError, match="another command than rank 0"):
                work(message | {"config": digest_of(config), "precision": "float32"})
            return {"objective": 0.5}

    monkeypatch.setattr(executor, "StageRunner", Runner)
    monkeypatch.setattr(executor, "joined_worker", lambda _: (Worker(), None))
    monkeypatch.setattr(executor, "silence_console", lambda: None)
    assert executor.work_for_leader(config, Worker.environment) == 0.5
    assert [one.distributed.precision for one in seen] == [PrecisionName.bfloat16]


def test_gpus_of_other_machines_are_not_guessed(tmp_path: Path) -> None:
    def problems(gpus: int, precision: str) -> list[str]:
        config = small_config(tmp_path, f"distributed.precision={precision}")
        site = SlurmConfig(gpus_per_node=gpus)
        found = map(str, slurm_problems(site, [config]))
        return [text for text in found if text.startswith("distributed.precision")]

    (problem,) = problems(1, "auto")
    assert problem.startswith("distributed.precision=auto: the jobs' GPUs are those of other")
    assert problems(1, "bfloat16") == problems(0, "auto") == []


def test_a_processor_without_units_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "processor_has_bf16", lambda: False)
    monkeypatch.setattr(hardware, "processor_name", lambda: "Old 1")
    config = small_config(tmp_path, "distributed.precision=bfloat16")
    warning = slow_bfloat16(config)
    assert warning is not None
    assert warning.startswith("bfloat16 on Old 1, which has no units for it, is likely slower")
    config.distributed.precision = PrecisionName.float32
    assert slow_bfloat16(config) is None
    config.model.dtype = Dtype.bfloat16
    assert slow_bfloat16(config) == warning
    monkeypatch.setattr(hardware, "processor_has_bf16", lambda: True)
    assert slow_bfloat16(config) is None
