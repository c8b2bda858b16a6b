"""What parsing has found is remembered by content: nothing stale, nothing parsed twice."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.store import code
from rlhf_exp.store.code import code_digests
from rlhf_exp.store.code_notes import CodeNotes, Found

FILES = {
    "__init__.py": "",
    "a.py": "from pack.b import c\n",
    "b/__init__.py": "from . import c\n",
    "b/c.py": "X = 1\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cache").mkdir()
    return tmp_path / "pack"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are parsed."""
    names: list[str] = []
    parse = ast.parse

    def noted(source: Any, filename: Any = "", *more: Any, **named: Any) -> Any:
        names.append(Path(filename).name)
        return parse(source, filename, *more, **named)

    monkeypatch.setattr(code.ast, "parse", noted)
    return names


def test_each_module_is_parsed_once(package: Path, parsed: list[str]) -> None:
    notes = package.parent / "cache" / "code.json"
    plain = code_digests("pack.a", package)
    assert list(plain) == ["pack/a.py", "pack/b/__init__.py", "pack/b/c.py"]
    assert code_digests("pack.a", package, notes=notes) == plain
    del parsed[:]
    assert code_digests("pack.a", package, notes=notes) == plain
    assert parsed == []


def test_an_edit_of_the_same_length_and_time_is_seen(package: Path, parsed: list[str]) -> None:
    notes = package.parent / "cache" / "code.json"
    before = code_digests("pack.a", package, notes=notes)
    edited = package / "b" / "c.py"
    stamp = edited.stat()
    edited.write_text("X = 2\n")
    os.utime(edited, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    del parsed[:]
    after = code_digests("pack.a", package, notes=notes)
    assert parsed == ["c.py"]
    assert [path for path in after if after[path] != before[path]] == ["pack/b/c.py"]


def test_the_same_text_in_another_place_imports_something_else(
    package: Path, parsed: list[str]
) -> None:
    """`from . import c` is `pack.b.c` in a package's own file, and `pack.c` in a module."""
    notes = package.parent / "cache" / "code.json"
    code_digests("pack.b", package, notes=notes)
    (package / "d.py").write_text(FILES["b/__init__.py"])
    (package / "c.py").write_text("Y = 1\n")
    found = code_digests("pack.d", package, notes=notes)
    assert list(found) == ["pack/c.py", "pack/d.py"]


def test_other_parsers_and_broken_files_do_not_count(tmp_path: Path) -> None:
    parser, path = tmp_path / "parser.py", tmp_path / "code.json"
    parser.write_text("1")

    def ask(expected: Found, parse: Found | None) -> None:
        notes = CodeNotes(path, parser)
        assert notes.of(b"x", "a", lambda: parse or pytest.fail("is known")) == expected
        notes.keep()

    first, second = Found("12", ("pack.b",)), Found("34", ())
    ask(first, first)
    ask(first, None)
    parser.write_text("2")
    ask(second, second)
    ask(second, None)
    for broken in ("{", "[]", json.dumps({**json.loads(path.read_text()), "modules": {"x": 1}})):
        path.write_text(broken)
        ask(first, first)


def test_nothing_is_made_for_a_plan(tmp_path: Path, package: Path) -> None:
    code_digests("pack.a", package, notes=tmp_path / "outputs" / "cache" / "code.json")
    assert not (tmp_path / "outputs").exists()
