"""No field of the config without a reader: an option that changes nothing is a lie."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rlhf_exp.config.schema_keys import all_keys

PACKAGE = Path(__file__).parents[2] / "rlhf_exp"
KEYS = [key.name for key in all_keys().values() if not key.section]
FIELDS = sorted({name.rpartition(".")[2] for name in KEYS})


def attributes_read() -> set[str]:
    """Return the attributes read in modules outside `config/` that see the config.

    `asdict(config.SECTION)` hands on all fields of a section, to parameters of their names.
    """
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(PACKAGE / "config") or "rlhf_exp.config" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "asdict":
                section = ast.unparse(node.args[0]).rpartition(".")[2]
                names |= {
                    name.split(".")[-1] for name in KEYS if name.split(".")[-2:-1] == [section]
                }
    return names


READ = attributes_read()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_a_reader(field: str) -> None:
    assert field in READ, f"no module outside config/ reads .{field}"
