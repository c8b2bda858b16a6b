"""Where a user's function is: `file.py:name`, or `package.module:name` of what can be imported.

Modules are looked for as Python does, and in the folder where the command is given.
"""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def names_function(reference: str) -> bool:
    """Return whether a text names a function, and no hub id or folder."""
    source, colon, name = reference.rpartition(":")
    return bool(colon) and name.isidentifier() and (source.endswith(".py") or _is_module(source))


def function_source(reference: str) -> tuple[Path, str]:
    """Return the file of a function, which need not exist, and the function's name.

    Nothing is imported, unless the module is one that only a finder of its own can find.
    """
    source, _, name = reference.rpartition(":")
    if source.endswith(".py") or not _is_module(source):
        return Path(source).expanduser(), name
    return _module_file(source) or Path(*source.split(".")).with_suffix(".py"), name


def function_module(reference: str) -> str | None:
    """Return the module of `package.module:name`; None for a file."""
    source, _, _ = reference.rpartition(":")
    return source if not source.endswith(".py") and _is_module(source) else None


def _is_module(source: str) -> bool:
    return _MODULE.fullmatch(source) is not None


def _module_file(module: str) -> Path | None:
    names = module.split(".")
    locations: list[str] | None = [*sys.path, str(Path.cwd())]
    spec = None
    for index in range(len(names)):
        spec = PathFinder.find_spec(".".join(names[: index + 1]), locations) if locations else None
        locations = None if spec is None else list(spec.submodule_search_locations or [])
    if spec is None:
        try:
            spec = find_spec(module)  # installed in development mode, perhaps
        except (ImportError, ValueError):
            return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
