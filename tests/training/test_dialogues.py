"""A reward model with a chat template of its own is asked in it, whoever scores."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_exp.data.batching import right_padded
from rlhf_exp.data.rows import Prompt, Turn
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.distributed.world import open_world
from rlhf_exp.http_client import Service
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.serving.reward_server import RequestScorer
from rlhf_exp.training.reward_scorer import ModelScorer, PromptRows
from rlhf_exp.training.scorers import RewardClient, ServerScorer
from tests.judge_server import JudgeServer

POLICYS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWARDS = (
    "Rate this.{% for m in messages %}\n{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)
TALKS = [
    (Turn("human", "What is it?"),),
    (Turn("human", "What is it?"), Turn("assistant", "A fish."), Turn("human", "And that there?")),
]
ANSWERS = ["A bird.", "That is a long story."]


def tokenizer_of(template: str, size: int, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["What is it? A fish. And that there?"] * 9, size)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def policy() -> Codec:
    return Codec(
        tokenizer_of(POLICYS, 280, "<|end|>", "<|user|>", "<|assistant|>"), "chat_template"
    )


@pytest.fixture(scope="module")
def own() -> Codec:
    return Codec(tokenizer_of(REWARDS, 270, "</s>"), "chat_template")


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    model = RewardModel(build_causal_lm(Architecture("llama", 1, 16, 2, 32, 280, 128), 0))
    with torch.no_grad():
        model.head.weight.mul_(100)
    return model.eval()


@pytest.fixture(scope="module")
def expected(own: Codec, reward: RewardModel) -> list[float]:
    """The scores of the dialogues as the reward model's own tokenizer writes them, whole."""
    scores = []
    for talk, said in zip(TALKS, ANSWERS, strict=True):
        roles = {"human": "user", "assistant": "assistant"}
        messages = [{"role": roles[turn.role], "content": turn.text} for turn in talk]
        messages.append({"role": "assistant", "content": said})
        ids = own.tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            score = reward.scores(torch.tensor([ids]), torch.tensor([len(ids)]))
        scores.append(float(score))
    assert abs(scores[0] - scores[1]) > 0.01
    return scores


def rows_of(policy: Codec, seq_length: int) -> tuple[tuple[Tensor, Tensor, Tensor], PromptRows]:
    """What a scorer is handed of the dialogues, and what it is told of the prompts."""
    rows = [Prompt(talk, None, "") for talk in TALKS]
    prompts = tokenize_prompts(rows, policy, seq_length, 8)
    pairs = [
        (prompts.prompt[row], policy.encode_response(said)) for row, said in enumerate(ANSWERS)
    ]
    tokens, _ = right_padded(pairs)
    lengths = torch.tensor([[len(prompt), len(said)] for prompt, said in pairs])
    known = PromptRows()
    known.add(prompts.prompt, rows)
    return (tokens, lengths[:, 0], lengths[:, 1]), known


# With 20 tokens the policy reads the end of the second prompt alone.
@pytest.mark.parametrize("seq_length", [120, 20])
def test_in_this_process(
    policy: Codec, own: Codec, reward: RewardModel, expected: list[float], seq_length: int
) -> None:
    inputs, rows = rows_of(policy, seq_length)
    scorer = ModelScorer(reward, policy, own, open_world("float32"), 2, 128)
    scorer.rows = rows
    assert scorer(*inputs).tolist() == pytest.approx(expected, abs=1e-5)


def test_behind_an_address(
    policy: Codec, own: Codec, reward: RewardModel, expected: list[float]
) -> None:
    inputs, rows = rows_of(policy, 120)
    served = RequestScorer(
        ModelScorer(reward, own, None, open_world("float32"), 2, 128), own, "mine"
    )

    def rule(body: dict[str, Any]) -> Any:
        scores = served.of_body(json.dumps(body).encode())
        return 200, {}, json.dumps({"scores": scores, "tokenizer": own.digest})

    with JudgeServer(rule) as server:
        client = RewardClient(Service(server.url, None, 5.0, 0))
        client.check()
        scorer = ServerScorer(client, policy)
        scorer.rows = rows
        scores = scorer(*inputs)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert server.bodies[-1]["dialogues"][0] == [{"role": "user", "content": "What is it?"}]
    assert "dialogues" not in server.bodies[0], "before the server has named its tokenizer"


def test_a_dialogue_that_is_none(own: Codec, reward: RewardModel) -> None:
    from starlette.exceptions import HTTPException

    served = RequestScorer(
        ModelScorer(reward, own, None, open_world("float32"), 2, 128), own, "mine"
    )
    asked = '{"role": "user", "content": "x"}'
    told = '{"role": "system", "content": "x"}'
    late, no_text = f"[[{asked}, {told}]]", f'[[{{"role": "system"}}, {asked}]]'
    served.of_body(
        f'{{"prompts": ["a"], "responses": ["b"], "dialogues": [[{told}, {asked}]]}}'.encode()
    )
    for wrong in ('"x"', '[["x"]]', f"[[{told}]]", late, no_text, "[[{}]]", "[]"):
        body = f'{{"prompts": ["a"], "responses": ["b"], "dialogues": {wrong}}}'
        with pytest.raises(HTTPException) as refused:
            served.of_body(body.encode())
        assert refused.value.status_code == 400
