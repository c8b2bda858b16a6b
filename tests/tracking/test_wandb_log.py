"""The reader of transaction logs, on files made by hand and beside W&B's own reader."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.wandb_log import is_complete, read_wandb_file, wandb_files

HEADER = b":W&B\xe1\xbe\x00"  # 0xBEE1, little-endian, and version 0
BLOCK = 32768


def chunk(data: bytes, kind: int) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data


def history(step: int, text: str = "") -> bytes:
    record = Record()
    for key, value in (("global_step", step), ("text", text)):
        item = record.history.item.add()
        item.key, item.value_json = key, json.dumps(value)
    return record.SerializeToString()


def write(path: Path, *chunks: bytes) -> Path:
    path.write_bytes(HEADER + b"".join(chunks))
    return path


def test_a_record_in_three_parts_across_two_blocks(tmp_path: Path) -> None:
    data = history(7, "x" * 70_000)
    first = BLOCK - 7 - 7  # the block less the file's header and the chunk's
    second = first + BLOCK - 7
    path = write(
        tmp_path / "run-a.wandb",
        chunk(data[:first], 2),
        chunk(data[first:second], 3),
        chunk(data[second:], 4),
        chunk(history(8), 1),
    )
    rows = read_wandb_file(path).history
    assert [(row["global_step"], len(row["text"])) for row in rows] == [(7, 70_000), (8, 0)]


def test_a_block_filled_up_with_zeros(tmp_path: Path) -> None:
    short = len(history(1, "")) + 7
    # The first record leaves 5 bytes of the block: too few for a header of 7.
    text = "x" * (BLOCK - 7 - short - 5 - 4)
    data = history(1, text)
    filler = BLOCK - 7 - len(chunk(data, 1))
    assert 0 < filler < 7
    path = write(tmp_path / "run-a.wandb", chunk(data, 1), b"\0" * filler, chunk(history(2), 1))
    assert [row["global_step"] for row in read_wandb_file(path).history] == [1, 2]


def test_a_torn_tail_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = HEADER + chunk(history(1), 1) + chunk(history(2), 1)
    path = tmp_path / "run-a.wandb"
    for cut in range(1, len(chunk(history(2), 1)) + 1):
        path.write_bytes(whole[:-cut])
        assert [row["global_step"] for row in read_wandb_file(path).history] == [1]
    path.write_bytes(whole + b"\0" * 100)
    assert [row["global_step"] for row in read_wandb_file(path).history] == [1, 2]


def test_a_log_is_complete_once_its_exit_record_is_whole(tmp_path: Path) -> None:
    record = Record()
    record.exit.exit_code = 0
    whole = HEADER + chunk(history(1), 1) + chunk(record.SerializeToString(), 1)
    path = tmp_path / "run-a.wandb"
    assert not is_complete(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not is_complete(path)
    path.write_bytes(whole)
    assert is_complete(path)


def test_damage_before_the_end_is_named(tmp_path: Path) -> None:
    damaged = bytearray(chunk(history(1), 1))
    damaged[-1] ^= 1
    path = write(tmp_path / "run-a.wandb", bytes(damaged), chunk(history(2), 1))
    with pytest.raises(UserError, match=r"run-a\.wandb: damaged at byte 7"):
        read_wandb_file(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match="not a W&B transaction log"):
        read_wandb_file(path)


def test_config_and_summary_keys_are_set_nested_and_removed(tmp_path: Path) -> None:
    record = Record()
    for keys, value in ((["ppo", "lr"], 0.5), (["ppo", "beta"], 1), (["seed"], 3)):
        item = record.config.update.add()
        item.value_json = json.dumps(value)
        item.nested_key.extend(keys)
    record.config.remove.add().nested_key.extend(["ppo", "beta"])
    path = write(tmp_path / "run-a.wandb", chunk(record.SerializeToString(), 1))
    assert read_wandb_file(path).config == {"ppo": {"lr": 0.5}, "seed": 3}


def test_it_agrees_with_wandbs_own_reader(tmp_path: Path) -> None:
    tracker = open_tracker("offline", tmp_path, config={"ppo": {"lr": 0.25}}, name="peer")
    for step in range(1, 4):
        tracker.log({"reward/mean": step / 4}, step)
    tracker.summary({"final": 1.5})
    tracker.finish(3)
    (path,) = wandb_files(tmp_path)
    ours = read_wandb_file(path)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    by_type = {record["type"]: record[record["type"]] for record in theirs}
    history = [record["history"]["item"] for record in theirs if record["type"] == "history"]
    assert ours.history == history
    assert ours.exit_code == by_type["exit"]["exit_code"] == 3
    assert (ours.run_id, ours.name) == (by_type["run"]["run_id"], by_type["run"]["display_name"])
    assert ours.config == by_type["run"]["config"]["update"]
    summary: dict[str, object] = {}
    for record in theirs:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    ours.summary |= {f"_wandb.{key}": value for key, value in ours.summary.pop("_wandb").items()}
    assert ours.summary == summary
