"""Rules for a user's function, given as `file.py:name`."""

from __future__ import annotations

import ast
from pathlib import Path

from rlhf_exp.config.problems import Findings


def check_function(found: Findings, key: str) -> None:
    """Report a file or a function in it that is not there; nothing is run.

    Args:
        found: Collects the problems.
        key: The config key that names the function.
    """
    file, colon, name = found.value(key).rpartition(":")
    if not colon or not file or not name.isidentifier():
        found.add(key, "expected a file and a function in it: my_reward.py:score.")
        return
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        found.add(key, f"there is no file {path}.")
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        found.add(key, f"{path} is not valid Python: {error}.")
        return
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name not in names:
        listed = f"its functions are {', '.join(names)}" if names else "it has no function"
        found.add(key, f"{path} has no function {name}; {listed}.")
