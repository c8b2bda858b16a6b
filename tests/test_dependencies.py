"""Packages that the code imports and that users are told to install are pyproject.toml's."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from rlhf_exp.config import checks, search_space
from rlhf_exp.config.checks import config_problems
from tests.lab import launch, small_config

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Run in another interpreter, with packages of its own.
ELSEWHERE = tuple((ROOT / "rlhf_exp").glob("*/worker"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", text)[0]) for text in requirements}


REQUIRED = names(PROJECT["dependencies"])
OPTIONAL = {name for extra, given in EXTRAS.items() if extra != "dev" for name in names(given)}


def pins(file: str) -> dict[str, str]:
    """Return the versions in a file of constraints by name."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {
        normal(name): version
        for name, _, version in (line.partition("==") for line in lines)
        if version
    }


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = dict(
        re.split(r">=", text)
        for text in PROJECT["dependencies"]
        if ">=" in text and "," not in text
    )
    bounds = {normal(name): bound for name, bound in bounds.items()}
    oldest = pins("constraints-lowest.txt")
    assert {"torch", "transformers"} <= oldest.keys()
    for name, version in oldest.items():
        assert f"{version}.".startswith(f"{bounds[name]}."), name
        assert version != pins("constraints.txt")[name], f"{name}: nothing older is tested"


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the first name of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_what_is_imported_is_declared() -> None:
    """Not left to packages that happen to come with others."""
    known = packages_distributions()
    seen = set()
    for path in [*(ROOT / "rlhf_exp").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        if any(path.is_relative_to(folder) for folder in ELSEWHERE):
            continue
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name in sys.stdlib_module_names or name in (
                "rlhf_exp",
                "hydra_plugins",
                "setuptools",
            ):
                continue
            packages = {normal(package) for package in known.get(name, [name])}
            seen |= packages
            assert packages & (REQUIRED | OPTIONAL), f"{path.relative_to(ROOT)} imports {name}"
    assert seen >= {"torch", "hydra-core", "optuna"}


def test_a_user_needs_no_tools() -> None:
    tools = {"playwright", "mypy", "pytest", "ruff", "nbclient", "deepspeed"}
    assert not tools & REQUIRED
    assert tools - {"deepspeed"} <= names(EXTRAS["dev"])
    (itself,) = (text for text in EXTRAS["dev"] if text.startswith("rlhf-exp["))
    assert "deepspeed" in itself


def test_what_people_are_told_to_install_is_on_the_index() -> None:
    """The project itself is not: it is installed from a checkout or a wheel, by its path."""
    told = 0
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    for path in [*pages, *(ROOT / "rlhf_exp").rglob("*.py")]:
        for command in re.findall(r"pip install ([^`\n\"|;#)]*)", path.read_text(encoding="utf-8")):
            for word in command.replace("'", "").split():
                if word.startswith(("-", ".", "{")) or word.endswith(".txt") or "/" in word:
                    continue
                told += 1
                package = normal(re.split(r"[^\w.-]", word)[0])
                assert package in REQUIRED | OPTIONAL, f"{path.relative_to(ROOT)}: {command}"
    assert told > 10


def test_the_table_of_extras() -> None:
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    told = {extra: set(packages.split(", ")) for extra, packages in rows}
    assert told == {extra: names(given) for extra, given in EXTRAS.items() if extra != "dev"}


@pytest.mark.parametrize(
    ("package", "override", "message"),
    [
        ("deepspeed", "distributed=zero2", "pip install deepspeed` (extra `deepspeed`)"),
        ("peft", "ppo.lora.rank=4", "pip install peft` (extra `lora`)"),
        ("optuna", "study.trials=2", "pip install optuna` (extra `sweeps`)"),
    ],
)
def test_what_lacks_a_package_is_refused_before_anything_runs(
    package: str, override: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(tmp_path, override)
    assert not any(message in str(problem) for problem in config_problems(config))
    for module in (checks, search_space):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else True)
    assert any(message in str(problem) for problem in config_problems(config))


def test_a_plan_for_slurm_needs_no_submitit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("rlhf_exp.launchers.slurm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "submitit", None)
    given = ("-m", "name=a", "hydra/launcher=slurm", "plan=true")
    assert launch(tmp_path, *given) == 0
    shown = capsys.readouterr()
    assert "fits 80 GB" in shown.out + shown.err
