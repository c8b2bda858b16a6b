"""Declaration of config fields: default, documentation, and role in the keys of the store.

Each field of a section is a `setting`. `key_content` turns a section into the values that identify
an artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import Enum
from typing import Any

_DOC, _KEY, _NEUTRAL = "doc", "key", "neutral"


def setting(
    default: Any = MISSING,  # noqa: ANN401 - any field type
    doc: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    key: bool = True,
    neutral: Any = MISSING,  # noqa: ANN401
) -> Any:  # noqa: ANN401 - as dataclasses.field, so that annotations stay the field's own
    """Declare a field of a config section.

    Args:
        default: The default value.
        doc: One sentence for `--help` and `docs/reference/config.md`, with the unit.
        factory: Makes a mutable default.
        key: Whether the value changes what is computed, and so belongs in an artifact's key.
        neutral: For fields added after a release: the value that means "as before", which is left
            out of the key, so that artifacts made before the field existed stay valid.
    """
    metadata = {_DOC: doc, _KEY: key}
    if neutral is not MISSING:
        metadata[_NEUTRAL] = neutral
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def documentation(item: Field[Any]) -> str:
    """Return a field's documentation."""
    return str(item.metadata.get(_DOC, ""))


def in_key(item: Field[Any]) -> bool:
    """Return whether a field's value belongs in an artifact's key."""
    return bool(item.metadata.get(_KEY, True))


def key_content(section: Any) -> Any:  # noqa: ANN401 - a config dataclass, recursively
    """Return the values of a section that belong in an artifact's key, as plain JSON.

    Left out are fields with `key=False`, fields at their `neutral` value, and sections of which
    nothing remains.
    """
    if is_dataclass(section) and not isinstance(section, type):
        content = {}
        for declaration in fields(section):
            value = getattr(section, declaration.name)
            if not in_key(declaration):
                continue
            if _NEUTRAL in declaration.metadata and value == declaration.metadata[_NEUTRAL]:
                continue
            nested = key_content(value)
            # A section added after a release may have all fields at their neutral values.
            if nested or not is_dataclass(value):
                content[declaration.name] = nested
        return content
    if isinstance(section, Enum):
        return section.name
    if isinstance(section, list | tuple):
        return [key_content(value) for value in section]
    if isinstance(section, dict):
        return {name: key_content(value) for name, value in section.items()}
    return section
