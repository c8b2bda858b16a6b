"""Rows with the fields of their records, in a whole run: PPO, its validation, delta, evaluation."""

from __future__ import annotations

from pathlib import Path

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
