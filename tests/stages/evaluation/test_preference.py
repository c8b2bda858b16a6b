"""Judges in an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, write_answers
from tests.judge_lab import decoder
from tests.judge_server import JudgeServer, longer
from tests.lab import artifact, jsonl, run, small_config
from tests.stages.test_eval import newest

LABELS = [
    {"prompt": "Which?", "answer_a": "a long answer", "answer_b": "short", "winner": "a"},
    {"prompt": "Which one?", "answer_a": "no", "answer_b": "a long answer", "winner": "b"},
    {"prompt": "And now?", "answer_a": "this is longer", "answer_b": "brief", "winner": "b"},
]


def judged(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "judges.json").read_text())
    return content


ANSWERS = [("aaa why", "bb", 0.0, 2.0), ("cc", "dddd good", 1.0, 0.0), ("same", "same", 0.5, 0.5)]


def stored(path: Path) -> Path:
    """Write answers of SFT and PPO to three prompts."""
    answers = [
        Answer(
            part="preference",
            model=("SFT", "PPO")[side],
            row=row,
            sample=0,
            seed=0,
            prompt=f"Q{row}",
            text=texts[side],
            tokens=2,
            finish="eos",
            score=float(texts[2 + side]),
            facts={"dialogue": f"\n\nHuman: Question {row}?\n\nAssistant:"},
        )
        for side in (0, 1)
        for row, texts in enumerate(ANSWERS)
    ]
    write_answers(path, answers)
    return path


def test_three_judges_of_one_run(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    asked = [
        "stage=eval",
        f"eval.samples={stored(tmp_path / 'samples.jsonl')}",
        "eval.judge.names=[reward,model,llm]",
        f"eval.judge.model={decoder(tmp_path / 'classifier')}",
        "eval.judge.llm=stand-in",
    ]
    with JudgeServer(longer) as server:
        run(outputs, *asked, f"eval.judge.url={server.url}")
        # Neither the identical answers, nor the prompt as the model read it, are shown.
        assert len(server.bodies) == 4
        assert "Human: Question 0?" in server.bodies[0]["messages"][1]["content"]
    first = newest(outputs)
    (comparison,) = judged(first)["comparisons"]
    kinds = {one["kind"]: one for one in comparison["judges"]}
    signs = {kind: [v["sign"] for v in one["verdicts"]] for kind, one in kinds.items()}
    # Scores 0 to 2, 1 to 0, 0.5 to 0.5. The classifier's by the last word: why (10) above [UNK] (1)
    # below good (5). The stand-in: the longer one.
    assert signs == {"reward": [1, -1, 0], "model": [-1, 1, 0], "llm": [-1, 1, 0]}
    chance = 1 / (1 + math.exp(-2))
    assert kinds["reward"]["verdicts"][0]["probability"] == pytest.approx(chance)
    assert kinds["llm"]["llm"]["usage"]["prompt_tokens"] == 400
    assert (kinds["llm"]["llm"]["consistent"], kinds["llm"]["llm"]["read"]) == (2, 2)
    assert kinds["llm"]["preference"]["win_rate"] == 0.5
    shares = {(one["first"], one["judge"]): one["agreement"] for one in comparison["agreement"]}
    assert shares["reward model", "stand-in"]["mean"] == pytest.approx(1 / 3)
    assert shares["classifier", "stand-in"]["mean"] == 1.0
    metrics = json.loads((first / "manifest.json").read_text())["metrics"]
    assert metrics["eval/judge/llm/wins"] == metrics["eval/judge/llm/losses"] == 1
    assert metrics["eval/judge/llm/tokens"] == 428  # 4 * (100 + 7)

    # The server is gone, but its replies are there.
    run(outputs, *asked, f"eval.judge.url={server.url}", "eval.seed=1")
    again = judged(newest(outputs))["comparisons"][0]["judges"][2]
    assert [v["sign"] for v in again["verdicts"]] == signs["llm"]
    assert again["llm"]["usage"]["requests"] == 0


def test_judges_of_what_people_judged(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_KEY", "sk-very-secret")
    with JudgeServer(longer) as server:
        run(
            run_copy,
            "stage=eval",
            "eval.judge.names=[reward,llm]",
            "eval.judge.llm=stand-in",
            f"eval.judge.url={server.url}",
            "eval.judge.key_env=STAND_IN_KEY",
            "eval.judge.request=[max_tokens:64]",
            f"eval.judge.labels={jsonl(tmp_path / 'labels.jsonl', LABELS)}",
        )
        assert server.headers[-1]["authorization"] == "Bearer sk-very-secret"
        assert server.bodies[0]["max_tokens"] == 64
    found = newest(run_copy)
    content = judged(found)["quality"]
    assert (content["file"], content["people"]["counts"]) == ("labels.jsonl", [1, 0, 2])
    assert content["people"]["agreement"] is None
    reward, llm = content["judges"]
    assert (reward["judge"], reward["pairs"]) == ("reward model", 3)
    # People: a, b, b. The stand-in: a, b, a.
    assert llm["confusion"] == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert llm["agreement"]["mean"] == pytest.approx(2 / 3)
    metrics = json.loads((found / "manifest.json").read_text())["metrics"]
    kappa = cohen_kappa_score(["a", "b", "b"], ["a", "b", "a"])
    assert metrics["eval/judge/llm/people_kappa"] == pytest.approx(kappa)
    for path in run_copy.rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes(), path


def test_an_endpoint_that_is_not_there_stops_before_sampling(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with JudgeServer(longer) as server:
        url = server.url
    monkeypatch.setattr("rlhf_exp.stages.evaluation.answer_sources.NativeEngine", None)
    asked = ("eval.judge.names=[llm]", "eval.judge.llm=x", f"eval.judge.url={url}")
    with pytest.raises(UserError, match=r"LLM judge x at .*no connection"):
        run(run_copy, "stage=eval", *asked)


def test_the_usual_judge_leaves_no_further_file(small_run: Path) -> None:
    assert not (artifact(small_run, "eval").path / "judges.json").exists()


def test_a_reward_function_judges_labels(run_copy: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def score(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    labels = jsonl(tmp_path / "labels.jsonl", LABELS)
    ppo = artifact(run_copy, "ppo").path
    run(
        run_copy,
        "stage=eval",
        f"ppo.use={ppo}",
        f"ppo.reward.function={source}:score",
        f"eval.judge.labels={labels}",
    )
    (found,) = judged(newest(run_copy))["quality"]["judges"]
    assert found["judge"] == "reward function"
    assert found["confusion"] == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["eval.judge.names=[llm]"], ["eval.judge.llm=null", "eval.judge.url=null"]),
        (["eval.judge.names=[model]"], ["eval.judge.model=null: the judge `model` needs it"]),
        (["eval.judge.model=x"], ["the judge `model` is not asked"]),
        (["eval.judge.names=[reward,reward]"], ["names each judge once"]),
        (["eval.judge.labels=/no/such"], ["eval.judge.labels=/no/such: no such file"]),
        (
            ["eval.judge.names=[llm]", "eval.judge.llm=x", "eval.judge.url=ftp://a"],
            ["eval.judge.url=ftp://a: needs an address"],
        ),
        (
            [
                "eval.judge.names=[llm]",
                "eval.judge.llm=x",
                "eval.judge.url=https://me:secret@a/v1",
                "eval.judge.key_env=RLHF_EXP_NO_SUCH",
                "eval.judge.request=[q]",
            ],
            ["must not hold a password or key", "no such environment variable", "NAME:JSON"],
        ),
        (["eval.judge.concurrency=0", "eval.judge.timeout_s=0"], ["at least 1", "above 0"]),
    ],
)
def test_config_problems(tmp_path: Path, overrides: list[str], says: list[str]) -> None:
    from rlhf_exp.config.checks import config_problems

    found = " ".join(str(one) for one in config_problems(small_config(tmp_path, *overrides)))
    for text in says:
        assert text in found


def test_what_judges_counts_for_the_key(tmp_path: Path) -> None:
    from rlhf_exp.pipeline.plan import plan

    def key(*overrides: str) -> str:
        return plan(small_config(tmp_path, "stage=eval", *overrides))[-1].key

    labels = [jsonl(tmp_path / name, LABELS[:2]) for name in ("one.jsonl", "two.jsonl")]
    usual = key()
    assert key("eval.judge.concurrency=1", "eval.judge.timeout_s=5") == usual
    assert key("eval.judge.names=[reward]") == usual
    assert key(f"eval.judge.labels={labels[0]}") == key(f"eval.judge.labels={labels[1]}") != usual
    jsonl(labels[1], LABELS)
    assert key(f"eval.judge.labels={labels[0]}") != key(f"eval.judge.labels={labels[1]}")
    llm = ["eval.judge.names=[llm]", "eval.judge.llm=x"]
    assert key(*llm, "eval.judge.url=http://a") == key(*llm, "eval.judge.url=http://b") != usual
