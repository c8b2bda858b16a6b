from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.harness import TaskScore
from rlhf_exp.stages.evaluation import harness
from rlhf_exp.stages.evaluation.evaluation import EvaluatedModel
from tests.lab import artifact, run, small_config
from tests.stages.test_eval import newest

QUESTIONS = [
    {"question": f"The {colour} of the {thing} is", "choices": ["good", "bad"], "label": n % 2}
    for n, (colour, thing) in enumerate(
        (colour, thing) for colour in ("red", "blue", "green") for thing in ("door", "car", "hat")
    )
]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of nine questions, in a folder of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    file = folder / "colours.yaml"
    file.write_text(TASK.format(data=data))
    return file


def test_without_the_package_its_extra_is_named_before_anything_runs(
    run_copy: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"`pip install lm-eval` \(extra `harness`\)"):
        run(run_copy, "eval=harness", f"eval.harness.tasks=[{task}]", "sft.seed=7")
    assert len(list((run_copy / "store" / "sft").iterdir())) == 1


def test_other_processes_wait_for_one_model_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait has an end, after which the processes fail: it must not be of all models together."""
    waits: list[list[str]] = []

    class OneOfSeveral:
        config = small_config(tmp_path, "eval=harness", "eval.harness.tasks=[t]")
        models = (EvaluatedModel("SFT", "a"), EvaluatedModel("PPO", "b"))

        def on_main_process(self, function: Callable[[], Any]) -> Any:
            waits.append([])
            return function()

    def scores(evaluation: Any, model: EvaluatedModel, lm_eval: Any) -> list[TaskScore]:
        waits[-1].append(model.name)
        return [TaskScore("t", "acc", "none", 0.5, "higher", 1, values=(0.5,))]

    monkeypatch.setattr(harness, "_scores", scores)
    monkeypatch.setattr(harness, "version", lambda name: "0")
    evaluation: Any = OneOfSeveral()
    assert harness.run(evaluation).metrics["harness/PPO/t/acc"] == 0.5
    assert [names for names in waits if names] == [["SFT"], ["PPO"]]


@pytest.mark.harness
def test_a_local_task_on_every_model(
    run_copy: Path, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    asked: list[Path] = []
    results = harness.LmEval.results

    def counted(self: Any, causal_lm: Any, tokenizer: Any) -> dict[str, Any]:
        asked.append(Path(causal_lm.config.name_or_path))
        return results(self, causal_lm, tokenizer)

    monkeypatch.setattr(harness.LmEval, "results", counted)
    models = [artifact(run_copy, role).path / "model" for role in ("sft", "ppo")]
    options = ("stage=eval", "eval=harness", f"eval.harness.tasks=[{task.parent}]")
    run(run_copy, *options)
    assert asked == models
    folder = newest(run_copy)
    found = json.loads((folder / "harness.json").read_text())
    (one,) = found["tasks"]
    assert (one["task"], one["metric"], one["better"]) == ("colours", "acc", "higher")
    assert (one["documents"], one["paired"]) == (9, True)
    right = {role: _right(artifact(run_copy, role).path / "model") for role in ("sft", "ppo")}
    assert one["values"]["SFT"]["mean"] == pytest.approx(sum(right["sft"]) / 9)
    difference = (sum(right["ppo"]) - sum(right["sft"])) / 9
    assert one["differences"]["PPO"]["mean"] == pytest.approx(difference)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["harness/PPO/colours/acc/difference"] == pytest.approx(difference)
    assert "Capability, lm-eval" in capsys.readouterr().out
    (page,) = (run_copy / "reports").glob(f"eval-{folder.name}.html")
    assert 'id="capability"' in page.read_text()

    # Beside another suite the same numbers are not computed again; other data are another task.
    run(run_copy, "stage=eval", f"eval.harness.tasks=[{task}]")
    assert asked == models
    assert json.loads((newest(run_copy) / "harness.json").read_text()) == found
    data = task.with_suffix(".jsonl")
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:4]))
    run(run_copy, *options)
    assert asked == models * 2
    assert json.loads((newest(run_copy) / "harness.json").read_text())["tasks"][0]["documents"] == 4


def _right(folder: Path) -> list[bool]:
    """Return which questions a model gets right, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = []
    for one in QUESTIONS:
        scores = []
        prompt = tokenizer(one["question"], add_special_tokens=False).input_ids
        for choice in one["choices"]:
            ids = tokenizer(f"{one['question']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            scores.append(sum(float(logprobs[n - 1, ids[n]]) for n in range(len(prompt), len(ids))))
        right.append(scores.index(max(scores)) == one["label"])
    return right


@pytest.mark.harness
@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ("arc_eazy", r"lm-eval has no task 'arc_eazy'; did you mean arc_easy"),
        ("nowhere.yaml", "there is no file or folder"),
    ],
)
def test_a_task_that_is_not_there_is_named_before_anything_runs(
    tasks: str, complaint: str, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    config = small_config(tmp_path, "eval=harness", f"eval.harness.tasks=[{tasks}]")
    with pytest.raises(UserError, match=complaint):
        harness.check(config)
