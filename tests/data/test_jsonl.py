"""JSON lines as people bring them: what one bad line, or one bad file, does to the others."""

from __future__ import annotations

import bz2
import gzip
import zipfile
from pathlib import Path

import pytest

from rlhf_exp.data import jsonl
from rlhf_exp.data.jsonl import UnreadableLine, parse_json, read_jsonl, unpaired_surrogate
from rlhf_exp.errors import UserError

GOOD = b'{"a": "b"}\n'


def read(path: Path, content: bytes) -> list[tuple[str, object]]:
    path.write_bytes(content)
    return [(origin.rpartition(":")[2], record) for origin, record in read_jsonl(path, "data.test")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":', "not JSON: Expecting value at column 6"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7 of the line"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has too many digits to be read"),
        (b"[" * 100_000, "brackets are nested more than 100 deep"),
        (b"[" * 101 + b"]" * 101, "brackets are nested more than 100 deep"),
        (b'{"a":' * 60 + b"[" * 41 + b"]" * 41 + b"}" * 60, "brackets are nested more than 100"),
        (b'{"a": "x", "a": "y"}', "the field 'a' stands there with two values"),
        (b"\0\0\0\0", "not JSON: Expecting value at column 1"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    (_, first), (number, record), (_, last) = read(tmp_path / "a", GOOD + line + b"\n" + GOOD)
    assert first == last == {"a": "b"}
    assert number == "2"
    assert isinstance(record, UnreadableLine)
    assert record.reason.startswith(reason)


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (b"[" * 100 + b"]" * 100, None),
        (b'{"a": "[[[' + b"[" * 200 + b'"}', {"a": "[" * 203}),
        (b'{"a": "x", "a": "x"}', {"a": "x"}),
        (b'{"a": Infinity}', {"a": float("inf")}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        # A character beyond the 65,536 first, whose halves were encoded one by one.
        (b'{"a": "\xed\xa0\xbd\xed\xb8\x80"}', {"a": "\U0001f600"}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    ],
)
def test_odd_lines_that_say_one_thing_are_read(tmp_path: Path, line: bytes, record: object) -> None:
    ((_, found),) = read(tmp_path / "a", line + b"\r\n\n")
    assert not isinstance(found, UnreadableLine)
    assert record in (None, found)


def test_a_line_too_long_to_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
    long = b'{"a": "' + b"x" * (3 << 20) + b'"}\n'
    (_, first), (second, last) = read(tmp_path / "a", long + GOOD)
    assert first == UnreadableLine("the line is longer than 1 MiB")
    assert (second, last) == ("2", {"a": "b"})
    ((_, only),) = read(tmp_path / "b.gz", gzip.compress(b" " * (3 << 20)))
    assert only == first


def test_gzip_is_told_by_its_content(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", gzip.compress(GOOD)) == [("1", {"a": "b"})]
    assert read(tmp_path / "a.jsonl.gz", GOOD) == [("1", {"a": "b"})]
    # Two files, one after the other, are what gzip makes of them.
    assert len(read(tmp_path / "a.jsonl.gz", gzip.compress(GOOD) * 2)) == 2


def test_a_damaged_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(5000)))
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    for content in (whole[:-30], whole[:7], bytes(middle), whole + b"junk"):
        with pytest.raises(UserError, match=r"data\.test: .* cannot be read after line \d+: "):
            read(tmp_path / "a.jsonl.gz", content)


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a.jsonl", GOOD)
    for content, kind in (
        ((tmp_path / "z").read_bytes(), "a zip archive"),
        (bz2.compress(GOOD), "compressed with bzip2"),
        (GOOD.decode().encode("utf-16"), "UTF-16 text"),
    ):
        with pytest.raises(UserError, match=rf"data\.test: .* is {kind}.*give JSON lines in UTF-8"):
            read(tmp_path / "a", content)


def test_a_number_is_not_what_a_text_of_digits_is() -> None:
    assert parse_json(f'"{"9" * 5000}"') == "9" * 5000


def test_half_a_character_is_found() -> None:
    assert unpaired_surrogate("a \U0001f600 é") is None
    assert unpaired_surrogate("a \ude00") == "\\ude00"
