"""Whole runs small enough for tests: all four stages in some three seconds of CPU."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.store.artifact import MANIFEST, Artifact
from rlhf_exp.store.store import Store

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch.py"

SMALL = (
    "tracking=disabled",
    "distributed.threads=1",
    "model.architecture.layers=2",
    "model.architecture.width=32",
    "model.architecture.heads=2",
    "model.architecture.vocabulary=320",
    "model.architecture.context=192",
    "data.toy.demonstrations=60",
    "data.toy.preferences=60",
    "data.toy.prompts=40",
    "data.toy.validation=12",
    "data.toy.test=12",
    "sft.steps=6",
    "sft.epochs=null",
    "sft.batch=8",
    "sft.seq_length=192",
    "sft.eval_every=3",
    "sft.checkpoint_every=2",
    "reward.steps=6",
    "reward.epochs=null",
    "reward.batch=8",
    "reward.seq_length=128",
    "reward.eval_every=3",
    "reward.checkpoint_every=2",
    "ppo.steps=6",
    "ppo.rollouts=8",
    "ppo.batch=4",
    "ppo.epochs=1",
    "ppo.seq_length=128",
    "ppo.eval_prompts=8",
    "ppo.eval_every=2",
    "ppo.checkpoint_every=2",
    "ppo.generation.max_new_tokens=8",
    "eval.prompts=8",
)
"""Overrides that make everything small."""


def small(folder: Path, *overrides: str) -> list[str]:
    """Return the command line of a small run with its results in `folder`."""
    replaced = {text.partition("=")[0] for text in overrides}
    kept = [text for text in SMALL if text.partition("=")[0] not in replaced]
    return [f"output_dir={folder}", *kept, *overrides]


def small_config(folder: Path, *overrides: str) -> Config:
    """Return the config of a small run."""
    return compose(small(folder, *overrides), [CONF]).config


@contextmanager
def process_kept() -> Iterator[None]:
    """Undo what `launch.py`'s main changes of its process."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["launch.py"]
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def launch(folder: Path, *overrides: str) -> int:
    """Run `launch.py` in this process with a small config; return its exit code."""
    from rlhf_exp.hydra_app import main

    with process_kept():
        return main(small(folder, *overrides))


def artifact(folder: Path, stage: str) -> Artifact:
    """Return the one artifact of a stage."""
    (found,) = Store(folder / "store").find(f"{stage}/")
    return found


def weights(found: Artifact) -> str:
    """Return the sha256 of a model's weights."""
    return found.manifest.files["model/model.safetensors"].sha256


def put_file(found: Artifact, name: str, content: bytes) -> None:
    """Give an artifact another file content, as though it had been made with it."""
    path = found.path / name
    path.write_bytes(content)
    files = json.loads((found.path / MANIFEST).read_text())["files"]
    files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit_manifest(found, files=files)


def put_other_weights(found: Artifact, name: str = "model/model.safetensors") -> None:
    """Give an artifact other weights, as though it had been made with them."""
    tensors = load_file(found.path / name)
    put_file(found, name, save({key: value + 0.01 for key, value in tensors.items()}))


def edit_manifest(found: Artifact, **changes: Any) -> None:
    """Rewrite fields of an artifact's manifest."""
    path = found.path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(folder: Path, *overrides: str) -> float | None:
    """Run a small config in this process, without Hydra; errors are raised."""
    from rlhf_exp import experiment

    return experiment.run(small_config(folder, *overrides), list(overrides))


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write rows as JSON lines; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def pairs(count: int) -> list[dict[str, str]]:
    """Return different pairs of answers to different questions."""
    return [
        {
            "prompt": f"What is {number} plus {number}?",
            "chosen": f"It is {2 * number}.",
            "rejected": f"Go away, {number}.",
        }
        for number in range(count)
    ]
