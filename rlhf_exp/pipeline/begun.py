"""What a step was begun with: a note in its staging folder, which says whether it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.files import write_json_atomic
from rlhf_exp.store.fingerprint import key_of

NOTE = ".started.json"


@dataclass(frozen=True)
class Begun:
    """The note.

    Attributes:
        code: Digest of each module that the step runs.
        inputs: Digest of each parent's weights, by role (see `weights_digest`).
        replaces: Creation time of the result that is being made again, if one is.
        seconds: Work done so far.
    """

    code: dict[str, str]
    inputs: dict[str, str]
    replaces: str | None
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path | None) -> Self | None:
        """Return the note in a staging folder; `None` if there is none that can be read."""
        try:
            return None if folder is None else cls(**json.loads((folder / NOTE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Leave the note in a staging folder."""
        write_json_atomic(folder / NOTE, asdict(self))

    def later(self, seconds: float) -> Self:
        """Return the note after more work."""
        return replace(self, seconds=self.seconds + seconds)

    def continues(self, artifact: Artifact | None, inputs: Mapping[str, str]) -> bool:
        """Whether what was begun leads to what is wanted now.

        Args:
            artifact: The result to be made again, if there is one.
            inputs: Digests of the parents that are there already.
        """
        replaces = None if artifact is None else artifact.manifest.created
        return self.replaces == replaces and not other_inputs(self.inputs, inputs)


def weights_digest(artifact: Artifact) -> str:
    """Return the digest of an artifact's weights: a step redone under its key may have others.

    Snapshots of other steps are no input of anything.
    """
    return key_of(
        {
            name: entry.sha256
            for name, entry in artifact.manifest.files.items()
            if name.startswith("model/") and name.endswith(".safetensors")
        }
    )


def other_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the roles whose weights differ, of those known on both sides."""
    return sorted(role for role in old.keys() & new.keys() if old[role] != new[role])
