"""The local record: what is written reads back, and a resume forgets what it must."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.local import (
    MetricsLog,
    note_url,
    noted_url,
    read_metrics,
    read_table,
    table_steps,
)


def written(folder: Path, steps: range, *, resume_step: int | None = None, offset: int = 0) -> None:
    log = MetricsLog(folder, resume_step=resume_step)
    for step in steps:
        log.log({"loss/total": step + offset}, step)
    log.finish()


def test_a_row_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log({"loss/total": 0.5, "response/length_mean": 12}, 3)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"global_step": 3, "loss/total": 0.5, "response/length_mean": 12}\n'
    log.finish()
    log.finish()


def test_non_finite_numbers_read_back_and_every_line_is_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}, 1)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.0)


def test_numbers_of_numpy_and_torch_are_taken(tmp_path: Path) -> None:
    metrics = {"a": np.float32(0.25), "b": torch.tensor(3.0), "c": np.int64(7)}
    MetricsLog(tmp_path).log(metrics, 1)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row == {"global_step": 1, "a": 0.25, "b": 3, "c": 7}


def test_rows_of_one_step_are_merged_and_the_last_value_counts(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log({"loss": 1.0, "lr": 0.1}, 2)
    log.log({"loss": 3.0}, 1)
    log.log({"eval/reward": 5.0, "loss": 2.0}, 2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"global_step": 1, "loss": 3.0},
        {"global_step": 2, "loss": 2.0, "lr": 0.1, "eval/reward": 5.0},
    ]


def test_a_resume_forgets_what_came_after_its_step(tmp_path: Path) -> None:
    written(tmp_path, range(1, 8))
    written(tmp_path, range(5, 7), resume_step=4, offset=100)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # 1..4 stay, 5..7 go, 5 and 6 come anew.
    assert [json.loads(line)["loss/total"] for line in lines] == [1, 2, 3, 4, 105, 106]


def test_without_a_step_to_resume_from_the_record_starts_afresh(tmp_path: Path) -> None:
    written(tmp_path, range(3))
    first = MetricsLog(tmp_path, resume_step=None)
    first.table("eval/samples", ["x"], [[1]], 0)
    first.summary({"reward": 1.0})
    second = MetricsLog(tmp_path, resume_step=None)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert table_steps(tmp_path, "eval/samples") == []
    second.summary({"kl": 2.0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"kl": 2.0}


def test_a_torn_last_line_is_left_out_and_removed_by_a_resume(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        assert [row["global_step"] for row in read_metrics(path)] == [1, 2]
    written(tmp_path, range(3, 4), resume_step=2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"gl!bberish", b"[1]", b'"text"', b'{"loss": 1}', b"3"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    written(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*global_step"):
        read_metrics(path)


def test_a_table_reads_back_text_as_it_was(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    hostile = "line\nline\u2028<script>\x00\ud800 NaN"
    rows = [[hostile, 0.5, True], ["NaN", math.nan, None]]
    log.table("eval/samples", ["response", "score", "best"], rows, 10)
    assert (tmp_path / "tables/eval/samples-10.jsonl").exists()
    assert read_table(tmp_path, "eval/samples") == [
        {"response": hostile, "score": 0.5, "best": True},
        {"response": "NaN", "score": None, "best": None},
    ]


def test_tables_are_found_by_step_and_forgotten_by_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (0, 5, 10, 100):
        log.table("samples", ["step"], [[step]], step)
    assert table_steps(tmp_path, "samples") == [0, 5, 10, 100]
    assert read_table(tmp_path, "samples") == [{"step": 100}]
    assert read_table(tmp_path, "samples", 5) == [{"step": 5}]
    MetricsLog(tmp_path, resume_step=10)
    assert table_steps(tmp_path, "samples") == [0, 5, 10]
    with pytest.raises(FileNotFoundError, match="other"):
        read_table(tmp_path, "other")


@pytest.mark.parametrize("name", ["../up", "a b", "", "/root", "a-1"])
def test_a_table_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="table name"):
        MetricsLog(tmp_path).table(name, ["x"], [[1]], 1)


def test_a_row_of_the_wrong_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        MetricsLog(tmp_path).table("samples", ["a", "b"], [[1]], 1)


def test_the_summary_is_merged_and_survives_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.summary({"reward": 1.0, "reason": "done"})
    log.summary({"reward": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"reward": None, "reason": "done"}
    MetricsLog(tmp_path, resume_step=1).summary({"kl": 2})
    expected = {"reward": None, "reason": "done", "kl": 2}
    assert json.loads((tmp_path / "summary.json").read_text()) == expected


@pytest.mark.parametrize(
    ("noted", "url"),
    [
        ("https://wandb.ai/me/rlhf/runs/ab12\n", "https://wandb.ai/me/rlhf/runs/ab12"),
        ("javascript:alert(1)", None),
        ('https://a/b" onclick=', None),
        ("", None),
    ],
)
def test_only_an_address_is_an_address(tmp_path: Path, noted: str, url: str | None) -> None:
    assert noted_url(tmp_path) is None
    (tmp_path / "wandb_url").write_text(noted)
    assert noted_url(tmp_path) == url
    note_url(tmp_path, "http://127.0.0.1:1/e/p/runs/x")
    assert noted_url(tmp_path) == "http://127.0.0.1:1/e/p/runs/x"
