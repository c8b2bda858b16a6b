"""PPO and the evaluation against a reward server, through the whole program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.stages import ppo_inputs
from rlhf_exp.stages.scorers import SERVER_NOTE
from rlhf_exp.store.store import Store
from tests.judge_server import JudgeServer
from tests.lab import artifact, launch, run
from tests.serving.served import ServedReward


def newest(outputs: Path, stage: str) -> Path:
    return Store(outputs / "store").find(f"{stage}/")[-1].path


def logged(folder: Path) -> list[dict[str, float]]:
    """Return what a stage logged, without times, speeds and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dropped = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(dropped)} for row in rows]


def rule(body: dict[str, Any]) -> Any:
    """Count the letter e; no name is given."""
    return 200, {}, json.dumps({"scores": [text.count("e") for text in body["responses"]]})


@pytest.fixture
def letters() -> Iterator[JudgeServer]:
    with JudgeServer(rule) as server:
        yield server


def test_a_served_reward_model_scores_as_one_in_the_process(
    small_run: Path, run_copy: Path
) -> None:
    with ServedReward(small_run, "small", "--device", "cpu") as server:
        assert launch(run_copy, "name=far", f"ppo.reward.url={server.url}") == 0
        near, far = artifact(small_run, "ppo").path, newest(run_copy, "ppo")
        for ours, theirs in zip(logged(near), logged(far), strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)
        assert json.loads((far / SERVER_NOTE).read_text()) == {
            "url": server.url,
            "name": server.name,
        }
        assert Store(run_copy / "store").find("ppo/")[-1].manifest.parents.keys() == {"sft"}
        results = [artifact(small_run, "eval").path, newest(run_copy, "eval")]
        one, two = (json.loads((path / "result.json").read_text()) for path in results)
        assert (one["judge"], two["judge"]) == ("reward model", "reward server")
        for ours, theirs in zip(one["rows"], two["rows"], strict=True):
            assert theirs["answer_b"] == ours["answer_b"]
            assert theirs["score_b"] == pytest.approx(ours["score_b"], abs=1e-4)
        # Named, it is the same reward wherever it is; by another name it is refused.
        asked = ("stage=ppo", f"ppo.reward.url={server.url}")
        with pytest.raises(UserError, match=rf"scores with '{server.name}', but ppo\.reward\.name"):
            run(run_copy, *asked, "ppo.reward.name=other")


def test_a_server_that_is_not_there_is_noticed_before_anything_is_trained(
    tmp_path: Path, letters: JudgeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = "http://127.0.0.1:9"
    for more in ([], ["probe=true"]):
        assert launch(tmp_path, f"ppo.reward.url={nowhere}", *more) == 2
        assert f"error: ppo.reward.url={nowhere}: no connection" in capfd.readouterr().err
    assert not (tmp_path / "store").exists()
    assert launch(tmp_path, f"ppo.reward.url={nowhere}", "plan=true") == 0
    letters.rule = lambda body: (200, {}, '{"scores": []}')
    assert launch(tmp_path, f"ppo.reward.url={letters.url}") == 2
    assert "0 scores for 1 responses" in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_server_of_the_users_own(run_copy: Path, letters: JudgeServer) -> None:
    for stage in ("reward", "ppo", "eval"):
        shutil.rmtree(artifact(run_copy, stage).path)
    assert launch(run_copy, f"ppo.reward.url={letters.url}", "ppo.reward.request_size=3") == 0
    assert not list((run_copy / "store" / "reward").glob("*"))
    result = json.loads((artifact(run_copy, "eval").path / "result.json").read_text())
    assert [row["score_b"] for row in result["rows"]] == [
        row["answer_b"].count("e") for row in result["rows"]
    ]
    assert max(len(body["responses"]) for body in letters.bodies) == 3
    assert all(body.keys() == {"prompts", "responses"} for body in letters.bodies)
    prompts = {text for body in letters.bodies for text in body["prompts"]}
    assert all(text.startswith("\n\nHuman: ") for text in prompts)
    assert all(text.endswith("\n\nAssistant:") for text in prompts)


def test_what_a_nameless_server_scored_is_not_trusted_later(
    run_copy: Path, letters: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address says nothing of the reward, so the data's own responses are scored again."""
    times = []
    score = ppo_inputs._score
    monkeypatch.setattr(ppo_inputs, "_score", lambda *args: times.append(1) or score(*args))
    asked = ["stage=ppo", "ppo.steps=2", f"ppo.reward.url={letters.url}"]
    run(run_copy, *asked)
    run(run_copy, *asked, "ppo.lr=1e-5")
    assert len(times) == 2
    run(run_copy, *asked, "ppo.reward.name=letters")
    run(run_copy, *asked, "ppo.reward.name=letters", "ppo.lr=1e-5")
    assert len(times) == 3
    assert not list(newest(run_copy, "ppo").glob("original_scores*"))


def test_an_interrupted_run_goes_on_only_with_the_reward_it_was_begun_with(
    run_copy: Path, letters: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(name: str) -> None:
        letters.rule = lambda body: (
            200,
            {},
            json.dumps({"scores": [0.0] * len(body["prompts"]), "name": name}),
        )

    asked = ["stage=ppo", f"ppo.reward.url={letters.url}", "ppo.reward.retries=0"]
    named("first")

    def broken(*_: object) -> None:
        raise UserError("interrupted by the test")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_exp.stages.ppo.run_loop", broken)
        with pytest.raises(UserError, match="interrupted by the test"):
            run(run_copy, *asked)
    named("second")
    with pytest.raises(UserError, match="with 'second', and this run was begun with 'first'"):
        run(run_copy, *asked)
    named("first")
    run(run_copy, *asked)


def test_labels_are_judged_by_the_server(
    run_copy: Path, tmp_path: Path, letters: JudgeServer
) -> None:
    rows = [{"prompt": "Hi?", "answer_a": "e", "answer_b": "eeeeee", "winner": "b"}]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    ppo = artifact(run_copy, "ppo").path
    own = [f"ppo.use={ppo}", f"ppo.reward.url={letters.url}", f"eval.judge.labels={labels}"]
    run(run_copy, "stage=eval", *own)
    found = json.loads((newest(run_copy, "eval") / "judges.json").read_text())
    assert found["quality"]["judges"][0]["judge"] == "reward server"
    prompt = "\n\nHuman: Hi?\n\nAssistant:"
    assert {"prompts": [prompt] * 2, "responses": ["e", "eeeeee"]} in letters.bodies
