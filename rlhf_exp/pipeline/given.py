"""Models that are given instead of trained: a folder, a run, a store key or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.records import Records
from rlhf_exp.store.store import Store

MODEL = "model"


@dataclass(frozen=True)
class Given:
    """A model that is there already.

    Attributes:
        key: What stands for it in the keys of results made with it.
        model: Folder or hub id.
        artifact: Its artifact, if it is in the store or is an artifact's folder.
    """

    key: str
    model: str
    artifact: Artifact | None = None


class Finder:
    """Finds given models.

    Args:
        store: Where artifacts are.
        records: Where runs are recorded.
        keys: Makes the keys of folders and hub ids.
    """

    def __init__(self, store: Store, records: Records, keys: Keys) -> None:
        self.store, self.records, self.keys = store, records, keys

    def model(self, option: str, use: str, stages: Sequence[str]) -> Given:
        """Return the model that a config value means.

        Args:
            option: How the value is written, for errors: `ppo.use=kl`.
            use: A folder, a run, a store key or a hub id.
            stages: Of a run, the first of these that it has.

        Raises:
            UserError: There is no such model.
        """
        folder = Path(use)
        if (folder / MANIFEST).is_file():
            found = Artifact(folder, Manifest.read(folder))
            if not (folder / MODEL).is_dir():
                raise UserError(f"{option}: {found.stage} {found.key} has no model")
            return Given(found.key, str(folder / MODEL), found)
        if folder.is_dir():
            return Given(self.keys.given(use), use)
        try:
            artifact = self.artifact(option, use, stages)
        except UserError as error:
            if isinstance(error, _NoRun) and use.count("/") == 1 and use[0] not in "./~":
                return Given(self.keys.given(use), use)
            raise
        return Given(artifact.key, str(artifact.path / MODEL), artifact)

    def artifact(self, option: str, run: str, stages: Sequence[str]) -> Artifact:
        """Return what a run, or a store key, has of the first of `stages` that it has.

        Raises:
            UserError: There is no such run, or it has none of them.
        """
        try:
            record = self.records.resolve(run, self.store)
        except UserError as error:
            raise _NoRun(f"{option}: no such folder, run or key. {error}") from error
        stage = next((stage for stage in stages if stage in record.keys), None)
        if stage is None:
            wanted, has = " or ".join(stages), ", ".join(record.keys)
            raise UserError(f"{option}: that run has no {wanted}, only {has}")
        artifact = self.store.lookup(stage, record.keys[stage])
        if artifact is None:
            raise UserError(f"{option}: its {stage} {record.keys[stage]} is no longer in the store")
        return artifact


class _NoRun(UserError):
    """Nothing is called that here, so it may be a hub id."""
