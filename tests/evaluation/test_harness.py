"""What lm-eval returns, in numbers worked out by hand; the package itself is not needed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.harness import TaskScore, compare_tasks, scalars, task_scores
from rlhf_exp.evaluation.harness_tasks import folders_of, specifications, task_content, task_files


def results(right: list[float], **changes: Any) -> dict[str, Any]:
    """Return two tasks of a group, of 3 and 2 documents, and a perplexity."""
    documents = [
        {"doc_id": number, "filter": "none", "acc": value, "ppl": (1.0, 2.0)}
        for number, value in enumerate(right)
    ]
    first, second = documents[:3], [{**one, "doc_id": one["doc_id"] - 3} for one in documents[3:]]
    # Out of order, as lm-eval may return them.
    samples = {"sums": first[::-1], "words": second}
    mean = {
        name: sum(one["acc"] for one in own) / len(own)
        for name, own in (("sums", first), ("words", second))
    }
    plain: dict[str, Any] = {
        "results": {
            "quiz": {"acc,none": sum(right) / 5, "acc_stderr,none": "N/A", "alias": "quiz"},
            "sums": {"acc,none": mean["sums"], "acc_stderr,none": 0.25, "sample_len": 3},
            "words": {"acc,none": mean["words"], "ppl,none": 7.5, "ppl_stderr,none": 0.5},
        },
        "group_subtasks": {"quiz": ["sums", "words"], "sums": [], "words": []},
        "higher_is_better": {
            "quiz": {"acc": True},
            "sums": {"acc": True},
            "words": {"acc": True, "ppl": False},
        },
        "samples": samples,
    }
    return {**plain, **changes}


def test_every_number_with_its_documents() -> None:
    scores = {score.name: score for score in task_scores(results([1, 1, 0, 1, 0]))}
    assert scores.keys() == {"quiz/acc", "sums/acc", "words/acc", "words/ppl"}
    assert scores["sums/acc"] == TaskScore(
        "sums", "acc", "none", 2 / 3, "higher", 3, 0.25, (1.0, 1.0, 0.0)
    )
    # A group's mean over all documents; were tasks weighed alike, it would be no mean of them.
    assert scores["quiz/acc"].value == 3 / 5
    assert sorted(scores["quiz/acc"].values or ()) == [0, 0, 1, 1, 1]
    assert scores["words/ppl"].better == "lower"
    assert scores["words/ppl"].values is None
    weighed = results([1, 1, 0, 1, 0])
    weighed["results"]["quiz"]["acc,none"] = (2 / 3 + 1 / 2) / 2
    (quiz, *_) = task_scores(weighed)
    assert quiz.values is None


def test_filters_are_numbers_of_their_own() -> None:
    plain = {
        "results": {"gsm": {"match,strict": 0.5, "match_stderr,strict": 0.1, "match,loose": 1.0}},
        "samples": {
            "gsm": [
                {"doc_id": n, "filter": kind, "match": value}
                for kind, values in (("strict", (0, 1)), ("loose", (1, 1)))
                for n, value in enumerate(values)
            ]
        },
    }
    strict, loose = task_scores(plain)
    assert (strict.name, strict.values, strict.better) == ("gsm/match,strict", (0, 1), "neither")
    assert (loose.name, loose.values, loose.documents) == ("gsm/match,loose", (1, 1), 2)


def test_a_difference_is_taken_document_by_document() -> None:
    base, tuned = [1.0, 0.0] * 50, [1.0, 0.0] * 49 + [0.0, 0.0]
    scores = {
        name: [TaskScore("t", "acc", "none", sum(own) / 100, "higher", 100, 0.05, tuple(own))]
        for name, own in (("SFT", base), ("PPO", tuned))
    }
    (compared,) = compare_tasks(scores, seed=0)
    assert compared.values["SFT"].mean == 0.5
    difference = compared.differences["PPO"]
    assert difference.mean == pytest.approx(-0.01)
    # One of 100 documents differs: a bootstrap finds it 0 to 3 times (Poisson of mean 1), where two
    # independent samples of 100 would be 0.14 apart either way.
    assert (difference.low, difference.high) == pytest.approx((-0.03, 0.0))
    assert compared.to_json()["paired"]
    assert scalars([compared]) == pytest.approx(
        {"harness/SFT/t/acc": 0.5, "harness/PPO/t/acc": 0.49, "harness/PPO/t/acc/difference": -0.01}
    )


def test_without_documents_the_standard_error_is_what_is_known() -> None:
    scores = {
        name: [
            TaskScore("t", "ppl", "none", value, "lower", 9, 0.5),
            *([TaskScore("only", "acc", "none", 1.0, "higher", 1)] if name == "SFT" else []),
        ]
        for name, value in (("SFT", 7.5), ("PPO", 8.5))
    }
    (compared,) = compare_tasks(scores, seed=0)  # a number that a model lacks is left out
    assert compared.values["PPO"].low == pytest.approx(8.5 - 1.96 * 0.5, abs=1e-4)
    assert compared.differences["PPO"].mean == 1.0
    assert not math.isfinite(compared.differences["PPO"].low)
    assert compared.to_json()["differences"]["PPO"] == {"mean": 1.0, "low": None, "high": None}


TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
process_docs: !function helpers.process
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_task_is_its_content_and_that_of_its_data(tmp_path: Path) -> None:
    data, folder = tmp_path / "data.jsonl", tmp_path / "tasks"
    folder.mkdir()
    data.write_text("{}\n")
    file, helpers = folder / "sums.yaml", folder / "helpers.py"
    file.write_text(TASK.format(data=data))
    helpers.write_text("def process(docs): return docs\n")
    (folder / "_default.yaml").write_text("num_fewshot: 0\n")
    assert task_content("arc_easy", digest) == "arc_easy"
    assert specifications(["arc_easy", str(folder)]) == ["arc_easy", str(file)]
    assert folders_of(["arc_easy", str(folder), str(file)]) == [str(folder)]
    found = [task_content(str(folder), digest)]
    assert task_content(str(file), digest) == found[0]
    for path in (data, helpers, folder / "_default.yaml"):
        path.write_text(path.read_text() + "# more\n")
        found.append(task_content(str(file), digest))
    assert len({json.dumps(one) for one in found}) == 4
    # The same content elsewhere is the same task.
    moved = folder.rename(tmp_path / "moved")
    assert task_content(str(moved), digest) == found[-1]


def test_what_a_task_includes_counts_wherever_it_is(tmp_path: Path) -> None:
    folder, parts = tmp_path / "tasks", tmp_path / "tasks" / "parts"
    parts.mkdir(parents=True)
    (folder / "all.yaml").write_text("group: all\ntask: [a, {group: b, task: [c]}]\n")
    others = tmp_path / "base.yaml", parts / "a.yaml", parts / "helpers.py"
    others[0].write_text("num_fewshot: 0\n")
    others[1].write_text("task: a\ninclude: ../../base.yaml\n")
    others[2].write_text("def process(docs): return docs\n")
    found = [task_content(str(folder), digest)]
    for path in others:
        path.write_text(path.read_text() + "# more\n")
        found.append(task_content(str(folder), digest))
    assert len({json.dumps(one) for one in found}) == 4
    assert task_content(str(folder / "all.yaml"), digest) == found[-1]


def test_other_yaml_beside_a_task_is_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    (tmp_path / "playbook.yaml").write_text("- hosts: all\n")
    (tmp_path / "two.yaml").write_text("a: 1\n---\nb: 2\n")
    assert task_content(str(tmp_path / "mine.yaml"), digest)["tasks"] == ["mine.yaml"]


def test_groups_of_a_folder_have_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a\n")
    (tmp_path / "all.yaml").write_text("group: all\ntask: [a]\n")
    assert task_files(str(tmp_path)) == [tmp_path / "all.yaml"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.yaml", None, "there is no file or folder"),
        ("other.yaml", "model: x\n", "is no task of lm-eval: it has neither `task:` nor `group:`"),
        ("list.yaml", "- task\n", "a YAML mapping was expected"),
        ("broken.yaml", "task: [\n", "cannot be read as YAML"),
        ("", None, "holds no .yaml file with `task:` or `group:`"),
    ],
)
def test_what_is_no_task(name: str, content: str | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"^eval\.harness\.tasks: ") as caught:
        task_files(f"{tmp_path}/{name}")
    assert complaint in str(caught.value)
