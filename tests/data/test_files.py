"""Kinds of files: the same records from each, and what is no file of its kind."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_exp.data.files import kind_of, read_records
from rlhf_exp.data.jsonl import UnreadableLine
from rlhf_exp.data.sources import LoadOptions, load_hub, load_jsonl
from rlhf_exp.errors import UserError

RECORDS = [
    {"prompt": 'Say "hi",\nplease', "chosen": "Hi é🍅", "rejected": "NA"},
    {"prompt": "Count", "chosen": "1", "rejected": ""},
    {"prompt": "Count on", "chosen": "007", "rejected": "null"},
]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8-sig")


def write_lines(path: Path) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS), encoding="utf-8")


def write_table(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).to_parquet(path)


def write_saved(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(path)


def write_zipped(path: Path) -> None:
    plain = path.with_suffix("")
    {".json": write_json, ".jsonl": write_lines, ".csv": write_table}[plain.suffix](plain)
    path.write_bytes(gzip.compress(plain.read_bytes()))


# (name, writer, the places of the records by hand)
FILES = [
    ("a.jsonl", write_lines, [1, 2, 3]),
    ("a.jsonl.gz", write_zipped, [1, 2, 3]),
    ("a.json", write_json, [2, 7, 12]),
    ("a.json.gz", write_zipped, [2, 7, 12]),
    ("a.csv", write_table, [2, 4, 5]),
    ("a.csv.gz", write_zipped, [2, 4, 5]),
    ("a.tsv", write_table, [2, 4, 5]),
    ("a.parquet", write_parquet, [1, 2, 3]),
    ("saved", write_saved, [1, 2, 3]),
]


@pytest.mark.parametrize(("name", "write", "places"), FILES, ids=[case[0] for case in FILES])
def test_the_same_records_come_from_every_kind_of_file(
    name: str, write: Any, places: list[int], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    expected = [(f"{path}:{place}", record) for place, record in zip(places, RECORDS, strict=True)]
    assert list(read_records(path, "data.preferences")) == expected
    options = LoadOptions(validation_fraction=0, test_fraction=0)
    corpus = load_jsonl(preferences=path, options=options)
    assert [row.chosen for row in corpus.preferences.train] == ["Hi é🍅", "1", "007"]
    assert [row.rejected for row in corpus.preferences.train] == ["NA", "", "null"]
    assert corpus.files[0].kind == kind_of(path)


def test_messages_are_the_same_from_json_parquet_csv_and_a_saved_set(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}
        for text in ("Yes", "No")
    ]
    (tmp_path / "a.json").write_text(json.dumps(talks))
    datasets.Dataset.from_list(talks).to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(talks)).save_to_disk(tmp_path / "hub")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], *([json.dumps(talk["messages"])] for talk in talks)])
    options = LoadOptions(validation_fraction=0, test_fraction=0)
    corpora = [
        *(
            load_jsonl(demonstrations=tmp_path / name, options=options)
            for name in ("a.json", "a.parquet", "a.csv")
        ),
        load_jsonl(demonstrations=tmp_path / "hub" / "train", options=options),
        load_hub(str(tmp_path / "hub"), options=options),
    ]
    assert [row.response for row in corpora[0].demonstrations.train] == ["Yes", "No"]
    assert len({corpus.digest for corpus in corpora}) == 1


def read(path: Path, content: bytes) -> list[tuple[str, object]]:
    path.write_bytes(content)
    return list(read_records(path, "data.test"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"a": 1},\n {"a": 2}', ":2: expected `,` or `]` in the array, found ''"),
        ("a.json", b'[{"a": 1},\n {"a": tru}]', ":2: the array cannot be read on"),
        ("a.json", b'[{"a": 1}] x', "something stands after the array: 'x'"),
        ("a.json", b'[{"a":\n "\xff"}]', ":2: not UTF-8"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', ":2: the row that begins here cannot be read"),
        ("a.csv", b"a,a\n1,2\n", ":1: two columns have the name 'a'"),
        ("a.csv", b"a,\n1,2\n", ":1: the first row does not name every column"),
        ("a.csv", b"", ":1: the first row does not name every column"),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8, after line"),
        ("a.parquet", b"PAR1 and no more", "cannot be read after row 0"),
        ("a.csv", b"PK\x03\x04", "a zip archive (or a spreadsheet)"),
    ],
)
def test_a_broken_file_is_an_error_that_names_file_and_line(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path / name, content)
    assert str(refused.value).startswith(f"data.test: {tmp_path / name}")
    assert reason in str(refused.value)


def test_a_broken_record_is_unreadable_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    records = read(path, b"a,b\n1,2\n1,2,3\n\n5,6\n")
    assert records == [
        (f"{path}:2", {"a": "1", "b": "2"}),
        (f"{path}:3", UnreadableLine("3 cells, the first row names 2 columns")),
        (f"{path}:5", {"a": "5", "b": "6"}),
    ]
    path = tmp_path / "a.json"
    records = read(path, b'[\n{"a": 1, "a": 2},\n{"a": 1}\n]\n')
    assert records == [
        (f"{path}:2", UnreadableLine("the field 'a' stands there with two values")),
        (f"{path}:3", {"a": 1}),
    ]
    assert read(path, b"[ ]") == []


def test_json_lines_may_have_any_name_and_an_array_none_of_theirs(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", b'{"a": 1}\n{"a": 2}\n')[1] == (
        f"{tmp_path}/a.json:2",
        {"a": 2},
    )
    assert read(tmp_path / "a.jsonl", b"[1]\n[2]\n")[1] == (f"{tmp_path}/a.jsonl:2", [2])


def test_a_saved_set_with_splits_asks_for_one(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=saved, extra=saved).save_to_disk(tmp_path / "both")
    with pytest.raises(
        UserError, match=r"has the splits train, extra; name one, such as .*both/tr"
    ):
        list(read_records(tmp_path / "both", "data.test"))


def test_columns_are_the_hubs_too(tmp_path: Path) -> None:
    datasets.Dataset.from_list(
        [{"q": f"question {n}", "j": "yes", "k": "no", "source": "s"} for n in range(40)]
    ).save_to_disk(tmp_path / "set")
    columns = {"prompt": "q", "chosen": "j", "rejected": "k"}
    corpus = load_hub(str(tmp_path / "set"), options=LoadOptions(columns=columns))
    assert sum(len(rows) for _, rows in corpus.preferences.all()) == 40
    assert corpus.prompts.train[0].fields == {"source": "s"}
    with pytest.raises(UserError, match="known layouts"):
        load_hub(str(tmp_path / "set"))
