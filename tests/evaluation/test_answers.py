"""Answers in files: what was written is read; a line that is no answer is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, read_answers, write_answers

ANSWER = Answer(
    "preference", "ppo", 0, 1, 7, "p\u2028\u0085", "t 🙂", 3, "eos", 0.5, facts={"a": 1}
)


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_answers(tmp_path / "samples.jsonl", [ANSWER, ANSWER])
    assert read_answers(tmp_path / "samples.jsonl") == [ANSWER, ANSWER]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": 3}, "`prompt` is 3, text was expected"),
        ({"text": "half \ud83d"}, "`text` is 'half .*, text was expected"),
        ({"tokens": True}, "`tokens` is True, an integer was expected"),
        ({"row": 0.5}, "`row` is 0.5, an integer was expected"),
        ({"score": "high"}, "`score` is 'high', a number was expected"),
        ({"facts": [1]}, "`facts`, `sampling` and `terms` are to be JSON objects"),
    ],
)
def test_an_answer_with_a_field_of_another_type(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps(asdict(ANSWER)), json.dumps(asdict(ANSWER) | change)]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"samples\.jsonl:2: not an answer \({reason}"):
        read_answers(path)


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "null", "[" * 100_000, '{"row": ' + "9" * 5000 + "}"]
)
def test_a_line_that_is_no_answer(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=r"samples\.jsonl:1: not an answer"):
        read_answers(path)
