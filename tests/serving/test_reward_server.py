"""The reward server's application, in this process, around the small run's reward model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from rlhf_exp.commands.serve_reward import ServeOptions, load_request_scorer
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.evaluation.judges.reward_models import RewardModelTextScorer
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.serving import reward_server
from rlhf_exp.serving.reward_server import RequestScorer, make_app
from tests.lab import artifact, put_file

WANTED = ServeOptions(device="cpu")
PROMPTS = ["\n\nHuman: How do I boil an egg?\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"]
RESPONSES = ["Seven minutes in boiling water.", "Go away."]


@pytest.fixture(scope="module")
def scores(small_run: Path) -> RequestScorer:
    return load_request_scorer(small_run, "small", WANTED)


@pytest.fixture(scope="module")
def client(scores: RequestScorer) -> TestClient:
    return TestClient(make_app(scores))


def test_texts_are_scored_as_a_judge_would(
    scores: RequestScorer, client: TestClient, small_run: Path
) -> None:
    folder = artifact(small_run, "reward").path / "model"
    own = RewardModelTextScorer(RewardModel.load(folder), Codec(load_tokenizer(folder), "hh"))
    found = client.post("/", json={"prompts": PROMPTS, "responses": RESPONSES})
    assert found.status_code == 200
    assert found.json()["scores"] == pytest.approx(own(PROMPTS, RESPONSES).tolist(), abs=1e-5)
    assert found.json()["name"] == scores.name
    assert found.json()["tokenizer"] == own.codec.digest
    empty = client.post("/", json={"prompts": [], "responses": []})
    assert empty.json()["scores"] == []


def test_tokens_are_scored_as_they_are(client: TestClient, small_run: Path) -> None:
    folder = artifact(small_run, "reward").path / "model"
    model, codec = RewardModel.load(folder), Codec(load_tokenizer(folder), "hh")
    rows = [[7, 7, 7, 9], [11, 12]]
    expected = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([[*row, codec.eos_id]])
            expected.append(float(model.scores(ids, torch.tensor([ids.shape[1]]))))
    # The texts are of others: they are not read then.
    body = {"prompts": PROMPTS, "responses": RESPONSES, "tokens": rows}
    found = client.post("/", json=body).json()["scores"]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "`prompts` must be a list of texts"),
        ('{"prompts": ["a"]}', "`responses` must be a list of texts"),
        ('{"prompts": ["a"], "responses": [1]}', "`responses` must be a list of texts"),
        ('{"prompts": ["a"], "responses": []}', "the lists have different lengths: [1, 0]"),
        ('{"prompts": ["a"], "responses": ["b"], "tokens": [1]}', "lists of integers"),
        ('{"prompts": ["a"], "responses": ["b"], "tokens": [[true]]}', "lists of integers"),
        ('{"prompts": ["a"], "responses": ["b"], "tokens": [[99999]]}', "is not in 0 to"),
        (f'{{"prompts": ["a"], "responses": ["b"], "tokens": [[1{"0" * 400}]]}}', "is not in 0"),
        (f'{{"prompts": ["a"], "responses": ["b"], "tokens": [[1{"0" * 9000}]]}}', "not JSON"),
        ('{"prompts": ["a"], "responses": ["b"], "tokens": [[1e999]]}', "lists of integers"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompts": "ab", "responses": "cd"}', "`prompts` must be a list of texts"),
    ],
)
def test_what_is_no_request_is_refused_in_words(client: TestClient, body: str, says: str) -> None:
    found = client.post("/", content=body)
    assert found.status_code == 400
    assert says in found.json()["error"]


def test_a_key_is_asked_for(scores: RequestScorer) -> None:
    client = TestClient(make_app(scores, "sk-secret"))
    body: dict[str, Any] = {"prompts": ["a"], "responses": ["b"]}
    assert client.post("/", json=body).status_code == 401
    wrong = {"Authorization": "Bearer sk-secre"}
    assert client.post("/", json=body, headers=wrong).status_code == 401
    right = {"Authorization": "Bearer sk-secret"}
    assert client.post("/", json=body, headers=right).status_code == 200


def test_too_large_a_request(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "BODY_LIMIT", 100)
    body = json.dumps({"prompts": ["a" * 200], "responses": ["b"]})
    assert client.post("/", content=body).status_code == 413


def test_one_long_row_does_not_make_the_others_long(
    scores: RequestScorer, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of all rows by the longest would have 300 times 200,000 tokens."""
    shapes: list[tuple[int, ...]] = []
    score = scores.scorer.__call__

    class Spy:
        batch, seq_length = scores.scorer.batch, scores.scorer.seq_length

        def __call__(self, tokens: torch.Tensor, *lengths: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(tokens.shape))
            return score(tokens, *lengths)

    monkeypatch.setattr(scores, "scorer", Spy())
    rows = [[7] * 200_000, *([9, 11] for _ in range(300))]
    texts = ["a"] * 301
    body = {"prompts": texts, "responses": texts, "tokens": rows}
    found = client.post("/", json=body).json()["scores"]
    assert sum(lines * width for lines, width in shapes) < 1000 * scores.scorer.seq_length
    assert max(width for _, width in shapes) == scores.scorer.seq_length
    # What is left out is what the model would not have read.
    end = {"prompts": ["a"], "responses": ["a"], "tokens": [[7] * scores.scorer.seq_length]}
    assert found[:1] == pytest.approx(client.post("/", json=end).json()["scores"], abs=1e-6)
    assert found[1:] == pytest.approx([found[1]] * 300, abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-4


def test_a_long_text_is_scored_by_its_end(
    scores: RequestScorer, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_server, "TEXT_LIMIT", 20_000)
    end = " the end of it" * 100
    body = {"prompts": ["x" * 9000 + end, "y" * 9000 + end, "z"], "responses": ["a", "a", "a"]}
    found = client.post("/", json=body).json()["scores"]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[0] - found[2]) > 1e-4
    body = {"prompts": ["x" * 20_001], "responses": ["a"]}
    refused = client.post("/", json=body)
    assert refused.status_code == 413
    assert "a text of 20001 characters in `prompts`" in refused.json()["error"]


def test_too_many_responses(client: TestClient) -> None:
    texts = ["a"] * (reward_server.ROW_LIMIT + 1)
    refused = client.post("/", json={"prompts": texts, "responses": texts})
    assert refused.status_code == 413
    assert "10001 responses; send at most 10000 at once" in refused.json()["error"]


def test_half_a_surrogate_pair_is_scored(client: TestClient) -> None:
    body = '{"prompts": ["a \\ud83d"], "responses": ["b"]}'
    assert client.post("/", content=body).status_code == 200


def of_parts(scores: RequestScorer, parts: list[dict[str, Any]]) -> tuple[int, str]:
    """Send a request in parts, and then nothing; return the answer's status and body."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.sleep(60)
        return {"type": "http.request", "more_body": True} | parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    asyncio.run(make_app(scores)(scope, receive, send))
    return sent[0]["status"], b"".join(part.get("body", b"") for part in sent).decode()


def test_a_request_that_does_not_end(
    scores: RequestScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_server, "BODY_TIMEOUT_S", 0.05)
    status, text = of_parts(scores, [{"body": b"{"}, {"body": b" "}])
    assert status == 408
    assert "did not come within 0.05 s" in text
    status, text = of_parts(scores, [{"body": b"{"}, {"type": "http.disconnect"}])
    assert (status, "cut off" in text) == (400, True)


@pytest.mark.parametrize(
    ("result", "says"), [([float("nan")], "not finite"), (None, "ZeroDivisionError: by the test")]
)
def test_what_goes_wrong_in_scoring_is_said(
    scores: RequestScorer, monkeypatch: pytest.MonkeyPatch, result: list[float] | None, says: str
) -> None:
    def score(*_: object) -> list[float]:
        if result is None:
            raise ZeroDivisionError("by the test")
        return result

    monkeypatch.setattr(scores, "of_texts", score)
    found = TestClient(make_app(scores)).post("/", json={"prompts": ["a"], "responses": ["b"]})
    assert found.status_code == 500
    assert says in found.json()["error"]


def test_the_name_goes_with_what_decides_the_scores(run_copy: Path, scores: RequestScorer) -> None:
    def name(**changes: Any) -> str:
        return load_request_scorer(run_copy, "small", replace(WANTED, **changes)).name

    assert name() == name(batch=3) == scores.name, "where it lies does not count"
    others = {name(seq_length=64), name(dtype="bfloat16")}
    content = json.dumps({"mean": 5.0, "std": 1.0}).encode()
    put_file(artifact(run_copy, "reward"), "model/reward_model.json", content)
    others.add(name())
    assert len(others | {scores.name}) == 4
