"""`rlhf-exp data`: what it says of a file, by hand; every byte is a token here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_exp.cli import main

BYTES = "model.architecture.vocabulary=258"
ALL_TRAIN = ["data.validation_fraction=0", "data.test_fraction=0", BYTES]


def described(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(described(capsys, *arguments, "--json"))
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", *arguments]) == 2
    return capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.csv"
    path.write_text("question,good,bad,source\nHi,Yes,No,a\nHo,same,same,b\nHm,Yes,No \x1b[2J,c\n")
    return str(path)


COLUMNS = "data.columns={prompt: question, chosen: good, rejected: bad}"


def test_a_files_rows_are_shown_as_the_model_reads_them(
    pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = described(capsys, pairs, COLUMNS, *ALL_TRAIN)
    lines = text.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert "\x1b" not in text
    for line in (
        "  is         CSV, 3 records",
        "  layout     pairs (3)",
        "  kept       source",
        "preferences                2           0           0",
        "unusable: 1 (33.3%); a run would stop (data.max_bad_fraction=0.05)",
        "  chosen: 5 tokens, trained",
        "  | Human: Hi",
        "  >  Yes<|endoftext|>",
        "rows as the model reads them; > marks what is trained on:",
    ):
        assert line in lines
    # A long path is broken into lines.
    assert f"{pairs}:3:theresponsesareidentical" in "".join(text.split())


def test_lengths_and_what_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "talks.jsonl"
    talks = [("Hi", "Yes"), ("Hi, and how do you do?", "Well.")]
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "system", "content": "Be kind."},
                        {"role": "user", "content": asked},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
            + "\n"
            for asked, answer in talks
        )
    )
    found = as_json(capsys, str(path), *ALL_TRAIN, "sft.seq_length=50", "sft.loss_on=response")
    prompts = [f"\n\nHuman: Be kind.\n\n{asked}\n\nAssistant:" for asked, _ in talks]
    # A space before the answer, and the end of the sequence.
    lengths = [len(p) + 1 + len(a) + 1 for p, (_, a) in zip(prompts, talks, strict=True)]
    assert lengths == [38, 60]
    (whole,) = [row for row in found["lengths"] if row["what"] == "demonstrations"]
    assert (whole["limit"], whole["cut"]) == (50, 0.5)
    assert whole["percentiles"] == {"50": 60, "90": 60, "99": 60, "100": 60}
    assert found["role"] == "demonstrations"
    assert found["splits"]["prompts"] == {"train": 2, "validation": 0, "test": 0}
    first, second = found["rows"]
    assert [part["trained"] for part in first["parts"]] == [False, True]
    assert "".join(part["text"] for part in first["parts"]) == f"{prompts[0]} Yes<|endoftext|>"
    # As in training: the prompt loses its beginning.
    assert second["parts"][0]["text"] == prompts[1][10:]
    assert [(part["tokens"], part["tokens_uncut"]) for part in second["parts"]] == [
        (43, 53),
        (7, 7),
    ]
    whole_rows = as_json(capsys, str(path), *ALL_TRAIN, "sft.loss_on=all")["rows"]
    assert [part["trained"] for part in whole_rows[0]["parts"]] == [True, True]


def test_a_role_of_its_own_and_the_configs_data(
    pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, pairs, COLUMNS, *ALL_TRAIN, "--as", "prompts", "--rows", "1")
    assert found["splits"]["preferences"] == {"train": 0, "validation": 0, "test": 0}
    assert [part["part"] for part in found["rows"][0]["parts"]] == ["prompt"]
    sizes = "data.toy={demonstrations: 9, preferences: 9, prompts: 9, validation: 2, test: 2}"
    found = as_json(capsys, "data=toy", sizes)
    assert found["splits"]["preferences"] == {"train": 9, "validation": 2, "test": 2}


def test_a_data_set_with_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": f"question {n}", "completion": "yes"} for n in range(9)]
    )
    datasets.DatasetDict(train=rows, test=rows.select([0, 1])).save_to_disk(tmp_path / "set")
    found = as_json(capsys, str(tmp_path / "set"), "data.validation_fraction=0", BYTES)
    assert found["splits"]["demonstrations"] == {"train": 7, "validation": 0, "test": 2}
    assert [file["read"] for file in found["files"]] == [9, 2]
    one = as_json(capsys, str(tmp_path / "set" / "train"), *ALL_TRAIN)
    assert (one["role"], one["files"][0]["kind"]) == ("demonstrations", "a saved data set")


def test_what_cannot_be_described(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such file or folder" in refusal(capsys, str(tmp_path / "nothing.jsonl"))
    assert "known layouts" in refusal(capsys, pairs)
    assert "did you mean question?" in refusal(capsys, pairs, "data.columns.prompt=quesion")
    assert "no such key. Did you mean data.columns.chosen" in refusal(
        capsys, pairs, "data.columns={chsen: good}"
    )
    assert "several values" in refusal(capsys, pairs, "data.limit=1,2")
