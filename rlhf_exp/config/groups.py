"""The config groups: the folders of `conf/`, read without Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class Group:
    """A config group.

    Attributes:
        name: Its name, such as `model` or `hydra/launcher`.
        options: What each option is, by name.
        chosen: The default option, None if there is none.
    """

    name: str
    options: dict[str, str]
    chosen: str | None


def description(path: Path) -> str:
    """Return a YAML file's first comment that is not a package directive."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""


def _defaults(conf: Path) -> dict[str, str | None]:
    content = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))
    return {
        name: option
        for entry in content["defaults"]
        if isinstance(entry, dict)
        for name, option in entry.items()
    }


def read_groups(folders: Sequence[Path] = (CONF,)) -> dict[str, Group]:
    """Return the groups in the order of `config.yaml`, then the others.

    Args:
        folders: `conf/`, then a user's further config folders, whose options are added.
    """
    chosen = _defaults(folders[0])
    options: dict[str, dict[str, str]] = {name: {} for name in chosen if "override" not in name}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            name = path.parent.relative_to(folder).as_posix()
            if name != ".":
                options.setdefault(name, {})[path.stem] = description(path)
    return {name: Group(name, found, chosen.get(name)) for name, found in options.items()}
