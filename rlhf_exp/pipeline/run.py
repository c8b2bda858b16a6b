"""Running a plan: each step under a lease, in its staging folder, published whole."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.config.load import to_dict
from rlhf_exp.config.root import Config
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.interrupt import polite_interrupts
from rlhf_exp.pipeline.plan import MODEL, PACKAGE, State, Step, store_of
from rlhf_exp.store.artifact import Artifact, Manifest, git_state, package_versions
from rlhf_exp.store.code import changed
from rlhf_exp.store.lease import Lease, hold
from rlhf_exp.store.store import Store

log = logging.getLogger(__name__)

FACTS = "facts.json"
_START = ".started.json"
_DROP = ("checkpoints/*", "best/*", _START)


@dataclass(frozen=True)
class Done:
    """A step that is done.

    Attributes:
        step: The step.
        artifact: Its result; `None` for a given model that is not in the store.
        trained: Whether this process made it.
    """

    step: Step
    artifact: Artifact | None
    trained: bool

    @property
    def model(self) -> str:
        """Folder or hub id of its model."""
        if self.step.model is not None:
            return self.step.model
        assert self.artifact is not None
        return str(self.artifact.path / MODEL)


def run_steps(
    config: Config, steps: list[Step], tell: Callable[[str], None]
) -> list[Done]:
    """Bring all steps up to date, in order.

    Args:
        config: The experiment.
        steps: Its plan.
        tell: Says something to the user.
    """
    from rlhf_exp.stages.materials import Materials

    store, materials = store_of(config), Materials(config.data)
    done: dict[str, Done] = {}
    with polite_interrupts() as interrupted:
        for step in steps:
            if not step.needs_work:
                done[step.stage] = Done(step, step.artifact, trained=False)
                continue
            models = {role: found.model for role, found in done.items() if role != "eval"}
            if config.model.path is not None:
                models["base"] = config.model.path
            work = _Work(config, step, store, models, materials, interrupted, tell)
            done[step.stage] = work.run()
    return list(done.values())


class _Work:
    """One step being brought up to date."""

    def __init__(
        self,
        config: Config,
        step: Step,
        store: Store,
        models: dict[str, str],
        materials: object,
        interrupted: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.step, self.store = config, step, store
        self.models, self.materials = models, materials
        self.interrupted, self.tell = interrupted, tell

    def run(self) -> Done:
        """Make the result, unless another process has made it meanwhile."""
        step = self.step
        parents = list(step.parents.values())
        with hold(
            self.store, step.stage, step.key, on_wait=self.tell, parents=parents
        ) as lease:
            found = self._made_meanwhile(lease)
            if found is not None:
                return Done(step, found, trained=False)
            folder = self._staging()
            return Done(step, self._make(folder, lease), trained=True)

    def _made_meanwhile(self, lease: Lease) -> Artifact | None:
        step = self.step
        pending = self.store.publish_pending(step.stage, step.key, check=lease.check)
        if pending is not None:
            return pending
        found = self.store.lookup(step.stage, step.key)
        if found is None or step.artifact is None:
            return found
        # A redo replaces the result it has seen; a newer one is another process's redo.
        fresh = found.manifest.created != step.artifact.manifest.created
        return found if fresh else None

    def _staging(self) -> Path:
        """Return the staging folder, emptied if what is in it cannot be continued.

        Raises:
            UserError: It was begun by other code.
        """
        step = self.step
        folder = self.store.staging(step.stage, step.key)
        note = folder / _START
        replaces = None if step.artifact is None else step.artifact.manifest.created
        begun = json.loads(note.read_text()) if note.is_file() else None
        if begun is not None and begun["replaces"] != replaces:
            begun = None
            self.store.discard(step.stage, step.key)
            folder = self.store.staging(step.stage, step.key)
        if begun is None:
            begun = {"code": step.code, "replaces": replaces, "seconds": 0.0}
            note.write_text(json.dumps(begun))
        files = changed(begun["code"], step.code)
        if files and self.config.cache.name == "strict":
            if step.stage in self.config.rerun:
                self.store.discard(step.stage, step.key)
                return self._staging()
            raise UserError(
                f"{step.stage} {step.key} was interrupted, and the code has changed since: "
                f"{', '.join(files)}. Begin again with rerun=[{step.stage}], or continue with "
                "cache=trust"
            )
        return folder

    def _make(self, folder: Path, lease: Lease) -> Artifact:
        from rlhf_exp.stages.context import StageContext

        step = self.step
        self.tell(f"{step.stage} {step.key}: {'resuming' if step.state == State.resume else 'running'}")
        context = StageContext(
            stage=step.stage,
            key=step.key,
            folder=folder,
            cache=Path(self.config.output_dir) / "cache",
            models=self.models,
            parents=step.parents,
            materials=self.materials,  # type: ignore[arg-type]
            before_write=lease.check,
            interrupted=self.interrupted,
        )
        began = time.monotonic()
        try:
            # Imported by name and late: a plan must not load torch.
            stage = importlib.import_module(f"rlhf_exp.stages.{step.stage}")
            result = stage.run(self.config, context)
        finally:
            seconds = _add_seconds(folder / _START, time.monotonic() - began)
        (folder / FACTS).write_text(json.dumps(result.facts))
        manifest = Manifest(
            stage=step.stage,
            key=step.key,
            config=to_dict(self.config),
            parents=step.parents,
            metrics=result.metrics,
            git=git_state(PACKAGE.parent),
            versions=package_versions(),
            wandb_run_id=result.run_id,
            code=step.code,
            duration_s=seconds,
            objective=result.objective,
        )
        return self.store.publish(
            step.stage,
            step.key,
            folder,
            manifest,
            _DROP,
            check=lease.check,
            replaces=step.artifact,
        )


def _add_seconds(note: Path, seconds: float) -> float:
    """Add to the seconds of work that went into a step, over all its starts; return the sum."""
    if not note.is_file():
        return seconds
    begun = json.loads(note.read_text())
    begun["seconds"] += seconds
    note.write_text(json.dumps(begun))
    return float(begun["seconds"])
