from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store.code import changed, code_digests

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
            "errors",
            "store/artifact",
            "store/files",
            "store/fingerprint",
            "store/holders",
            "store/lease",
        )
    }
    assert set(digests) == expected
