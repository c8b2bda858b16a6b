"""The client of a reward server, against one on loopback that answers by a rule.

What was sampled is scored alike from the sampler's states and from its token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_exp.batch import FinishReason, Prompts, Samples
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import world_of
from rlhf_exp.errors import UserError
from rlhf_exp.http_client import Service
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.models.reward_model import RewardModel, share_frozen_trunk
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.training.reward_scorer import ModelScorer, SharedTrunkScorer, score_samples
from rlhf_exp.training.scorers import RewardClient, ServerInfo, ServerScorer
from tests.judge_server import JudgeServer, Rule, in_turn

PROMPTS = ["one", "two", "three", "four", "five"]
RESPONSES = ["a", "bb", "ccc", "dddd", "eeeee"]


def answer(**content: Any) -> tuple[int, dict[str, str], str]:
    return 200, {}, json.dumps(content)


def lengths(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    """Score by the length of the response."""
    return answer(scores=[len(text) for text in body["responses"]])


def client(url: str, waits: list[float] | None = None, **settings: Any) -> RewardClient:
    own = {key: settings.pop(key) for key in ("size", "name") if key in settings}
    waited = [] if waits is None else waits
    return RewardClient(Service(url, **settings), **own, wait=waited.append, draw=lambda: 0.5)


def asked(rule: Rule, **settings: Any) -> tuple[list[float], JudgeServer]:
    with JudgeServer(rule) as server:
        return client(server.url, **settings).scores(PROMPTS, RESPONSES), server


def test_responses_go_in_batches_and_scores_keep_their_order() -> None:
    scores, server = asked(lengths, size=2)
    assert scores == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert server.bodies == [
        {"prompts": ["one", "two"], "responses": ["a", "bb"]},
        {"prompts": ["three", "four"], "responses": ["ccc", "dddd"]},
        {"prompts": ["five"], "responses": ["eeeee"]},
    ]
    assert set(server.paths) == {"/v1"}
    assert all("authorization" not in headers for headers in server.headers)


def test_failures_are_repeated_with_growing_pauses() -> None:
    rule = in_turn((500, {}, "broken"), (503, {}, ""), (200, {}, "<html>"), lengths)
    waits: list[float] = []
    scores, server = asked(rule, waits=waits, size=5)
    assert scores == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(server.bodies) == 4
    # With 0.5 drawn: 3/4 of 1, 2 and 4 seconds.
    assert waits == pytest.approx([0.75, 1.5, 3.0])


def test_a_server_that_stays_broken_is_given_up_with_what_it_says() -> None:
    with pytest.raises(UserError, match=r"HTTP 500 .*: no memory left, 3 times in a row"):
        asked(lambda body: (500, {}, "no memory left"), retries=2)


def test_a_check_asks_once_and_says_where_nobody_is() -> None:
    with JudgeServer(lambda body: (500, {}, "starting")) as server:
        with pytest.raises(UserError, match=r"HTTP 500 Internal Server Error: starting$"):
            client(server.url).check()
        assert len(server.bodies) == 1
        url = server.url
    with pytest.raises(UserError, match=rf"ppo\.reward\.url={url}: no connection"):
        client(url).check()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"scores": [1, 2]}', "2 scores for 5 responses"),
        ('{"scores": [1, 2, 3, 4, NaN]}', "nan for the response 'eeeee'; expected a finite"),
        ('{"scores": [1, Infinity, 3, 4, 5]}', "inf for the response 'bb'"),
        ('{"scores": [1, "2", 3, 4, 5]}', "'2' for the response 'bb'"),
        ('{"scores": [true, 2, 3, 4, 5]}', "True for the response 'a'"),
        (f'{{"scores": [1{"0" * 400}, 2, 3, 4, 5]}}', "for the response 'a'; expected a finite"),
        ('{"score": [1, 2, 3, 4, 5]}', 'expected {"scores"'),
        ("[1, 2, 3, 4, 5]", 'expected {"scores"'),
        ('{"scores": [1, 2, 3, 4, 5], "name": 7}', "must be texts"),
    ],
)
def test_an_answer_against_the_protocol_is_an_error_at_once(text: str, says: str) -> None:
    waits: list[float] = []
    with pytest.raises(UserError) as caught:
        asked(lambda body: (200, {}, text), waits=waits)
    assert says in str(caught.value)
    assert waits == []


def test_a_refusal_is_shown_with_its_body_and_without_the_key() -> None:
    with pytest.raises(UserError) as caught:
        asked(lambda body: (400, {}, "who is sk-secret?"), key="sk-secret")
    assert str(caught.value).endswith("HTTP 400 Bad Request: who is ***?")
    _, server = asked(lengths, key="sk-secret")
    assert server.headers[0]["authorization"] == "Bearer sk-secret"


def named(*names: str | None) -> Callable[[dict[str, Any]], Any]:
    """Answer every request under the next of the names."""
    left = list(names)
    return lambda body: answer(scores=[0.0] * len(body["responses"]), name=left.pop(0))


def test_the_reward_must_be_the_one_that_is_named() -> None:
    with pytest.raises(UserError, match=r"scores with 'old', but ppo\.reward\.name=new"):
        asked(named("old"), name="new")
    asked(named("new", "new", "new"), size=2, name="new")
    asked(lengths, name="anything: the server does not say")


def test_a_reward_that_changes_on_the_way_is_noticed() -> None:
    with pytest.raises(UserError, match="scores with 'new' now, and with 'old' before"):
        asked(named("old", "new"), size=3)
    asked(named("old", "old"), size=3)


@pytest.fixture
def codec() -> Codec:
    words = {word: number for number, word in enumerate(["<eos>", *"abcdef"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    return Codec(tokenizer, "plain")


@pytest.mark.parametrize("same", [True, False])
def test_tokens_go_to_a_server_that_reads_with_the_same_codec(codec: Codec, same: bool) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]])
    spans = (torch.tensor([2, 1]), torch.tensor([1, 1]))

    def rule(body: dict[str, Any]) -> Any:
        tokenizer = codec.digest if same else "other"
        return answer(scores=[3.5] * len(body["prompts"]), tokenizer=tokenizer)

    with JudgeServer(rule) as server:
        remote = client(server.url)
        assert remote.check() == ServerInfo(None, codec.digest if same else "other")
        scores = ServerScorer(remote, codec)(tokens, *spans)
    assert scores.tolist() == [3.5, 3.5]
    body = server.bodies[-1]
    assert body["prompts"] == ["a b", "e"]
    assert body["responses"] == ["c", "f"]
    assert body.get("tokens") == ([[1, 2, 3], [5, 6]] if same else None)


EOS = 23  # which half of the rows say
CODEC = cast(Codec, SimpleNamespace(eos_id=EOS))
SHAPE = Architecture("gpt_neox", 4, 32, 4, 64, 40, 48)


def model() -> Any:
    found = build_causal_lm(SHAPE, seed=0, eos_id=EOS, pad_id=EOS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return found


def reward_model() -> RewardModel:
    reward = RewardModel(model(), train_blocks=1)
    with torch.no_grad():
        for parameter in reward.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    return reward


def sampled(policy: Policy) -> Samples:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 2, 9, 1, 7, 3])
    tokens = torch.randint(8, 40, (6, 9), generator=generator)
    numbers = torch.arange(6)
    block = decoder_parts(policy.model).blocks[2]
    return sample(
        policy.model,
        Prompts(tokens, lengths, index=numbers, rollout=numbers),
        SamplingParams(max_new_tokens=12, temperature=1.0, batch=4, eos_id=EOS, pad_id=EOS),
        seed=2,
        capture=block,
        close=EOS,
    )


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_states_and_token_ids_give_the_same_scores(batch: int) -> None:
    policy = Policy(model(), train_blocks=2)
    samples = sampled(policy)
    assert {FinishReason.EOS, FinishReason.LENGTH} <= set(samples.finish.tolist())
    with world_of("float32", threads=1) as world:
        expected = score_samples(ModelScorer(reward_model(), CODEC, None, world, 3, 48), samples)
        reward = reward_model()
        branch = share_frozen_trunk(reward, policy)
        assert branch is not None
        scorer = SharedTrunkScorer(reward, branch, CODEC, world, batch, 48)
        # No forward pass over token ids: they would not be what is tested.
        reward.trunk = cast(Any, None)
        found = score_samples(scorer, samples)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


def test_rows_that_lose_their_start_are_scored_from_token_ids() -> None:
    policy = Policy(model(), train_blocks=2)
    samples = sampled(policy)
    longest = int((samples.prompt_lengths + samples.content_lengths).max())
    with world_of("float32", threads=1) as world:
        for room in (longest, longest + 1):
            plain = ModelScorer(reward_model(), CODEC, None, world, 3, room)
            reward = reward_model()
            branch = share_frozen_trunk(reward, policy)
            assert branch is not None
            scorer = SharedTrunkScorer(reward, branch, CODEC, world, 3, room)
            found, expected = score_samples(scorer, samples), score_samples(plain, samples)
            assert (found - expected).abs().max() < 1e-5
