from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_exp.report.run.data import CalibrationBar
from rlhf_exp.report.run.gather import gather, loading_code
from rlhf_exp.store.artifact import Artifact, Manifest

CONFIG: dict[str, Any] = {
    "model": {"name": "tiny"},
    "data": {"source": "jsonl", "preferences": "a.jsonl", "test": None},
    "sft": {"seed": 1},
    "reward": {"seed": 2},
    "ppo": {"seed": 3, "kl": {"target": 6.0}},
    "eval": {"seed": 4},
}


def artifact(
    folder: Path, stage: str, files: dict[str, Any] | None = None, **fields: Any
) -> Artifact:
    path = folder / "store" / stage / f"{stage}key"
    path.mkdir(parents=True)
    for name, content in (files or {}).items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return Artifact(path, Manifest(stage, f"{stage}key", config=CONFIG, **fields))


def whole(folder: Path) -> dict[str, Artifact]:
    return {
        "sft": artifact(
            folder,
            "sft",
            {
                "facts.json": {"rows": 4000, "trainable": 12, "rejected": 3},
                "metrics.jsonl": '{"global_step": 1, "loss/total": 2.5}\n{"global_st',
            },
            metrics={"eval/perplexity": 3.456},
            duration_s=61.0,
            git={"revision": "0123456789abcdef", "dirty": True, "diff": "x"},
        ),
        "reward": artifact(
            folder,
            "reward",
            {
                "facts.json": {"pairs": 50},
                "metrics.jsonl": "",
                "calibration.json": {
                    "bins": [{"predicted": 0.6, "observed": 0.5, "count": 4}],
                    "error": 0.1,
                },
            },
            metrics={"test/accuracy": 0.75, "test/accuracy_low": 0.7, "test/accuracy_high": 0.8},
        ),
        "ppo": artifact(
            folder,
            "ppo",
            {
                "facts.json": {"prompts": 7, "cut_prompts": 2},
                "metrics.jsonl": '{"global_step": 240}\n{"global_step": 480}\n',
            },
            metrics={"eval/reward_mean": 1.2345, "published_step": 240.0},
            wandb_run_id="abc",
        ),
        "eval": artifact(
            folder,
            "eval",
            {"facts.json": {"prompts": 5}, "result.json": {"rows": []}},
            metrics={"eval/outcome/win_rate": 0.667},
            git={"revision": "fedcba9876543210", "dirty": False},
            versions={"torch": "2.13"},
        ),
    }


def test_everything_of_a_whole_run(tmp_path: Path) -> None:
    found = gather("mine", whole(tmp_path), trained=["ppo", "eval"])
    assert found.title == "mine"
    identity = dict(found.identity)
    assert identity["Key"] == "eval/evalkey"
    assert identity["Revision"] == "fedcba987654"
    assert identity["Seeds"] == "sft 1, reward 2, ppo 3, eval 4"
    assert identity["Versions"] == "torch 2.13"
    assert list(found.overview)[:2] == [("Model", "tiny"), ("Published by PPO", "step 240 of 480")]
    assert found.published_steps == {"ppo": 240}
    assert found.data_facts == [
        ("Source", "jsonl"),
        ("Preferences", "a.jsonl"),
        ("Demonstrations", "4,000"),
        ("Preference pairs", "50"),
        ("Training prompts", "7"),
        ("Test prompts", "5"),
        ("Prompts cut to fit", "2"),
        ("Unusable rows", "3"),
    ]
    rows = {row.stage: row for row in found.stages}
    assert {stage: row.cached for stage, row in rows.items()} == {
        "sft": True,
        "reward": True,
        "ppo": False,
        "eval": False,
    }
    assert (rows["sft"].seconds, rows["sft"].parameters) == (61.0, 12)
    assert [row.result for row in found.stages] == [
        "validation perplexity 3.46",
        "test accuracy 0.750 (95 % interval 0.700 to 0.800)",
        "validation reward 1.234",
        "67% of decided pairs won",
    ]
    assert found.metrics["sft"] == [{"global_step": 1, "loss/total": 2.5}]
    assert set(found.metrics) == {"sft", "reward", "ppo"}
    assert found.evaluation == {"rows": []}
    assert found.calibration == [CalibrationBar(0.6, 0.5, 4)]
    assert found.kl_target == 6.0
    assert found.usage[0][1] == loading_code(tmp_path / "store" / "ppo" / "ppokey" / "model")
    assert found.usage[1][1] == "rlhf-exp chat ppokey --against sft"
    assert [text.split(" ")[0] for text in found.warnings] == ["sft:", "3"]


def test_a_policy_that_is_still_sfts_is_a_warning(tmp_path: Path) -> None:
    artifacts = whole(tmp_path)
    metrics = artifacts["ppo"].manifest.metrics | {"published_step": 0.0}
    ppo = artifacts["ppo"]
    manifest = replace(ppo.manifest, metrics=metrics)
    found = gather("mine", artifacts | {"ppo": replace(ppo, manifest=manifest)})
    assert found.warnings[-1].startswith("No PPO step improved on SFT")


def test_one_stage_alone(tmp_path: Path) -> None:
    found = gather("only", {"sft": whole(tmp_path)["sft"]})
    assert [row.stage for row in found.stages] == ["sft"]
    assert (found.evaluation, list(found.calibration), list(found.usage)) == (None, [], [])
    assert dict(found.identity)["Revision"] == "0123456789ab with uncommitted changes"


def test_the_three_lines(tmp_path: Path) -> None:
    lines = loading_code(tmp_path).splitlines()
    assert len(lines) == 3
    compile("\n".join(lines), "lines", "exec")
