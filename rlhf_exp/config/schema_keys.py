"""The keys of the config, and the valid names closest to a misspelt one.

The config groups: the folders of `conf/`, read without Hydra.
"""

from __future__ import annotations

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


_WORDS = {int: "integer", float: "number", str: "text", bool: "true|false"}


def _type_name(hint: Any) -> str:  # noqa: ANN401 - a type annotation
    parts = [part for part in get_args(hint) if part is not NoneType]
    if is_dataclass(hint):
        return "{" + ",".join(item.name for item in fields(hint)) + "}"
    if get_origin(hint) is list:
        return f"[{_type_name(parts[0])},...]"
    if NoneType in get_args(hint):
        return f"{_type_name(parts[0])} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(member.name for member in hint)
    return _WORDS[hint]


def _key(name: str, item: Field[Any], hint: Any) -> ConfigKey:  # noqa: ANN401 - a type annotation
    if is_dataclass(hint):
        doc = documentation(item) or (hint.__doc__ or "")
        return ConfigKey(name, item, hint, "section", "", doc, ())  # type: ignore[arg-type]
    options = [part for part in (hint, *get_args(hint)) if isinstance(part, type)]
    choices = tuple(m.name for part in options if issubclass(part, Enum) for m in part)
    factory: Any = item.default_factory
    default = factory() if callable(factory) else item.default
    return ConfigKey(
        name, item, None, _type_name(hint), format_value(default), documentation(item), choices
    )


def _walk(section: type, prefix: str) -> Iterator[ConfigKey]:
    hints = get_type_hints(section)
    for item in fields(section):
        key = _key(prefix + item.name, item, hints[item.name])
        yield key
        if key.section is not None:
            yield from _walk(key.section, key.name + ".")


@cache
def all_keys() -> dict[str, ConfigKey]:
    """Return every key by its dotted name, sections before what is in them."""
    return {key.name: key for key in _walk(Config, "")}


def closest_names(name: str, valid: Sequence[str], count: int = 3) -> list[str]:
    """Return the valid names most like a misspelt one, best first, and at most `count`."""
    return get_close_matches(name, valid, n=count, cutoff=0.6)


def closest_keys(name: str, others: Sequence[str] = ()) -> list[str]:
    """Return the keys closest to an unknown one, best first.

    Keys of that very name in other sections come first (`lr`: `sft.lr`), then names like it in the
    section it was looked for in, then keys that look alike as a whole.

    Args:
        name: The unknown key.
        others: Further valid names, such as groups.
    """
    keys = all_keys()
    parent, _, last = name.rpartition(".")
    same = [key for key in keys if key.rpartition(".")[2] == last]
    siblings = {key.rpartition(".")[2]: key for key in keys if keys[key].parent == parent}
    alike = [siblings[near] for near in closest_names(last, list(siblings))]
    whole = closest_names(name, [*keys, *others])
    near_home = sorted(same, key=lambda key: not key.startswith(name.split(".")[0] + "."))
    return list(dict.fromkeys([*near_home, *alike, *whole]))[:3]


def did_you_mean(near: Sequence[str]) -> str:
    """Return the sentence that offers the closest names, empty if there are none."""
    return f" Did you mean {' or '.join(near)}?" if near else ""


CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class ConfigGroup:
    """A config group.

    Attributes:
        name: Its name, such as `model` or `hydra/launcher`.
        options: What each option is, by name.
        default: The default option, None if there is none.
    """

    name: str
    options: dict[str, str]
    default: str | None


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


def read_groups(folders: Sequence[Path] = (CONF,)) -> dict[str, ConfigGroup]:
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
    return {name: ConfigGroup(name, found, chosen.get(name)) for name, found in options.items()}
