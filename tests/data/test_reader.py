"""`data.reader`: a user's function in place of the readers of files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_exp.commands.data import describe_data
from rlhf_exp.config.checks import config_problems
from rlhf_exp.data.sources import load_jsonl
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.stages.data_module import DataModule
from tests.lab import small_config

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("source=jsonl", f"preferences={EXAMPLES / 'pairs.txt'}")


def given(folder: Path, reader: str, *overrides: str) -> list[str]:
    return [*(f"data.{text}" for text in FILES), f"data.reader={reader}", *overrides]


def test_the_example_reads_the_pairs_of_the_other_example(tmp_path: Path) -> None:
    """The two files hold the same pairs in two formats."""
    config = small_config(tmp_path, *given(tmp_path, f"{EXAMPLES / 'my_reader.py'}:read"))
    corpus = DataModule(config.data, None, None, report=False).corpus
    expected = load_jsonl(preferences=EXAMPLES / "preferences.jsonl")
    pairs = [(row.history, row.chosen, row.rejected) for row in corpus.preferences.train]
    assert len(pairs) > 30
    assert pairs == [(row.history, row.chosen, row.rejected) for row in expected.preferences.train]
    (file,) = corpus.files
    assert (file.read, file.kind) == (48, "read by data.reader")
    origin = expected.preferences.train[0].origin.replace("preferences.jsonl", "pairs.txt")
    assert corpus.preferences.train[0].origin == origin  # the number of the row


def test_it_is_shown_as_a_run_reads_it() -> None:
    overrides = [f"data.reader={EXAMPLES / 'my_reader.py'}:read"]
    shown = describe_data(str(EXAMPLES / "pairs.txt"), None, overrides, None, rows=1)
    assert (shown["role"], shown["files"][0]["read"]) == ("preferences", 48)


def test_its_content_is_in_the_keys_and_its_path_is_not(tmp_path: Path) -> None:
    here, there = tmp_path / "here.py", tmp_path / "there.py"
    shutil.copy(EXAMPLES / "my_reader.py", here)
    shutil.copy(here, there)

    def keys(reader: Path) -> list[str]:
        return [
            step.key for step in plan(small_config(tmp_path, *given(tmp_path, f"{reader}:read")))
        ]

    before = keys(here)
    assert keys(there) == before
    there.write_text(there.read_text() + "# another\n")
    assert not set(keys(there)) & set(before)


def test_a_failing_reader_names_itself_and_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def read(path):\n    return [1 / 0]\n")
    config = small_config(tmp_path, *given(tmp_path, f"{broken}:read"))
    with pytest.raises(UserError, match=r"data\.reader=.*broken\.py:read failed on .*pairs\.txt"):
        _ = DataModule(config.data, None, None, report=False).corpus


def test_what_is_no_row_is_told_with_its_number(tmp_path: Path) -> None:
    odd = tmp_path / "odd.py"
    odd.write_text("def read(path):\n    yield 'a text'\n")
    config = small_config(tmp_path, *given(tmp_path, f"{odd}:read"))
    with pytest.raises(UserError, match=r"pairs\.txt:1"):
        _ = DataModule(config.data, None, None, report=False).corpus


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.reader=nowhere.py:read", *(f"data.{text}" for text in FILES)], "there is no file"),
        (["data.reader=read", *(f"data.{text}" for text in FILES)], "expected a function"),
        (["data.reader=examples/my_reader.py:read"], "has no files that it could read"),
    ],
)
def test_checked_with_the_config(tmp_path: Path, overrides: list[str], message: str) -> None:
    problems = config_problems(small_config(tmp_path, *overrides))
    assert any(message in str(problem) for problem in problems)
