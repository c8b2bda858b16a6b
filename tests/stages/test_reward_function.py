"""A user's own reward through the whole program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab import artifact, launch

FUNCTIONS = {
    "letters": "return [r.count('e') for r in responses]",
    "too few": "return [1.0]",
    "nan": "return [1.0] * (len(responses) - 1) + [float('nan')]",
    "infinite": "return [float('inf')] * len(responses)",
    "nothing": "return None",
    "words": "return ['good'] * len(responses)",
    "raises": "return responses[10_000]",
}


def function(folder: Path, name: str) -> Path:
    path = folder / "mine.py"
    path.write_text(f"def score(prompts, responses):\n    {FUNCTIONS[name]}\n")
    return path


def test_it_takes_the_reward_models_place(run_copy: Path, tmp_path: Path) -> None:
    for stage in ("reward", "ppo", "eval"):
        (artifact(run_copy, stage).path / "manifest.json").unlink()
    assert launch(run_copy, f"ppo.reward.function={function(tmp_path, 'letters')}:score") == 0
    found = artifact(run_copy, "eval")
    assert found.manifest.parents.keys() == {"sft", "ppo"}
    result = json.loads((found.path / "result.json").read_text())
    assert result["judge"] == "reward function"
    assert [row["score_b"] for row in result["rows"]] == [
        row["answer_b"].count("e") for row in result["rows"]
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too few", "returned 1 scores for"),
        ("nan", "returned nan for the response"),
        ("infinite", "returned inf for the response"),
        ("nothing", "returned NoneType"),
        ("words", "returned 'good' (str) for the response"),
        ("raises", "mine.py:2: IndexError: list index out of range"),
    ],
)
def test_its_mistakes_are_named(
    name: str, message: str, run_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = function(tmp_path, name)
    assert launch(run_copy, f"ppo.reward.function={path}:score") == 2
    told = capfd.readouterr().err
    assert f"error: ppo.reward.function={path}:score" in told
    assert message in told
    assert "Traceback" not in told


def test_a_file_that_cannot_be_used(
    run_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def told(text: str, name: str = "score") -> str:
        (tmp_path / "mine.py").write_text(text)
        assert launch(run_copy, f"ppo.reward.function={tmp_path / 'mine.py'}:{name}") == 2
        return capfd.readouterr().err

    good = "def score(prompts, responses):\n    return [0.0] * len(responses)\n"
    assert "has no function other; its functions are score" in told(good, "other")
    assert "is not valid Python" in told("def score(:\n")
    assert "mine.py:1: ModuleNotFoundError: No module named 'nowhere'" in told(
        f"import nowhere\n{good}"
    )
