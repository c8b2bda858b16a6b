import hashlib
import os
import time
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path

import pytest

from rlhf_exp.store import fingerprint
from rlhf_exp.store.fingerprint import DigestCache, folder_digest, key_of
from rlhf_exp.store.sealed import file_digest


class Colour(StrEnum):
    red = "value that may change"


class Number(Enum):
    one = 1


@dataclass(frozen=True)
class Section:
    lr: float
    steps: int


def test_key_is_the_sha256_of_sorted_json_without_blanks() -> None:
    text = '{"a":[1,2.5,null],"b":{"x":true}}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert key_of({"b": {"x": True}, "a": (1, 2.5, None)}) == expected


def test_enums_count_by_name_and_dataclasses_as_mappings() -> None:
    assert key_of({"colour": Colour.red}) == key_of({"colour": "red"})
    assert key_of({"n": Number.one}) == key_of({"n": "one"})
    assert key_of({"s": Section(1e-5, 3)}) == key_of({"s": {"steps": 3, "lr": 0.00001}})


def test_values_that_differ_have_different_keys() -> None:
    values = [1, 1.0, True, "1", None, [1], {"1": 1}, 0.1, 0.1 + 1e-17 * 8, 1e-5, "a\0b", "a b"]
    assert len({key_of({"x": value}) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Path("/data/x"), "path.deep[1]: PosixPath"),
        ({1, 2}, "path.deep[1]: set"),
        (b"x", "path.deep[1]: bytes"),
        ({1: 2}, "name 1 in a mapping"),
    ],
)
def test_what_has_no_canonical_form_is_refused_by_place(value: object, said: str) -> None:
    with pytest.raises(TypeError) as error:
        key_of({"path": {"deep": [0, value]}})
    assert said in str(error.value)
    assert "path.deep[1]" in str(error.value)


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, example of SHA-256 for "abc".
    assert file_digest(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_folder_digest_sees_names_and_contents_only(tmp_path: Path) -> None:
    def fill(name: str, files: dict[str, str]) -> Path:
        for place, text in files.items():
            path = tmp_path / name / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / name

    base = {"config.json": "{}", "sub/model.bin": "1234", ".cache/x": "junk"}
    one = fill("one", base)
    same = fill("same", dict(reversed(base.items())) | {".cache/x": "other junk"})
    renamed = fill("renamed", {"config.json": "{}", "sub/other.bin": "1234"})
    edited = fill("edited", {"config.json": "{}", "sub/model.bin": "1235"})
    # The same characters, distributed differently over name and content.
    shifted = fill("shifted", {"config.json": "{}", "sub/model.bi": "n1234"})
    digests = [folder_digest(folder) for folder in (one, same, renamed, edited, shifted)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert folder_digest(one, ["*.json"]) == folder_digest(edited, ["*.json"])


def test_folder_digest_follows_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model").symlink_to(tmp_path / "blob")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model").write_text("weights")
    assert folder_digest(tmp_path / "snapshot") == folder_digest(tmp_path / "plain")


def aged(path: Path, seconds: float) -> None:
    stamp = time.time() - seconds
    os.utime(path, (stamp, stamp))


def test_cache_reads_a_file_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = fingerprint.file_digest
    monkeypatch.setattr(
        fingerprint, "file_digest", lambda path: (read.append(path.name), real(path))[1]
    )
    model = tmp_path / "model"
    model.write_text("one")
    aged(model, 100)
    cache = tmp_path / "deep" / "digests.json"
    first = DigestCache(cache).file(model)
    assert DigestCache(cache).file(model) == first
    assert DigestCache(cache).folder(tmp_path, ["model"]) == folder_digest(tmp_path, ["model"])
    assert read == ["model", "model"]  # once by the cache, once by the uncached folder_digest
    model.write_text("two")  # of the same size
    aged(model, 50)
    assert DigestCache(cache).file(model) == hashlib.sha256(b"two").hexdigest()


def test_cache_does_not_trust_a_file_that_has_just_been_written(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_text("one")
    status = model.stat()
    cache = DigestCache(tmp_path / "digests.json")
    cache.file(model)
    model.write_text("two")
    # The clock's grain: a second write with the same size and the same time.
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.file(model) == hashlib.sha256(b"two").hexdigest()


def test_a_torn_cache_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text('{"x": [1,')
    (tmp_path / "model").write_text("one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert DigestCache(tmp_path / "digests.json").file(tmp_path / "model") == expected
