"""The bundled sums in a whole run: the rule as the reward, and the accuracy of every policy."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.report.run.gather import RESULT
from rlhf_exp.report.run.terminal import comparison_table
from rlhf_exp.rewards.arithmetic import is_right
from tests import lab

SIZES = (
    "data.arithmetic.demonstrations=60",
    "data.arithmetic.preferences=60",
    "data.arithmetic.prompts=40",
    "data.arithmetic.validation=12",
    "data.arithmetic.test=12",
)


def test_accuracy_of_every_policy_by_the_rule(tmp_path: Path) -> None:
    lab.run(
        tmp_path,
        *SIZES,
        "data=arithmetic",
        "ppo.reward.function=rlhf_exp.rewards.arithmetic:score",
        "ppo.reward.delta=false",
        "dpo.steps=2",
        "dpo.batch=8",
        "dpo.epochs=null",
        "dpo.eval_prompts=4",
        "dpo.seq_length=128",
        "dpo.generation.max_new_tokens=8",
        "eval.models=[sft,dpo,ppo]",
    )
    evaluation = lab.artifact(tmp_path, "eval")
    comparisons = [
        ModelComparison.from_json(plain) for plain in evaluation.json("comparisons.json")
    ]
    assert [result.name_b for result in comparisons] == ["DPO", "PPO"]
    for result in comparisons:
        metric = result.metric("accuracy")
        assert metric is not None
        assert metric.b is not None
        right = [is_right(row.prompt, row.answer_b) for row in result.rows]
        assert metric.b.mean == sum(right) / len(right)
        # The rule was the reward, too.
        assert [row.score_b for row in result.rows] == [float(value) for value in right]
    assert {"eval/accuracy/b", "eval/PPO/accuracy/b"} <= evaluation.manifest.metrics.keys()
    (table, *_) = comparison_table(ModelComparison.from_json(evaluation.json(RESULT))).renderables
    assert any("Accuracy" in str(cell) for cell in table.columns[0].cells)
