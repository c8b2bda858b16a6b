"""The Dockerfile: linted, its build context, and its steps run in a folder that stands for `/`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.dockerfile import PLACES, ROOT, build, instructions, sent
from tests.lab import SMALL

STEPS = instructions(ROOT / "Dockerfile")


def test_it_is_linted() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed: `make venv` brings it")
    ended = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_only_what_the_wheel_is_made_of_is_sent() -> None:
    files = {path.as_posix() for path in sent(ROOT)}
    assert {"LICENSE", "conf/config.yaml", "rlhf_exp/api.py", "setup.py"} <= files
    assert {name.split("/")[0] for name in files} == {
        *("LICENSE", "README.md", "conf", "constraints.txt", "hydra_plugins"),
        *("pyproject.toml", "rlhf_exp", "setup.py"),
    }
    assert not [name for name in files if "__pycache__" in name]


def test_it_runs_as_any_user_and_the_paths_are_known() -> None:
    last = [rest for name, rest in STEPS if name == "USER"][-1]
    assert last == "1000:1000"
    words = " ".join(rest for name, rest in STEPS if name in ("RUN", "WORKDIR", "COPY", "VOLUME"))
    places = re.findall(r"(?<![\w.:/<>$-])/[a-z][\w/-]*", words)
    assert {place for place in places if place != "/opt/rlhf-exp"} <= {*PLACES, "/cache/home"}


@pytest.mark.parametrize(
    ("step", "variables", "asked"),
    [
        (
            "case",
            {"ACCELERATOR": "cpu", "CPU_INDEX": "INDEX"},
            "install --index-url INDEX -c constraints.txt torch",
        ),
        ("case", {"ACCELERATOR": "cuda"}, "install -c constraints.txt torch"),
        ("DS_BUILD_OPS=0", {"EXTRAS": "lora,serve"}, "install -c constraints.txt .[lora,serve]"),
        ("DS_BUILD_OPS=0", {"EXTRAS": ""}, "install -c constraints.txt ."),
    ],
)
def test_what_is_asked_of_pip(step: str, variables: dict[str, str], asked: str) -> None:
    (command,) = (rest for name, rest in STEPS if name == "RUN" and rest.startswith(step))
    program = f'pip() {{ echo "$@"; }}\n{command}'
    ended = subprocess.run(["sh", "-euc", program], env=variables, capture_output=True, text=True)
    assert ended.stdout.strip() == asked, ended.stderr


@pytest.mark.slow
def test_its_steps_run(tmp_path: Path) -> None:
    """Both ways of ACCELERATOR; packages come from this environment, so nothing is downloaded."""
    packages = sysconfig.get_path("purelib")

    def lend_packages(step: str) -> None:
        if "-m venv" in step:
            (site,) = (tmp_path / "image" / "opt").glob("rlhf-exp/lib/python*/site-packages")
            (site / "lent.pth").write_text(f"{packages}\n")
            for folder in site.glob("setuptools*"):  # older than torch asks for
                shutil.rmtree(folder)

    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "HOME": os.environ["HOME"]}
    image = build(tmp_path / "image", {"ACCELERATOR": "cuda"}, offline, lend_packages)
    assert "train and evaluate" in image.run().stdout
    ended = image.run(["run", *SMALL, "stage=sft", "name=first"])
    assert ended.returncode == 0, ended.stderr
    outputs = tmp_path / "image" / "work" / "outputs"
    assert len(list(outputs.glob("store/sft/*/manifest.json"))) == 1
    # The installed package ran, not the one of the tests.
    where = subprocess.run(
        ["python", "-c", "import rlhf_exp; print(rlhf_exp.__file__)"],
        env=image.environment,
        cwd=image.folder,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(tmp_path / "image" / "opt" / "rlhf-exp"))


@pytest.mark.slow
def test_an_unknown_accelerator_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, {"ACCELERATOR": "tpu"}, {"HOME": os.environ["HOME"]})
    assert "ACCELERATOR=tpu: expected cpu or cuda" in capfd.readouterr().err
