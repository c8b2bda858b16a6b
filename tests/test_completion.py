"""Tab completion in a shell, by the script that `-sc install=bash` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = """
for COMP_LINE in "$@"; do
  COMP_POINT=${#COMP_LINE}; typed=($COMP_LINE); COMP_CWORD=$((${#typed[@]} - 1))
  hydra_bash_completion
  echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.parametrize(
    ("install", "lines"),
    [
        (
            "rlhf-exp run -sc install=bash",
            {
                "rlhf-exp run experiment=dem": "experiment=demo",
                "rlhf-exp run experiment=demo ppo.kl.sto": "ppo.kl.stop=",
                "rlhf-exp rep": "report",
            },
        ),
        (
            "python launch.py -sc install=bash",
            {"python launch.py experiment=dem": "experiment=demo"},
        ),
    ],
)
def test_the_installed_script_completes(install: str, lines: dict[str, str]) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f'eval "$({install})"\n{ASK}', "bash", *lines]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert dict(zip(lines, ended.stdout.splitlines(), strict=True)) == lines, ended.stderr
