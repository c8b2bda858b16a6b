"""Names that a user can set: the schema's dotted keys and the groups of `conf/`, without Hydra.

For a misspelt name, `closest_keys` finds the similar valid ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.fields import documentation
from rlhf_exp.config.problems import format_value

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the folder is inside the package, in a checkout beside it.
CONF = next(
    (folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()),
    _PACKAGE / "conf",
)


@dataclass(frozen=True)
class ConfigKey:
    """A key of the config.

    Attributes:
        name: The dotted key.
        field: Its declaration in the dataclass.
        section: The dataclass of a section, None for a value.
        type: The type as the documentation names it.
        default: The default as it is written on the command line; empty for a section.
        doc: One sentence.
        choices: The valid names of an enum, else empty.
    """

    name: str
    field: Field[Any]
    section: type | None
    type: str
    default: str
    doc: str
    choices: tuple[str, ...]

    @property
    def parent(self) -> str:
        """The section that the key is in; empty at the root."""
        return self.name.rpartition(".")[0]


@cache
def all_keys() -> dict[str, ConfigKey]:
    """Return every key by its dotted name, a section before its keys."""
    return {key.name: key for key in _section_keys(Config, "")}


def _section_keys(section: type, prefix: str) -> Iterator[ConfigKey]:
    hints = get_type_hints(section)
    for field in fields(section):
        key = _config_key(prefix + field.name, field, hints[field.name])
        yield key
        if key.section is not None:
            yield from _section_keys(key.section, key.name + ".")


def _config_key(name: str, field: Field[Any], hint: Any) -> ConfigKey:  # noqa: ANN401 - a type annotation
    if is_dataclass(hint):
        doc = documentation(field) or (hint.__doc__ or "")
        return ConfigKey(name, field, hint, "section", "", doc, ())  # type: ignore[arg-type]
    types = [part for part in (hint, *get_args(hint)) if isinstance(part, type)]
    choices = tuple(m.name for part in types if issubclass(part, Enum) for m in part)
    factory: Any = field.default_factory
    default = factory() if callable(factory) else field.default
    return ConfigKey(
        name, field, None, _type_name(hint), format_value(default), documentation(field), choices
    )


_TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true|false"}


def _type_name(hint: Any) -> str:  # noqa: ANN401 - a type annotation
    parts = [part for part in get_args(hint) if part is not NoneType]
    if is_dataclass(hint):
        return "{" + ",".join(field.name for field in fields(hint)) + "}"
    if get_origin(hint) is list:
        return f"[{_type_name(parts[0])},...]"
    if NoneType in get_args(hint):
        return f"{_type_name(parts[0])} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(member.name for member in hint)
    return _TYPE_NAMES[hint]


def closest_keys(name: str, others: Sequence[str] = ()) -> list[str]:
    """Return the keys most similar to an unknown one, best first.

    Keys of the same last name in other sections come first (`lr`: `sft.lr`), then similar names in
    its own section, then similar dotted keys.

    Args:
        name: The unknown key.
        others: Further valid names, such as groups.
    """
    keys = all_keys()
    parent, _, last = name.rpartition(".")
    same_name = [key for key in keys if key.rpartition(".")[2] == last]
    siblings = {key.rpartition(".")[2]: key for key in keys if keys[key].parent == parent}
    similar_siblings = [siblings[near] for near in closest_names(last, list(siblings))]
    similar_keys = closest_names(name, [*keys, *others])
    same_name_sorted = sorted(
        same_name, key=lambda key: not key.startswith(name.split(".")[0] + ".")
    )
    return list(dict.fromkeys([*same_name_sorted, *similar_siblings, *similar_keys]))[:3]


def closest_names(name: str, valid: Sequence[str], count: int = 3) -> list[str]:
    """Return at most `count` valid names similar to a misspelt one, best first."""
    return get_close_matches(name, valid, n=count, cutoff=0.6)


def did_you_mean(near: Sequence[str]) -> str:
    """Return a sentence that offers similar names; empty if there are none."""
    return f" Did you mean {' or '.join(near)}?" if near else ""


@dataclass(frozen=True)
class ConfigGroup:
    """A config group.

    Attributes:
        name: Its name, such as `model` or `hydra/launcher`.
        options: Descriptions of the options, by name.
        default: The default option; None if there is none.
    """

    name: str
    options: dict[str, str]
    default: str | None


def read_groups(folders: Sequence[Path] = (CONF,)) -> dict[str, ConfigGroup]:
    """Return the groups in the order of `config.yaml`, then the others.

    Args:
        folders: `conf/`, then a user's config folders, whose options are added.
    """
    defaults = _default_options(folders[0])
    options: dict[str, dict[str, str]] = {name: {} for name in defaults if "/" not in name}
    for folder in folders:
        for path in sorted(_yaml_files(folder)):
            name = path.parent.relative_to(folder).as_posix()
            if name != ".":
                options.setdefault(name, {})[path.stem] = first_comment(path)
    return {
        name: ConfigGroup(name, group_options, defaults.get(name))
        for name, group_options in options.items()
    }


def _yaml_files(folder: Path) -> Iterator[Path]:
    # Not by rglob, which fails where a folder vanishes or may not be read.
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if name.endswith(".yaml"))


def _default_options(conf: Path) -> dict[str, str | None]:
    content = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))
    return {
        name.removeprefix("override "): option
        for entry in content["defaults"]
        if isinstance(entry, dict)
        for name, option in entry.items()
    }


def first_comment(path: Path) -> str:
    """Return a YAML file's first comment line that is not a package directive."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""
