from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages import ppo_inputs
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.store.store import Store
from tests.lab import artifact, jsonl, pairs, put_other_weights, run, small_config, weights


def test_what_the_artifact_holds(small_run: Path) -> None:
    found = artifact(small_run, "ppo")
    found.verify()
    model = AutoModelForCausalLM.from_pretrained(found.path / "model")
    start = AutoModelForCausalLM.from_pretrained(artifact(small_run, "sft").path / "model")
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    ]
    assert any(moved) or found.manifest.metrics["published_step"] == 0
    keys = {stage: artifact(small_run, stage).key for stage in ("sft", "reward")}
    assert found.manifest.parents == keys
    assert found.manifest.inputs.keys() == keys.keys()
    metrics = found.manifest.metrics
    assert metrics["best_objective"] == found.manifest.objective
    facts = json.loads((found.path / "facts.json").read_text())
    assert (facts["prompts"], facts["cut_prompts"]) == (40, 0)
    rows = [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows if "loss/total" in row] == [2, 4, 6]
    assert [row["global_step"] for row in rows if "eval/objective" in row] == [0, 2, 4, 6]
    # The objective: the mean score in standard deviations of SFT's scores, less 0.05 times the KL.
    (unit,) = (row["eval/reward_std"] for row in rows if row["global_step"] == 0)
    expected = metrics["eval/reward_mean"] / unit - 0.05 * metrics["eval/kl_sequence"]
    assert metrics["best_objective"] == pytest.approx(expected)
    ratios = [row["policy/ratio_first"] for row in rows if "policy/ratio_first" in row]
    assert ratios == pytest.approx([1.0] * 3, abs=1e-4)


def test_prompts_that_leave_no_room_are_cut_and_counted(run_copy: Path) -> None:
    # 48 tokens, 8 of them for the answer: 40 are left for the prompt.
    run(run_copy, "stage=ppo", "ppo.seq_length=48", "ppo.steps=2", "ppo.reward.delta=false")
    found = newest(run_copy, "ppo")
    codec = Codec(AutoTokenizer.from_pretrained(found / "model"), "hh")
    rows = DataModule(small_config(run_copy).data).corpus.prompts.train
    longer = sum(len(codec.encode_prompt(row.history)) > 40 for row in rows)
    facts = json.loads((found / "facts.json").read_text())
    assert facts["cut_prompts"] == longer
    assert longer > 0


def newest(outputs: Path, stage: str) -> Path:
    return Store(outputs / "store").find(f"{stage}/")[-1].path


def original_files(outputs: Path) -> list[Path]:
    return sorted(
        (outputs / "cache" / "original_scores").glob("*.npy"), key=lambda p: p.stat().st_mtime
    )


def test_the_data_sets_own_answers_are_scored_once(
    small_run: Path, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = original_files(run_copy)
    scores = np.load(path)
    model = RewardModel.load(artifact(small_run, "reward").path / "model")
    codec = Codec(AutoTokenizer.from_pretrained(artifact(small_run, "sft").path / "model"), "hh")
    rows = DataModule(small_config(small_run).data).corpus.prompts.train
    tokens = tokenize_prompts(rows, codec, 128, 8)
    used = np.flatnonzero(~np.isnan(scores))
    assert len(used) == 24, "three iterations of 8 rollouts meet 24 of 40 prompts"
    with torch.no_grad():
        for row in used[:6]:
            ids = np.concatenate([tokens.prompt[row], tokens.original[row]]).astype(np.int64)
            if ids[-1] != codec.eos_id:  # cut to 8 tokens, and ended by hand
                ids[-1] = codec.eos_id
            expected = float(model.scores(torch.from_numpy(ids)[None], torch.tensor([len(ids)])))
            assert scores[row] == pytest.approx(expected, abs=1e-5)

    monkeypatch.setattr(ppo_inputs, "_score", lambda *_: pytest.fail("scored again"))
    run(run_copy, "stage=ppo", "ppo.lr=1e-5")
    assert len(original_files(run_copy)) == 1


def test_more_iterations_do_not_change_the_batches_of_those_before() -> None:
    def batches(steps: int) -> list[list[int]]:
        config = small_config(Path("unused"), f"ppo.steps={steps}")
        return [rows.tolist() for rows in ppo_inputs._used(config, 20)]

    one, two, many = batches(2), batches(4), batches(40)
    assert [len(rows) for rows in one] == [8]
    assert two[:1] == one
    assert many[:2] == two
    assert sorted(row for rows in many for row in rows) == list(range(20)), "each once"


def test_own_answers_are_scored_again_by_another_reward_model(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by one made again under the same key, which may have other weights."""
    asked: list[int] = []
    score = ppo_inputs._score

    def noted(*arguments: Any) -> Any:
        asked.append(1)
        return score(*arguments)

    monkeypatch.setattr(ppo_inputs, "_score", noted)
    put_other_weights(artifact(run_copy, "reward"))
    run(run_copy, "stage=ppo", "ppo.lr=1e-5")
    assert len(asked) == 3, "each of three iterations"


def test_prompts_without_answers_have_nothing_to_compare_with(
    tmp_path: Path, run_copy: Path
) -> None:
    preferences = jsonl(tmp_path / "pairs.jsonl", pairs(12))
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs(30)]
    rows[16] = {"prompt": "And this one?"}
    prompts = jsonl(tmp_path / "prompts.jsonl", rows)
    arguments = [
        "stage=ppo",
        "data=hh_local",
        f"data.preferences={preferences}",
        f"data.prompts={prompts}",
        "data.validation_fraction=0",
        "data.test_fraction=0",
        f"sft.use={artifact(run_copy, 'sft').path}",
        f"reward.use={artifact(run_copy, 'reward').path}",
    ]
    with pytest.raises(UserError, match=r"ppo\.reward\.delta=true .*prompts\.jsonl:17 has none"):
        run(run_copy, *arguments)
    run(run_copy, *arguments, "ppo.reward.delta=false", "ppo.steps=2")


def test_the_value_function_starts_from_a_given_reward_model(
    run_copy: Path, tmp_path: Path
) -> None:
    function = tmp_path / "mine.py"
    function.write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    arguments = [
        "stage=ppo",
        "ppo.steps=2",
        f"ppo.reward.function={function}:score",
        "ppo.value_init=reward",
        "ppo.value_trunk=own",
        f"reward.use={artifact(run_copy, 'reward').path}",
    ]
    run(run_copy, *arguments)
    assert (newest(run_copy, "ppo") / "model" / "value_head.safetensors").is_file()


def test_a_value_branch_is_kept_beside_the_model(run_copy: Path) -> None:
    run(run_copy, "stage=ppo", "ppo.steps=2", "ppo.train_blocks=1", "ppo.value_trunk=branch")
    model = newest(run_copy, "ppo") / "model"
    names = set(load_file(model / "value_model" / "model.safetensors"))
    blocks = {name.split(".")[1] for name in names if name.startswith("layers.")}
    assert blocks == {"0"}, "one block of its own"
    assert not any("embed" in name for name in names)
    AutoModelForCausalLM.from_pretrained(model)


def test_a_reward_model_with_another_tokenizer_reads_the_text(
    run_copy: Path, tmp_path: Path
) -> None:
    run(tmp_path / "other", "stage=reward", "model.architecture.vocabulary=290", "reward.steps=2")
    judge = artifact(tmp_path / "other", "reward").path
    run(run_copy, "stage=ppo", f"reward.use={judge}", "ppo.steps=2")
    scores = np.load(original_files(run_copy)[-1])
    row = int(np.flatnonzero(~np.isnan(scores))[0])
    policy = Codec(AutoTokenizer.from_pretrained(artifact(run_copy, "sft").path / "model"), "hh")
    prompts = DataModule(small_config(run_copy).data).corpus.prompts.train
    tokens = tokenize_prompts(prompts, policy, 128, 8)
    content = tokens.original[row].tolist()[:-1]
    text = policy.tokenizer.decode([*tokens.prompt[row].tolist(), *content])
    own = AutoTokenizer.from_pretrained(judge / "model")
    ids = torch.tensor([[*own(text)["input_ids"], own.eos_token_id]])
    with torch.no_grad():
        expected = RewardModel.load(judge / "model").scores(ids, torch.tensor([ids.shape[1]]))
    assert scores[row] == pytest.approx(float(expected), abs=1e-5)


def test_the_last_weights_can_be_asked_for(run_copy: Path) -> None:
    run(run_copy, "stage=ppo", "ppo.select=last")
    found = Store(run_copy / "store").find("ppo/")[-1]
    assert found.manifest.metrics["published_step"] == 6
    rows = [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/objective" in row][-1]
    assert found.manifest.metrics["eval/objective"] == last["eval/objective"]
    assert weights(found) != weights(artifact_before(run_copy))


def artifact_before(outputs: Path) -> Any:
    return Store(outputs / "store").find("ppo/")[0]
