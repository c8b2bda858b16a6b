"""Given models whose weights are pickled, converted to safetensors before anything reads them.

The copies are in `cache/models/` of the output folder, by the digest of what they were made from,
so a model is converted once. Keys are those of the originals. See `models/pickled_weights.py`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_exp.config.evaluation import REFEREE
from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.model_names import pickled_weight_names, split_revision
from rlhf_exp.pipeline.hub import MODEL, Need, Pins
from rlhf_exp.pipeline.keys import MODEL_FILES, model_files
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.store.fingerprint import DigestCache, key_of

log = logging.getLogger(__name__)

TEXT_FILES = tuple(pattern for pattern in MODEL_FILES if pattern != "*.safetensors")
FORMAT = 1
"""Raised when a conversion writes something else than before."""


class LocalModels(NamedTuple):
    """The models that a run reads.

    Attributes:
        steps: The plan's steps; their given models and those of `extra` are what is read.
        base: Folder or hub id of the base model; `None` if it is built from scratch.
    """

    steps: list[Step]
    base: str | None


def local_models(config: Config, steps: Sequence[Step]) -> LocalModels:
    """Return a plan's steps with models of which only safetensors have to be read.

    Args:
        config: The experiment.
        steps: Its plan.

    Raises:
        UserError: Weights are damaged, hold more than tensors, or are no reward model's.
    """
    converter = _Converter(Path(config.output_dir))
    base = config.model.path
    if base is not None:
        base = converter.of(f"model.path={base}", base, config.model.revision)
    found = []
    for step in steps:
        if step.state is StepState.given and step.model is not None and step.artifact is None:
            model = converter.given(f"{step.stage}.use", step.model, step.stage, config)
            step = replace(step, model=model)
        extra = {
            role: given
            if given.artifact is not None
            else replace(
                given, model=converter.given(role, given.model, _kind(role, config), config)
            )
            for role, given in step.extra.items()
        }
        found.append(replace(step, extra=extra))
    return LocalModels(found, base)


def _kind(role: str, config: Config) -> str:
    scores = role == REFEREE or role in config.ppo.reward.term_models
    return "reward" if scores else "policy"


class _Converter:
    """Converts models into the cache of an output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.digests = DigestCache(output_dir / "cache" / "digests.json")

    def given(self, option: str, model: str, stage: str, config: Config) -> str:
        """Return what is read of a model that is given for a stage."""
        if Path(model).is_file():
            return model  # stored answers
        hub_id, revision = self._pinned(model)
        trunk = config.reward.trunk if stage == "reward" and option != REFEREE else None
        if trunk is not None:
            trunk = _named(*self._pinned(trunk))
        local = self.of(f"{option}={model}", hub_id, revision, stage == "reward", trunk)
        return local if local != hub_id else _named(hub_id, revision)

    def _pinned(self, name: str) -> tuple[str, str | None]:
        """Return the hub id or folder that a name says, and its revision: as it was fetched."""
        hub_id, revision = split_revision(name)
        if Path(hub_id).exists():
            return hub_id, None
        pin = Pins(self.output_dir).get(Need(name, MODEL, hub_id, revision))
        return hub_id, revision if pin is None else pin.commit

    def of(
        self,
        option: str,
        model: str,
        revision: str | None,
        reward: bool = False,
        trunk: str | None = None,
    ) -> str:
        """Return a model's converted copy, or the model itself if it has no pickled weights."""
        folder = Path(model) if Path(model).is_dir() else _snapshot(model, revision)
        if folder is None:
            return model
        if not pickled_weight_names(path.name for path in folder.iterdir()):
            return model
        content: dict[str, Any] = {
            "files": self.digests.folder(folder, model_files(folder)),
            "format": FORMAT,
        }
        if trunk is not None:
            source = Path(trunk)
            local = source.is_dir()
            # Its config and its tokenizer, of whatever files, become the copy's.
            content["trunk"] = self.digests.folder(source, TEXT_FILES) if local else trunk
        target = self.output_dir / "cache" / "models" / key_of(content)
        if target.is_dir():
            return str(target)
        log.warning("%s: its weights are pickled; converting them to safetensors, once", option)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            # Only here: transformers and torch take seconds to import.
            from rlhf_exp.models import pickled_weights

            if reward:
                pickled_weights.convert_reward(folder, trunk, part)
            else:
                pickled_weights.convert_model(folder, part)
            part.chmod(0o755)
            try:
                part.rename(target)
            except OSError:  # another run has converted it meanwhile
                if not target.is_dir():
                    raise
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return str(target)


def _named(hub_id: str, revision: str | None) -> str:
    return hub_id if revision is None else f"{hub_id}@{revision}"


def _snapshot(hub_id: str, revision: str | None) -> Path | None:
    """Return the local copy of a hub id that has pickled weights alone; `None` for any other.

    What is not in this machine's cache is asked of the hub, and fetched without being read.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        names = [path.name for path in folder.iterdir()]
        if any(name.endswith(".safetensors") for name in names) or pickled_weight_names(names):
            return folder
    except HFValidationError:
        return None
    except LocalEntryNotFoundError:
        pass
    try:
        wanted = pickled_weight_names(HfApi().list_repo_files(hub_id, revision=revision))
        if not wanted:
            return None
        patterns = [*model_files(None), "*.index.json", *wanted]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception:  # the library raises many classes; who loads the model says more
        return None
