"""Models and data sets that an experiment needs from the Hugging Face hub, and their pins.

`<output_dir>/pins.json` holds the revision of each model and data set that was fetched. The pin is
used where the config leaves the revision open, so that results do not depend on the day.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_exp.config.evaluation import (
    REFEREE,
    TOXICITY,
    ScorerKind,
    ToxicityConfig,
    parts_of,
    scores_toxicity,
)
from rlhf_exp.config.experiment import Config, DataSource
from rlhf_exp.errors import UserError
from rlhf_exp.model_names import pickled_weight_names, split_revision
from rlhf_exp.pipeline.keys import MODEL_FILES
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.store.atomic_files import files_below, write_json_atomic
from rlhf_exp.store.sealed import file_digest_once

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0
_SHA256 = re.compile(r"[0-9a-f]{64}")

PINS = "pins.json"
MODEL, DATASET = "model", "dataset"
TOXICITY_DATA, TOXICITY_SCORER = "eval.toxicity.data", "eval.toxicity.scorer"


@dataclass(frozen=True)
class Need:
    """A model or data set on the hub.

    Attributes:
        key: The config key that names it.
        kind: `model` or `dataset`.
        id: Hub id.
        revision: The revision in the config, if there is one.
    """

    key: str
    kind: str
    id: str
    revision: str | None

    def __str__(self) -> str:
        """Return `model EleutherAI/gpt-j-6b (model.path)`."""
        return f"{self.kind} {self.id} ({self.key})"


@dataclass(frozen=True)
class Pin:
    """The revision and files of a need that was fetched.

    Attributes:
        commit: The revision.
        files: The files, relative to the folder in the cache.
    """

    commit: str
    files: list[str]


def needs(config: Config, steps: Sequence[Step]) -> list[Need]:
    """Return the models and data sets that an experiment reads from the hub.

    Args:
        config: The experiment.
        steps: Its plan.
    """
    wanted = []
    model, data = config.model, config.data
    if model.path is not None and not Path(model.path).exists():
        wanted.append(Need("model.path", MODEL, model.path, model.revision))
    if data.source is DataSource.hub and data.path is not None and not Path(data.path).exists():
        wanted.append(Need("data.path", DATASET, data.path, data.revision))
    judge = config.eval.judge
    for step in steps:
        if step.stage == "eval" and judge.model is not None and not Path(judge.model).exists():
            wanted.append(Need("eval.judge.model", MODEL, judge.model, judge.revision))
        given = step.model if step.state is StepState.given else None
        if given is not None and not Path(given).exists():
            wanted.append(Need(f"{step.stage}.use", MODEL, *split_revision(given)))
        for role, extra in step.extra.items():
            if not Path(extra.model).exists():
                option = "eval.reward_quality.referee" if role == REFEREE else "eval.models"
                if role in config.ppo.reward.term_models:
                    option = "ppo.reward.terms"
                wanted.append(Need(option, MODEL, *split_revision(extra.model)))
    trunk = config.reward.trunk
    if trunk is not None and not Path(trunk).exists() and _converts(config, steps):
        wanted.append(Need("reward.trunk", MODEL, *split_revision(trunk)))
    if any(step.stage == "eval" for step in steps):
        wanted += _of_toxicity(config)
    return wanted


def _converts(config: Config, steps: Iterable[Step]) -> bool:
    """Whether a plan has a given reward model, whose trunk the config may name."""
    terms = config.ppo.reward.term_models
    return any(
        (step.stage == "reward" and step.state is StepState.given and step.artifact is None)
        or any(role in terms and given.artifact is None for role, given in step.extra.items())
        for step in steps
    )


def _of_toxicity(config: Config) -> list[Need]:
    """Return the prompts and the scorer of the evaluation's toxicity part, if they are used."""
    section = config.eval.toxicity
    wanted = []
    asks = TOXICITY in parts_of(config.eval) and config.eval.samples is None
    if asks and not Path(section.data).expanduser().exists():
        wanted.append(Need(TOXICITY_DATA, DATASET, section.data, section.revision))
    classifier = section.scorer_kind is ScorerKind.classifier
    scores = scores_toxicity(config.eval) and classifier
    if scores and not Path(section.scorer).expanduser().exists():
        wanted.append(Need(TOXICITY_SCORER, MODEL, section.scorer, section.scorer_revision))
    return wanted


def pinned(config: Config) -> Config:
    """Return the config with pinned revisions where it leaves them open."""
    pins = Pins(Path(config.output_dir))
    model, data = config.model, config.data
    if model.path is not None and model.revision is None:
        pin = pins.get(Need("model.path", MODEL, model.path, None))
        model = replace(model, revision=None if pin is None else pin.commit)
    if data.source is DataSource.hub and data.path is not None and data.revision is None:
        pin = pins.get(Need("data.path", DATASET, data.path, None))
        data = replace(data, revision=None if pin is None else pin.commit)
    judge = config.eval.judge
    if judge.model is not None and judge.revision is None:
        pin = pins.get(Need("eval.judge.model", MODEL, judge.model, None))
        judge = replace(judge, revision=None if pin is None else pin.commit)
    evaluation = replace(config.eval, judge=judge, toxicity=_pinned_toxicity(config, pins))
    return replace(config, model=model, data=data, eval=evaluation)


def _pinned_toxicity(config: Config, pins: Pins) -> ToxicityConfig:
    pins_by_key = {
        need.key: pins.get(need) for need in _of_toxicity(config) if need.revision is None
    }
    revisions: dict[str, Any] = {
        field: pin.commit
        for key, field in ((TOXICITY_DATA, "revision"), (TOXICITY_SCORER, "scorer_revision"))
        if (pin := pins_by_key.get(key)) is not None
    }
    return replace(config.eval.toxicity, **revisions)


class Pins:
    """The pins of an output folder.

    Args:
        output_dir: The folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / PINS

    def get(self, need: Need) -> Pin | None:
        """Return the pin of a need, if it was fetched.

        Raises:
            UserError: The file is damaged.
        """
        pin = self._read().get(_name(need))
        return None if pin is None else Pin(str(pin["commit"]), list(pin["files"]))

    def set(self, need: Need, pin: Pin) -> None:
        """Save the pin of a need."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.path, self._read() | {_name(need): asdict(pin)})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            pins: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(
                f"{self.path}: not JSON ({error}); delete it and fetch again"
            ) from error
        if not isinstance(pins, dict) or not all(
            isinstance(pin, dict) and {"commit", "files"} <= pin.keys() for pin in pins.values()
        ):
            raise UserError(f"{self.path}: no pins by name; delete it and fetch again")
        return pins


def _name(need: Need) -> str:
    return f"{need.kind}:{need.id}@{need.revision or ''}"


def missing(output_dir: Path, wanted: Iterable[Need]) -> list[Need]:
    """Return the needs that are not complete in this machine's cache."""
    pins, absent = Pins(output_dir), []
    for need in wanted:
        pin = pins.get(need)
        if pin is None:
            # The revision may be that of a pin itself.
            pin = pins.get(replace(need, revision=None))
            pin = pin if pin is not None and pin.commit == need.revision else None
        if pin is None or not _cached(need, pin):
            absent.append(need)
    return absent


def _cached(need: Need, pin: Pin) -> bool:
    from huggingface_hub import try_to_load_from_cache

    paths = (
        try_to_load_from_cache(need.id, name, revision=pin.commit, repo_type=need.kind)
        for name in pin.files
    )
    return all(isinstance(path, str) and Path(path).exists() for path in paths)


def check_reachable(output_dir: Path, wanted: Sequence[Need]) -> None:
    """Use this machine's cache alone if the hub does not answer: no library then asks it again.

    The libraries would try each file five times, and each try would be two lines.

    Args:
        output_dir: Folder of the pins; what was fetched is not asked for.
        wanted: What is needed from the hub.

    Raises:
        UserError: The hub does not answer, and the cache lacks something.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import get_session

    unpinned = missing(output_dir, wanted)
    if not unpinned or constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        return
    except Exception as error:  # of the HTTP library below it, which the user may replace
        reason = " ".join((str(error) or type(error).__name__).split())
    hub = f"the Hugging Face hub, {constants.ENDPOINT}, does not answer ({reason})"
    cache = Path(constants.HF_HUB_CACHE)
    absent = [
        need
        for need in unpinned
        if not any(
            (cache / repo_folder_name(repo_id=need.id, repo_type=need.kind)).glob("snapshots/*")
        )
    ]
    if absent:
        raise UserError(
            f"{hub}, and this machine's cache has no {', no '.join(map(str, absent))}. Fetch it "
            "where there is a network (rlhf-exp fetch, with the same options), give a folder's "
            "path, or set HF_ENDPOINT to a mirror"
        )
    log.warning("%s: %s is read from this machine's cache", hub, ", ".join(map(str, unpinned)))
    os.environ["HF_HUB_OFFLINE"] = "1"  # of processes started from here
    constants.HF_HUB_OFFLINE = True
    if "datasets.config" in sys.modules:
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def check_cached(model: str, revision: str | None) -> None:
    """Check that a model from the hub is in this machine's cache as it was uploaded.

    The cache names each large file by the sha256 of its content. A model that is not there yet is
    not looked at: it will be downloaded.

    Raises:
        UserError: A file is damaged.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        hub_id, revision = split_revision(model, revision)
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return
    for path in files_below(folder, links=True):
        blob = path.resolve()
        if _SHA256.fullmatch(blob.name) and file_digest_once(blob) != blob.name:
            raise UserError(
                f"{path}: damaged: the content is not what the hub has ({blob.stat().st_size} "
                f"bytes). Remove {blob} and fetch the model again (rlhf-exp fetch, or the same "
                "command with the network)"
            )


def fetch(output_dir: Path, need: Need, update: bool = False) -> Pin:
    """Download a need into the cache, at its pinned revision if it has one, and pin it.

    Args:
        output_dir: Folder of the pins.
        need: The model or data set.
        update: Whether to ignore an earlier pin.

    Raises:
        UserError: The hub does not have it, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    pins = Pins(output_dir)
    pin = None if update else pins.get(need)
    try:
        commit = pin.commit if pin is not None else None
        if commit is None:
            info = HfApi().repo_info(need.id, repo_type=need.kind, revision=need.revision)
            commit = str(info.sha)
        # Weights that are pickled are fetched where there are no others; nothing reads them here.
        patterns = list(MODEL_FILES) if need.kind == MODEL else None
        if patterns is not None:
            listed = HfApi().list_repo_files(need.id, revision=commit)
            patterns += pickled_weight_names(listed)
        folder = Path(
            snapshot_download(
                need.id,
                repo_type=need.kind,
                revision=commit,
                allow_patterns=patterns,
            )
        )
    except Exception as error:  # the library, and those below it, raise many unrelated classes
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"{need}: cannot be fetched ({reason})") from error
    if need.kind == DATASET:
        _prepare(need, commit)
    files = [path for path in folder.rglob("*") if path.is_file()]
    new_pin = Pin(commit, sorted(path.relative_to(folder).as_posix() for path in files))
    pins.set(need, new_pin)
    return new_pin


def _prepare(need: Need, commit: str) -> None:
    """Let `datasets` convert a data set: without a network it finds only converted files."""
    from rlhf_exp.data.sources import load_splits
    from rlhf_exp.evaluation.toxicity.prompts import load_prompts

    if need.key == TOXICITY_DATA:
        load_prompts(need.id, commit)
    else:
        load_splits(need.id, commit)
