"""Where a user's function is: `file.py:name`, or `package.module:name` of what can be imported.

Modules are looked for as Python does, and in the folder where the command is given.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import Parameter, Signature
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


ROWS = "rows"
"""Name of a reward function's third parameter, which may also be called otherwise."""


def takes_rows(signature: Signature) -> bool:
    """Return whether a reward function takes the rows of the prompts besides the texts.

    It does if three arguments are required, or if the third parameter is called `rows`.

    Raises:
        TypeError: it can be called neither with two arguments nor with three; says what it takes.
    """
    parameters = list(signature.parameters.values())
    positional = [
        parameter
        for parameter in parameters
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(parameter.default is Parameter.empty for parameter in positional)
    takes = required == 3 or (len(positional) > 2 and positional[2].name == ROWS)
    several = any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters)
    by_name = any(
        parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is Parameter.empty
        for parameter in parameters
    )
    if required > 2 + takes or by_name or not (several or len(positional) >= 2):
        found = ", ".join(str(parameter).partition(":")[0] for parameter in parameters)
        raise TypeError(
            f"it takes ({found}); expected (prompts, responses) or (prompts, responses, rows)"
        )
    return takes


def declared_fields(reference: str) -> tuple[str, ...]:
    """Return the fields of rows that a function's file says it needs; it is parsed, not run.

    It says so by a list or tuple of texts, `FIELDS = ("answer",)`, at the top level.
    """
    path, _ = function_source(reference)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()  # reported where the function is looked for
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "FIELDS" for target in targets):
            try:
                names = ast.literal_eval(node.value)
                return (names,) if isinstance(names, str) else tuple(map(str, names))
            except (ValueError, TypeError):
                return ()
    return ()


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
