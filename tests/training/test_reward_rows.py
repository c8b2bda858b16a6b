"""Rewards that see the row: what travels with a prompt to a function and to a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.data.batching import right_padded
from rlhf_exp.data.rows import Prompt, Turn
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.errors import UserError
from rlhf_exp.http_client import Service
from rlhf_exp.training.reward_scorer import PromptRows
from rlhf_exp.training.scorers import (
    FunctionScorer,
    RewardClient,
    RewardFunction,
    ServerInfo,
    ServerScorer,
)
from tests.judge_server import JudgeServer

CODEC = Codec(train_tokenizer(["x"], 258), "plain")
ROWS = [
    Prompt((Turn("human", "What is 1 + 1?"),), None, "f.jsonl:1", {"answer": "2", "marks": [1]}),
    Prompt((Turn("human", "And 2 + 2?"),), "Four.", "f.jsonl:2", {"answer": "4"}),
]


def known(rows: list[Prompt] = ROWS, seq_length: int = 100) -> tuple[PromptRows, Any]:
    """Return the rows by token ids, and prompts with answers as a scorer takes them."""
    prompts = tokenize_prompts(rows, CODEC, seq_length, 8).prompt
    answers = [CODEC.encode_response(f"It is {number}.") for number in range(len(rows))]
    parts = list(zip(list(prompts), answers, strict=True))
    tokens, _ = right_padded(parts)
    lengths = torch.tensor([[len(prompt), len(answer) - 1] for prompt, answer in parts])
    remembered = PromptRows()
    remembered.add(prompts, rows)
    return remembered, (tokens, lengths[:, 0], lengths[:, 1])


def function(folder: Path, source: str) -> RewardFunction:
    path = folder / "mine.py"
    path.write_text(source)
    return RewardFunction(f"{path}:score")


def test_a_row_is_the_other_fields_and_the_datas_own_response() -> None:
    remembered, (tokens, lengths, _) = known()
    assert remembered.fields(tokens.flip(0), lengths.flip(0)) == [
        {"response": "Four.", "answer": "4"},
        {"answer": "2", "marks": [1]},
    ]


def test_a_field_called_response_is_the_datas_own() -> None:
    row = Prompt((Turn("human", "Hi?"),), "Hello.", "f.jsonl:1", {"response": "Good day."})
    remembered, (tokens, lengths, _) = known([row])
    assert remembered.fields(tokens, lengths) == [{"response": "Good day."}]


def test_rows_that_a_cut_made_one_prompt_are_refused_only_if_they_differ() -> None:
    # Each character is a token; 9 of the last ones stay, which are the same.
    talks = [(Turn("human", f"{word} ends like that"),) for word in ("This", "It")]
    same = [Prompt(talk, None, f"f:{n}", {"answer": "2"}) for n, talk in enumerate(talks)]
    remembered, (tokens, lengths, _) = known(same, 17)
    assert remembered.fields(tokens, lengths) == [{"answer": "2"}] * 2
    other = [same[0], Prompt(talks[1], None, "f:1", {"answer": "3"})]
    remembered, (tokens, lengths, _) = known(other, 17)
    with pytest.raises(UserError, match="f:0 and f:1 have different fields, and the model reads"):
        remembered.fields(tokens, lengths)


def test_a_function_of_three_gets_rows_of_its_own(tmp_path: Path) -> None:
    source = (
        "def score(prompts, responses, facts):\n"
        "    for row in facts:\n"
        "        row.setdefault('marks', []).append(5)\n"
        "    return [float(row['answer']) + len(row['marks']) for row in facts]\n"
    )
    remembered, rows = known()
    scorer = FunctionScorer(function(tmp_path, source), CODEC)
    scorer.rows = remembered
    # 2 + 2 marks and 4 + 1; the same again, since the function changed copies.
    for _ in range(2):
        assert scorer(*rows).tolist() == [4.0, 5.0]


def test_a_function_of_two_gets_no_rows(tmp_path: Path) -> None:
    source = "def score(prompts, responses, weight=2.0):\n    return [weight] * len(prompts)\n"
    scorer = FunctionScorer(function(tmp_path, source), CODEC)
    assert not scorer.function.reads_rows
    assert scorer(*known()[1]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ("texts", "(texts)"),
        ("", "()"),
        ("a, b, c, d", "(a, b, c, d)"),
        ("a, b, *, strict", "(a, b, strict)"),
    ],
)
def test_a_function_of_something_else_is_refused(
    tmp_path: Path, parameters: str, found: str
) -> None:
    with pytest.raises(UserError) as caught:
        function(tmp_path, f"def score({parameters}): ...\n")
    assert f"it takes {found}; expected (prompts, responses)" in str(caught.value)


def test_a_missing_field_is_the_functions_error_with_its_place(tmp_path: Path) -> None:
    source = "def score(prompts, responses, rows):\n    return [row['label'] for row in rows]\n"
    scorer = FunctionScorer(function(tmp_path, source), CODEC)
    remembered, rows = known()
    scorer.rows = remembered
    with pytest.raises(UserError, match=r"mine\.py:2: KeyError: 'label'"):
        scorer(*rows)


def test_a_server_that_asks_for_rows_is_sent_them_from_then_on() -> None:
    def rule(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        rows = body.get("rows", [{}] * len(body["prompts"]))
        scores = [float(row.get("answer", 0)) for row in rows]
        return 200, {}, json.dumps({"scores": scores, "name": "marks", "rows": True})

    remembered, rows = known()
    with JudgeServer(rule) as server:
        client = RewardClient(Service(server.url, None, 5.0, 0), size=1)
        assert client.check() == ServerInfo("marks", None, rows=True)
        scorer = ServerScorer(client, CODEC)
        scorer.rows = remembered
        scores: Tensor = scorer(*rows)
    assert scores.tolist() == [2.0, 4.0]
    assert [body.get("rows") for body in server.bodies] == [
        None,
        [{"answer": "2", "marks": [1]}],
        [{"response": "Four.", "answer": "4"}],
    ]


def test_a_server_that_does_not_ask_is_sent_none() -> None:
    remembered, rows = known()
    with JudgeServer(
        lambda body: (200, {}, json.dumps({"scores": [1.0] * len(body["prompts"])}))
    ) as server:
        client = RewardClient(Service(server.url, None, 5.0, 0))
        assert client.check() == ServerInfo()
        scorer = ServerScorer(client, CODEC)
        scorer.rows = remembered
        scorer(*rows)
    assert all("rows" not in body for body in server.bodies)
