"""The comparison of two runs sees one bit, and nothing of what two equal runs differ in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lab import artifact
from tests.net.facts import NEEDED, Facts, differences, read
from tests.net.runs import RunFailed, check_imports, check_out


@pytest.fixture(scope="module")
def facts(small_run: Path) -> Facts:
    return read(small_run)


def differing(facts: Facts, folder: Path) -> dict[str, list[str]]:
    """Return what differs in a changed copy, of the kinds of which something does."""
    return {kind: lines for kind, lines in differences(facts, read(folder)).items() if lines}


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_row(path: Path, **values: float) -> None:
    """Set values in the second row of a file of metrics."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert values.keys() <= rows[1].keys()
    rows[1] |= values
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_copy_is_equal_wherever_it_lies(facts: Facts, run_copy: Path) -> None:
    assert all(facts[kind] for kind in NEEDED)
    assert set(facts["stage keys"]) == {"sft", "reward", "ppo", "eval"}
    assert not differing(facts, run_copy)


def test_one_bit_of_one_weight_is_seen(facts: Facts, run_copy: Path) -> None:
    path = artifact(run_copy, "ppo").path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(torch.int32).view(-1)[5] ^= 1
    save_file(tensors, path)
    found = differing(facts, run_copy)
    assert list(found) == ["tensors"]
    (line,) = found["tensors"]
    assert line.startswith(f"ppo/model/model.safetensors {name}: F32")


def test_the_last_digit_of_a_metric_is_seen_and_a_time_is_not(facts: Facts, run_copy: Path) -> None:
    path = artifact(run_copy, "sft").path / "metrics.jsonl"
    name = "loss/total"
    before = json.loads(path.read_text().splitlines()[1])[name]
    edit_row(path, **{"throughput/tokens_per_s": 1.0, "memory/peak_bytes": 1.0})
    assert not differing(facts, run_copy)
    edit_row(path, **{name: before * (1 + 2**-52)})
    found = differing(facts, run_copy)
    assert list(found) == ["metrics"]
    assert found["metrics"][0].startswith(f"sft/metrics.jsonl row 1.{name}: {before} ->")


def test_a_missing_row_is_seen(facts: Facts, run_copy: Path) -> None:
    path = artifact(run_copy, "reward").path / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-1]))
    assert list(differing(facts, run_copy)) == ["metrics"]


def test_the_manifest_counts_but_for_the_moment_and_the_code(facts: Facts, run_copy: Path) -> None:
    manifest = artifact(run_copy, "eval").path / "manifest.json"
    other = {"created": "later", "duration_s": 1.0, "code": {}, "git": {}, "wandb_run_id": "x"}
    edit_json(manifest, lambda content: content.update(other))
    assert not differing(facts, run_copy)
    edit_json(manifest, lambda content: content["parents"].update(sft="other"))
    assert list(differing(facts, run_copy)) == ["parents"]


def test_an_evaluations_result_and_its_files_count(facts: Facts, run_copy: Path) -> None:
    folder = artifact(run_copy, "eval").path
    edit_json(folder / "result.json", lambda content: content["outcome"].update(wins=1000))
    assert list(differing(facts, run_copy)) == ["results"]
    (folder / "samples.jsonl").unlink()
    assert list(differing(facts, run_copy)) == ["results", "files"]


def test_a_config_key_may_come_and_none_may_go(facts: Facts, run_copy: Path) -> None:
    manifest = artifact(run_copy, "sft").path / "manifest.json"
    edit_json(manifest, lambda content: content["config"]["sft"].update(new_option=1))
    assert not differing(facts, run_copy)
    edit_json(manifest, lambda content: content["config"]["sft"].pop("lr"))
    assert [line[:11] for line in differing(facts, run_copy)["config"]] == ["sft sft.lr:"]


def test_code_from_elsewhere_is_refused(tmp_path: Path) -> None:
    inside = f"7\trlhf_exp\t{tmp_path}/rlhf_exp/__init__.py\n"
    check_imports(inside, tmp_path, 1)
    with pytest.raises(RunFailed, match="1 processes imported rlhf_exp, expected 2"):
        check_imports(inside, tmp_path, 2)
    outside = "8\trlhf_exp\t/elsewhere/rlhf_exp/__init__.py\n"
    with pytest.raises(RunFailed, match="imported /elsewhere/rlhf_exp/"):
        check_imports(inside + outside, tmp_path, 2)


def test_the_working_tree_is_copied_as_it_is(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git repository")
    check_out(None, tmp_path / "tree")
    for name in ("launch.py", "conf/config.yaml", "tests/test_net.py"):
        assert (tmp_path / "tree" / name).read_bytes() == (root / name).read_bytes()
    assert not (tmp_path / "tree" / ".venv").exists()
