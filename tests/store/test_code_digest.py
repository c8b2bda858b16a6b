"""What parsing has found is remembered by content: nothing stale, nothing parsed twice."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store import code_digest
from rlhf_exp.store.code_digest import CodeNotes, ParsedModule, changed, code_digests

LOSSES = '''"""Losses."""

from pack.algo.masks import masked


def loss(x, y):
    """Squared error."""
    # why squared
    return masked((x - y) ** 2)
'''
FILES = {
    "__init__.py": "",
    "algo/__init__.py": "",
    "algo/losses.py": LOSSES,
    "algo/masks.py": "EPSILON = 1e-8\n\ndef masked(x):\n    return x\n",
    "algo/unused.py": "raise RuntimeError\n",
    "config/__init__.py": "VERSION = 1\n",
    "config/types.py": "class Config: ...\n",
    "stages/ppo.py": (
        "from typing import TYPE_CHECKING\n"
        "import json, os.path\n"
        "from ..algo import losses as l\n"
        "if TYPE_CHECKING:\n    from pack.algo import unused\n"
        "else:\n    import pack.other\n"
        "def run():\n"
        "    from pack.config import VERSION, types\n"
        '    start("pack.worker:main")\n'
    ),
    "other.py": "",
    "worker.py": "from . import helper\n",
    "helper.py": "def help(): return 1\n",
    "cycle.py": "import pack.cycle\nfrom pack import cycle\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pack"


def test_the_closure_is_what_runs(package: Path) -> None:
    digests = code_digests("pack.stages.ppo", package)
    assert list(digests) == [
        "pack/algo/losses.py",
        "pack/algo/masks.py",
        "pack/config/__init__.py",
        "pack/config/types.py",
        "pack/helper.py",
        "pack/stages/ppo.py",
        "pack/worker.py",
    ]
    assert all(len(digest) == 16 for digest in digests.values())


def test_excluded_packages_are_not_followed(package: Path) -> None:
    digests = code_digests("pack.stages.ppo", package, exclude=["pack.algo", "pack.work"])
    assert set(FILES) >= {name.removeprefix("pack/") for name in digests}
    assert "pack/algo/losses.py" not in digests
    assert "pack/algo/masks.py" not in digests
    assert "pack/worker.py" in digests


def test_an_import_of_itself_ends(package: Path) -> None:
    assert list(code_digests("pack.cycle", package)) == ["pack/cycle.py"]


@pytest.mark.parametrize(
    "text",
    [
        LOSSES.replace("Squared error.", "Another docstring."),
        LOSSES.replace('    """Squared error."""\n', ""),
        LOSSES.replace("# why squared", "# why not"),
        LOSSES.replace("loss(x, y)", "loss(\n    x,\n    y,\n)"),
        LOSSES.replace("(x - y) ** 2", "((x-y)**2)"),
        LOSSES.replace('"""Losses."""', "'''Losses\n\nof many kinds.'''"),
        LOSSES + "\n\n",
    ],
)
def test_comments_docstrings_and_formatting_do_not_count(package: Path, text: str) -> None:
    before = code_digests("pack.stages.ppo", package)
    (package / "algo" / "losses.py").write_text(text)
    assert text != LOSSES
    assert code_digests("pack.stages.ppo", package) == before


@pytest.mark.parametrize(
    "text",
    [
        LOSSES.replace("** 2", "** 3"),
        LOSSES.replace("** 2", "** 2.0"),
        LOSSES.replace("x - y", "x + y"),
        LOSSES.replace("x - y", "y - x"),
        LOSSES.replace("(x, y)", "(x, y=None)"),
        LOSSES.replace("(x, y)", "(y, x)"),
        LOSSES.replace("return ", ""),
        LOSSES.replace("return ", "return -"),
        LOSSES.replace("def ", "async def "),
    ],
)
def test_a_changed_constant_operator_or_name_counts(package: Path, text: str) -> None:
    before = code_digests("pack.stages.ppo", package)
    (package / "algo" / "losses.py").write_text(text)
    after = code_digests("pack.stages.ppo", package)
    assert changed(before, after) == ["pack/algo/losses.py"]


def test_a_change_two_imports_away_is_named(package: Path) -> None:
    before = code_digests("pack.stages.ppo", package)
    (package / "algo" / "masks.py").write_text(FILES["algo/masks.py"].replace("1e-8", "1e-6"))
    (package / "algo" / "unused.py").write_text("changed = True\n")
    after = code_digests("pack.stages.ppo", package)
    assert changed(before, after) == ["pack/algo/masks.py"]


def test_files_that_come_and_go_are_named(package: Path) -> None:
    before = code_digests("pack.stages.ppo", package)
    (package / "helper.py").unlink()
    (package / "algo" / "__init__.py").write_text("import pack.algo.unused\n")
    after = code_digests("pack.stages.ppo", package)
    assert changed(before, after) == [
        "pack/algo/__init__.py",
        "pack/algo/unused.py",
        "pack/helper.py",
    ]


def test_digests_do_not_depend_on_where_the_package_lies(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "pack"
    copy.parent.mkdir()
    before = code_digests("pack.stages.ppo", package)
    package.rename(copy)
    assert code_digests("pack.stages.ppo", copy) == before


def test_a_digest_stays_as_it_was_recorded(tmp_path: Path) -> None:
    # Recorded by CPython 3.11 and the same with 3.12 and 3.13, between which `ast.dump` differs.
    (tmp_path / "pack").mkdir()
    text = 'def f(x, *, y=1): return f"{x!r:>{y}}"\n'
    (tmp_path / "pack" / "__init__.py").write_text(text)
    assert code_digests("pack", tmp_path / "pack") == {"pack/__init__.py": "b1038abee22916ad"}


def test_bad_source_names_file_and_line(package: Path) -> None:
    (package / "helper.py").write_text("x = 1\ndef (:\n")
    with pytest.raises(UserError, match=r"helper\.py:2: not valid Python"):
        code_digests("pack.stages.ppo", package)


def test_an_unknown_entry_is_an_error(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pack\.stages\.nothing"):
        code_digests("pack.stages.nothing", package)


def test_it_reads_the_real_package() -> None:
    import rlhf_exp

    root = Path(rlhf_exp.__file__).parent
    digests = code_digests("rlhf_exp.store.lease", root)
    expected = {
        f"rlhf_exp/{name}.py"
        for name in (
            "__init__",
            "errors",
            "redaction",
            "store/artifact",
            "store/atomic_files",
            "store/lease",
            "store/sealed",
        )
    }
    assert set(digests) == expected


NOTED_FILES = {
    "__init__.py": "",
    "a.py": "from pack.b import c\n",
    "b/__init__.py": "from . import c\n",
    "b/c.py": "X = 1\n",
}


@pytest.fixture
def noted_package(tmp_path: Path) -> Path:
    for name, text in NOTED_FILES.items():
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

    monkeypatch.setattr(code_digest.ast, "parse", noted)
    return names


def test_each_module_is_parsed_once(noted_package: Path, parsed: list[str]) -> None:
    notes = noted_package.parent / "cache" / "code.json"
    plain = code_digests("pack.a", noted_package)
    assert list(plain) == ["pack/a.py", "pack/b/__init__.py", "pack/b/c.py"]
    assert code_digests("pack.a", noted_package, notes=notes) == plain
    del parsed[:]
    assert code_digests("pack.a", noted_package, notes=notes) == plain
    assert parsed == []


def test_an_edit_of_the_same_length_and_time_is_seen(
    noted_package: Path, parsed: list[str]
) -> None:
    notes = noted_package.parent / "cache" / "code.json"
    before = code_digests("pack.a", noted_package, notes=notes)
    edited = noted_package / "b" / "c.py"
    stamp = edited.stat()
    edited.write_text("X = 2\n")
    os.utime(edited, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    del parsed[:]
    after = code_digests("pack.a", noted_package, notes=notes)
    assert parsed == ["c.py"]
    assert [path for path in after if after[path] != before[path]] == ["pack/b/c.py"]


def test_the_same_text_in_another_place_imports_something_else(
    noted_package: Path, parsed: list[str]
) -> None:
    """`from . import c` is `pack.b.c` in a package's own file, and `pack.c` in a module."""
    notes = noted_package.parent / "cache" / "code.json"
    code_digests("pack.b", noted_package, notes=notes)
    (noted_package / "d.py").write_text(NOTED_FILES["b/__init__.py"])
    (noted_package / "c.py").write_text("Y = 1\n")
    found = code_digests("pack.d", noted_package, notes=notes)
    assert list(found) == ["pack/c.py", "pack/d.py"]


def test_other_parsers_and_broken_files_do_not_count(tmp_path: Path) -> None:
    parser, path = tmp_path / "parser.py", tmp_path / "code.json"
    parser.write_text("1")

    def ask(expected: ParsedModule, parse: ParsedModule | None) -> None:
        notes = CodeNotes(path, parser)
        assert notes.of(b"x", "a", lambda: parse or pytest.fail("is known")) == expected
        notes.keep()

    first, second = ParsedModule("12", ("pack.b",)), ParsedModule("34", ())
    ask(first, first)
    ask(first, None)
    parser.write_text("2")
    ask(second, second)
    ask(second, None)
    for broken in ("{", "[]", path.read_text().replace("34", "12")):
        path.write_text(broken)
        ask(first, first)


def test_nothing_is_made_for_a_plan(tmp_path: Path, noted_package: Path) -> None:
    code_digests("pack.a", noted_package, notes=tmp_path / "outputs" / "cache" / "code.json")
    assert not (tmp_path / "outputs").exists()
