"""The state of a finished PPO run, which an extended one goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlhf_exp.config.ppo import CONTINUED
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.progress import Progress
from rlhf_exp.errors import UserError
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.server import NOTE
from rlhf_exp.store.artifact import Manifest
from rlhf_exp.tracking.local import ALERTS, METRICS, STEP

CHECKPOINTS, BEST, KEPT = "checkpoints", "best", "kept"
"""Folders of the state: the last checkpoint, the best weights so far, those of other steps."""

_EVALUATION = "eval/"


def take_over(context: StageContext, world: World) -> None:
    """Put the state of the run to go on from into the staging folder, unless it is there.

    Raises:
        UserError: That run was made from other weights than this one would be.
    """
    source = context.models.get(CONTINUED)
    if source is not None and context.probe is None:
        world.together(lambda: _take(Path(source), context) if world.is_main else None)


def _take(source: Path, context: StageContext) -> None:
    target = context.folder
    if (target / CHECKPOINTS).is_dir():
        return
    inputs = Manifest.read(source).inputs
    anew = [role for role, digest in context.inputs.items() if inputs.get(role, digest) != digest]
    if anew := [role for role in anew if role != CONTINUED]:
        raise UserError(
            f"ppo.continue_from: {source.name} was made from other weights of {', '.join(anew)} "
            "than there are now; make it again (rerun=[ppo], without ppo.continue_from)"
        )
    context.before_write()
    for name in (BEST, KEPT, "tables"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    for name in (METRICS, ALERTS, NOTE):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
    partial = target / f".{CHECKPOINTS}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / CHECKPOINTS, partial)
    _undo_end(target, partial)
    # Last: where it is, all is there.
    partial.rename(target / CHECKPOINTS)


def _undo_end(folder: Path, checkpoints: Path) -> None:
    """Remove what was logged only because the run ended: the evaluation of its last step."""
    newest = sorted(checkpoints.glob("step-*"))[-1]
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    step = state["step"]
    if Progress.of(state, step + 1).last_eval == step:
        return
    path = folder / METRICS
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(row for row in rows if not _evaluates(row, step)), encoding="utf-8")
    for table in (folder / "tables").rglob(f"*-{step}.jsonl"):
        table.unlink()


def _evaluates(line: str, step: int) -> bool:
    row = json.loads(line)
    return row[STEP] == step and any(name.startswith(_EVALUATION) for name in row)
