"""Running one revision's `launch.py`, and making sure that it is that revision's code that runs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "rlhf_exp"
MODES = {"single": 1, "ddp": 2}
"""Options of `distributed=`, and the processes that each has."""

OVERRIDES = (
    "experiment=smoke",
    "tracking=disabled",
    "distributed.threads=1",
    "seed=1",
    # The best policy of so short a run may be the initial one, which shows nothing of PPO.
    "ppo.select=last",
)

# Each process notes where it imports from, by the finders that Python itself would ask.
_WITNESS = """
import os
import sys


class Witness:
    def find_spec(self, name, path=None, target=None):
        if name == "rlhf_exp" or name.startswith("hydra_plugins.rlhf_exp"):
            others = [finder for finder in sys.meta_path if finder is not self]
            specs = (finder.find_spec(name, path, target) for finder in others)
            spec = next((spec for spec in specs if spec is not None), None)
            if spec is not None:
                with open(os.environ["NET_WITNESS"], "a") as file:
                    file.write(f"{os.getpid()}\\t{name}\\t{spec.origin}\\n")
        return None


sys.meta_path.insert(0, Witness())
"""


class RunFailed(Exception):
    """A run ended in an error, or ran other code than it should have."""


def commit_of(revision: str) -> str:
    """Return the hash of a git revision."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{revision}: git knows no such revision")
    return done.stdout.strip()


def check_out(revision: str | None, folder: Path) -> None:
    """Write a revision's files to a new folder; None is the working tree as it is.

    The working tree is copied, so that it can be edited during the run. Files that git ignores are
    left out.
    """
    folder.mkdir(parents=True)
    if revision is not None:
        command = ["git", "archive", "--format=tar", revision]
        archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not deleted, and no nested repository
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run(tree: Path, mode: str, overrides: list[str], folder: Path) -> Path:
    """Run `launch.py` of a checked out tree.

    Args:
        tree: The tree.
        mode: An option of `distributed=`.
        overrides: Further overrides.
        folder: A new folder for everything that the run writes.

    Returns:
        The output folder.

    Raises:
        RunFailed: It ended in an error, or imported the package from elsewhere.
    """
    (folder / "witness").mkdir(parents=True)
    (folder / "witness" / "sitecustomize.py").write_text(_WITNESS)
    noted, log, outputs = folder / "imports.txt", folder / "log.txt", folder / "outputs"
    environment = {name: text for name, text in os.environ.items() if name[:4] != "RLHF"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(folder / "witness"), str(tree)]),
        "NET_WITNESS": str(noted),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    arguments = [*OVERRIDES, f"distributed={mode}", *overrides, f"output_dir={outputs}"]
    command = [sys.executable, str(tree / "launch.py"), *arguments]
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RunFailed(f"launch.py {' '.join(arguments)}\nexit code {done.returncode}\n{tail}")
    check_imports(noted.read_text() if noted.exists() else "", tree, MODES[mode])
    return outputs


def check_imports(noted: str, tree: Path, processes: int) -> None:
    """Make sure that the code that ran is the tree's.

    Args:
        noted: A line for each import: process, module and file, between them tabs.
        tree: The tree.
        processes: How many processes must have imported the package at least.

    Raises:
        RunFailed: There were fewer, or one imported from elsewhere.
    """
    rows = [line.split("\t") for line in noted.splitlines()]
    elsewhere = sorted({origin for _, _, origin in rows if not Path(origin).is_relative_to(tree)})
    if elsewhere:
        raise RunFailed(f"the run imported {', '.join(elsewhere)}, which is not below {tree}")
    importing = {process for process, name, _ in rows if name == PACKAGE}
    if len(importing) < processes:
        raise RunFailed(
            f"{len(importing)} processes imported {PACKAGE}, expected {processes} or more"
        )
