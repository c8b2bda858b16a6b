"""Rows with the fields of their records, in a whole run: PPO, its validation, delta, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.errors import UserError
from tests import lab

SOURCE = """
def score(prompts, responses, rows):
    with open({log!r}, "a") as log:
        for prompt, row in zip(prompts, rows):
            number = prompt.split(" is ")[1].split(" plus")[0]
            assert row["double"] == 2 * int(number), (prompt, row)
            assert row["response"] == f"It is {{row['double']}}."
            log.write(f"{{number}}\\n")
    return [float(len(response)) for response in responses]
"""


def test_every_scored_prompt_has_its_own_row(tmp_path: Path) -> None:
    rows = [row | {"double": 2 * number} for number, row in enumerate(lab.pairs(60))]
    log, source = tmp_path / "asked.txt", tmp_path / "mine.py"
    source.write_text(SOURCE.format(log=str(log)))
    outputs = tmp_path / "outputs"
    lab.run(
        outputs,
        "data=hh_local",
        f"data.preferences={lab.jsonl(tmp_path / 'pairs.jsonl', rows)}",
        f"ppo.reward.function={source}:score",
        "ppo.reward.delta=true",
        "eval=reward_quality",
        "eval.reward_quality.best_of=2",
    )
    asked = {int(line) for line in log.read_text().splitlines()}
    parts = lab.artifact(outputs, "eval").json("reward_quality.json")
    assert parts is not None, "held-out pairs have been scored, too"
    assert len(asked) > 24, "more than the prompts of training"


PAIRED = """
import json

def score(prompts, responses, rows):
    with open({log!r}, "a") as log:
        for response, row in zip(responses, rows):
            log.write(json.dumps([response, row["response"], row["mark"]]) + "\\n")
    return [float(len(response)) for response in responses]
"""


def test_pairs_that_share_a_prompt_are_scored_with_their_own_rows(tmp_path: Path) -> None:
    rows = [
        pair | {"chosen": f"{pair['chosen']} {word}", "mark": word}
        for pair in lab.pairs(40)
        for word in ("Yes.", "Sure.")
    ]
    log, source = tmp_path / "asked.txt", tmp_path / "mine.py"
    source.write_text(PAIRED.format(log=str(log)))
    lab.run(
        tmp_path / "outputs",
        "data=hh_local",
        f"data.preferences={lab.jsonl(tmp_path / 'pairs.jsonl', rows)}",
        f"ppo.reward.function={source}:score",
        "ppo.reward.delta=false",
        "eval=reward_quality",
        "eval.reward_quality.best_of=2",
    )
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    chosen = [(own, mark) for response, own, mark in asked if response == own]
    assert {mark for _, mark in chosen} == {"Yes.", "Sure."}
    assert all(own.endswith(mark) for own, mark in chosen)


def test_a_run_that_learns_from_no_pairs_needs_none(tmp_path: Path) -> None:
    rows = [
        {"question": pair["prompt"], "answer": pair["chosen"], "double": 2 * number}
        for number, pair in enumerate(lab.pairs(60))
    ]
    source = tmp_path / "mine.py"
    source.write_text(
        "def score(prompts, responses, rows):\n"
        "    return [float(str(row['double']) in r) for r, row in zip(responses, rows)]\n"
    )
    outputs = tmp_path / "outputs"
    overrides = (
        "data=hh_local",
        f"data.demonstrations={lab.jsonl(tmp_path / 'sums.jsonl', rows)}",
        "data.columns={prompt: question, response: answer}",
        f"ppo.reward.function={source}:score",
        "ppo.reward.delta=false",
        "eval=none",
    )
    assert not config_problems(lab.small_config(outputs, *overrides))
    lab.run(outputs, *overrides)
    assert lab.artifact(outputs, "ppo").manifest.metrics


def test_pairs_without_a_field_that_is_needed_are_found_before_anything_trains(
    tmp_path: Path,
) -> None:
    pairs = lab.pairs(80)
    prompts = [{"prompt": pair["prompt"], "mark": 1} for pair in pairs[40:]]
    source = tmp_path / "mine.py"
    source.write_text(
        "FIELDS = ('mark',)\n\n\ndef score(prompts, responses, rows):\n"
        "    return [float(row['mark']) for row in rows]\n"
    )
    outputs = tmp_path / "outputs"
    with pytest.raises(UserError, match="needs the field `mark` of every prompt's row"):
        lab.run(
            outputs,
            "data=hh_local",
            f"data.preferences={lab.jsonl(tmp_path / 'pairs.jsonl', pairs[:40])}",
            f"data.prompts={lab.jsonl(tmp_path / 'prompts.jsonl', prompts)}",
            f"ppo.reward.function={source}:score",
            "ppo.reward.delta=false",
            "eval=reward_quality",
        )
    assert not list(outputs.glob("store/*/*"))
