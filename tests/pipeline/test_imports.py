"""What a run imports, and in which order: each heavy library costs a second of every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.lab import small

PROGRAM = """
import json, sys

from rlhf_exp.hydra_app import main

class Noting:
    met = []

    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "wandb", "scipy.stats", "deepspeed"):
            self.met.append(name)
        return None

sys.meta_path.insert(0, Noting())
sys.argv = ["launch.py"]
code = main(sys.argv_given)
print(json.dumps([name for name in Noting.met if name in sys.modules]))  # not only looked for
sys.exit(code)
"""


def imported(folder: Path, *overrides: str) -> list[str]:
    """Return the heavy libraries that `launch.py` imports, in order."""
    program = f"import sys; sys.argv_given = {small(folder, *overrides)!r}\n{PROGRAM}"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    names: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return list(dict.fromkeys(names))


def test_wandb_comes_before_torch_and_deepspeed_never(tmp_path: Path) -> None:
    assert imported(tmp_path, "stage=sft", "tracking=offline") == ["wandb", "torch"]


def test_a_run_that_finds_everything_done_loads_nothing(run_copy: Path) -> None:
    assert imported(run_copy, "stage=ppo", "tracking=offline") == []
