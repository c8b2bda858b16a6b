from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.stages import best_of
from rlhf_exp.stages.data_module import DataModule
from tests.lab import artifact, run, small_config

# Answers of a hardly trained model seldom end by themselves: twice as long, so that some do.
CHOOSE = ("stage=best_of", "name=chosen", "best_of.n=4", "ppo.generation.max_new_tokens=48")


def chosen_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "chosen.jsonl").read_text().splitlines()]


def test_the_best_of_a_prompts_answers() -> None:
    answers = [("a", 1.0, True), ("b", 3.0, False), ("c", 2.0, True), ("", 9.0, True)]
    best = best_of._best(answers)
    # The cut one and the empty one are no demonstrations, but count in what was sampled.
    assert (best.text, best.score, best.mean) == ("c", 2.0, 15 / 4)
    assert best_of._best(answers[1:2]).text is None


def test_another_sft_imitates_what_the_reward_has_chosen(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = tmp_path / "short.py"
    reward.write_text("def score(prompts, responses):\n    return [-len(r) for r in responses]\n")
    made_by = (*CHOOSE, f"ppo.reward.function={reward}:score", "ppo.reward.delta=false")
    monkeypatch.setattr(best_of, "_PROMPTS_OF_PART", 16)
    choose = best_of._Chooser.choose
    asked: list[range] = []

    def cut_off(self: Any, rows: range) -> Any:
        asked.append(rows)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return choose(self, rows)

    monkeypatch.setattr(best_of._Chooser, "choose", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(run_copy, *made_by)
    run(run_copy, *made_by)
    # 40 training and 12 validation prompts; the parts that were done are not sampled again.
    assert [rows.start for rows in asked] == [0, 16, 32, 32, 48]
    made = artifact(run_copy, "best_of")
    assert not (made.path / "parts").exists()
    rows = chosen_in(made.path)
    _check_chosen(run_copy, rows, made.manifest.metrics)

    demonstrations = "data.demonstrations=best_of:chosen"
    run(run_copy, "stage=sft", demonstrations, "name=rft")
    first, second = (
        json.loads((path / "manifest.json").read_text())
        for path in sorted(
            (run_copy / "store" / "sft").iterdir(), key=lambda path: path.stat().st_mtime
        )
    )
    assert second["parents"] == {"demonstrations": made.key}
    facts = json.loads((run_copy / "store" / "sft" / second["key"] / "facts.json").read_text())
    prompts = DataModule(small_config(run_copy).data).corpus.prompts
    train = {_texts(prompt.history) for prompt in prompts.train}
    assert facts["rows"] == sum(_texts_of(row) in train for row in rows)

    # The key is that of the answers: those of another run are other demonstrations.
    path = made.path / "chosen.jsonl"
    config = small_config(run_copy, "stage=sft", demonstrations)
    assert plan(config)[0].key == second["key"] != first["key"]
    named = small_config(run_copy, "stage=sft", f"data.demonstrations=best_of:{made.key}")
    assert plan(named)[0].key == second["key"]
    # The store finds an answer that was changed.
    path.write_text(path.read_text().replace('"score"', '"SCORE"', 1))
    with pytest.raises(UserError, match=r"chosen\.jsonl"):
        plan(config)


def _texts(history: Any) -> tuple[str, ...]:
    return tuple(turn.text for turn in history)


def _texts_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(turn["text"] for turn in row["history"])


def _check_chosen(outputs: Path, rows: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    prompts = DataModule(small_config(outputs).data).corpus.prompts
    asked = {_texts(one.history) for one in (*prompts.train, *prompts.validation)}
    test = {_texts(one.history) for one in prompts.test}
    assert rows
    assert all(_texts_of(row) in asked - test for row in rows)
    assert metrics["best_of/chosen_fraction"] == pytest.approx(len(rows) / 52)
    assert metrics["best_of/reward_chosen"] == pytest.approx(np.mean([r["score"] for r in rows]))
    assert metrics["best_of/reward_chosen"] > metrics["best_of/reward_mean"]
    assert [row["score"] for row in rows] == [-len(row["response"]) for row in rows]


def test_a_run_without_chosen_answers_is_told_how_to_make_them(run_copy: Path) -> None:
    for name, reason in (
        ("small", r"that run has no best_of, only sft, reward, ppo, eval"),
        ("nowhere", r"no such folder, run or key"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            run(run_copy, "stage=sft", f"data.demonstrations=best_of:{name}")
        assert f"stage=best_of name={name}" in str(caught.value)


def test_answers_that_are_all_cut_are_no_demonstrations(run_copy: Path) -> None:
    with pytest.raises(UserError, match=r"all 2 answers to each of 13 prompts were cut"):
        run(
            run_copy,
            "stage=best_of",
            "best_of.n=2",
            "best_of.prompts=1",
            "ppo.generation.max_new_tokens=1",
        )
