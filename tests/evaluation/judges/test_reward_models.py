"""Our own reward model as a judge of texts.

Judges that score: from given numbers, and by sequence classifiers with known weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.protocol import AnswerPair
from rlhf_exp.evaluation.judges.reward_models import (
    ClassifierTextScorer,
    RewardJudge,
    RewardModelTextScorer,
    messages_of,
    score_verdicts,
)
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.models.reward_model import RewardModel
from tests.judge_lab import decoder, words_tokenizer
from tests.lab import artifact

PROMPT = "\n\nHuman: Which one is the better of the two?\n\nAssistant:"
ANSWERS = ["The first one.", "I would not know, but I like the second one more.", ""]


@torch.no_grad()
def test_each_row_scores_as_it_does_alone(small_run: Path) -> None:
    folder = artifact(small_run, "reward").path / "model"
    model, tokenizer = RewardModel.load(folder), load_tokenizer(folder)
    judge = RewardModelTextScorer(model, Codec(tokenizer, "hh"), batch=2)
    found = judge([PROMPT] * 3, ANSWERS)
    start = tokenizer(PROMPT)["input_ids"]
    for answer, score in zip(ANSWERS, found, strict=True):
        ids = [*start, *tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        alone = model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item()
        assert score == pytest.approx(alone, abs=1e-5)
    assert len(set(found.tolist())) == 3
    assert judge.cut == 0
    # A row that is too long loses its beginning.
    short = RewardModelTextScorer(model, Codec(tokenizer, "hh"), seq_length=6)
    ids = [*start, *tokenizer(f" {ANSWERS[0]}")["input_ids"], tokenizer.eos_token_id][-6:]
    alone = model.scores(torch.tensor([ids]), torch.tensor([6])).item()
    assert short([PROMPT], ANSWERS[:1])[0] == pytest.approx(alone, abs=1e-5)
    assert short.cut == 1


def test_a_prompt_that_asks_nothing_is_named(small_run: Path) -> None:
    folder = artifact(small_run, "reward").path / "model"
    judge = RewardModelTextScorer(RewardModel.load(folder), Codec(load_tokenizer(folder), "hh"))
    with pytest.raises(UserError, match=r"no prompt for a judge: .*'Assistant: Hello'"):
        judge(["Assistant: Hello"], ["Hi"])


TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} </s> {% endfor %}"


def test_scores_become_verdicts() -> None:
    # sigmoid(2) = 0.881, sigmoid(0.1) = 0.525, sigmoid(-1) = 0.269; ties from 0.4 to 0.6.
    found = score_verdicts([0.0, 1.0, 1.0], [2.0, 1.1, 0.0])
    assert [one.sign for one in found] == [1, 0, -1]
    chances = [1 / (1 + math.exp(-x)) for x in (2.0, 0.1, -1.0)]
    assert [one.probability for one in found] == pytest.approx(chances)
    assert score_verdicts([0.0], [0.3], (0.5, 0.5))[0].sign == 1


def test_a_reward_judge_scores_both_answers_of_each_pair() -> None:
    def score(prompts: list[str], answers: list[str]) -> np.ndarray:
        return np.array(
            [float(len(p) + 10 * len(a)) for p, a in zip(prompts, answers, strict=True)]
        )

    judge = RewardJudge("length", score)
    found = judge.verdicts([AnswerPair("p", "aa", "a"), AnswerPair("qq", "", "b")])
    assert [one.sign for one in found] == [-1, 1]
    assert judge.name == "length"


NORM = 1 / math.sqrt(1 / 11 + 1e-6)


def test_one_label_is_the_reward(tmp_path: Path) -> None:
    judge = ClassifierTextScorer(decoder(tmp_path), batch=3)
    # The last words: good (5), bad (6), why (10), and [UNK] (1).
    answers = ["good", "why bad", "good good why", "nothing"]
    found = judge(["why"] * 4, answers)
    assert found == pytest.approx(np.array([5, 6, 10, 1]) * NORM, rel=1e-5)
    assert judge.cut == 0


def test_of_two_labels_the_log_odds_are_the_reward(tmp_path: Path) -> None:
    found = ClassifierTextScorer(decoder(tmp_path, labels=2))(
        ["why", "why"], ["good", "why why bad"]
    )
    assert found == pytest.approx(np.array([10, 12]) * NORM, rel=1e-5)  # 3 i - i


@pytest.mark.parametrize("pad", [None, 0, 4])
def test_a_batch_scores_as_each_row_alone(tmp_path: Path, pad: int | None) -> None:
    # Ends in </s> (4). Where that is the model's own padding, the model reads the token before it.
    folder = decoder(tmp_path, pad=pad, template=TEMPLATE)
    prompts, answers = ["why", "Human", "why why"], ["good", "bad bad bad why", "bad"]
    whole = ClassifierTextScorer(folder)(prompts, answers)
    alone = [
        ClassifierTextScorer(folder, batch=1)([p], [a])[0]
        for p, a in zip(prompts, answers, strict=True)
    ]
    assert whole == pytest.approx(np.array(alone), rel=1e-6)
    expected = [5, 10, 6] if pad == 4 else [4, 4, 4]
    assert whole == pytest.approx(np.array(expected) * NORM, rel=1e-5)


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    judge = ClassifierTextScorer(decoder(tmp_path))
    assert judge(["why " * 40], ["bad"]) == pytest.approx(np.array([6 * NORM]), rel=1e-5)
    assert judge.cut == 1


def test_an_encoder_reads_prompt_and_answer_as_two_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    words_tokenizer(pair=True).save_pretrained(tmp_path)
    judge = ClassifierTextScorer(tmp_path)
    found = judge(["why bad", "why"], ["good", "bad good bad"])
    ids = [[2, 10, 6, 3, 5, 3], [2, 10, 3, 6, 5, 6, 3]]
    types = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    with torch.no_grad():
        expected = [
            model(torch.tensor([i]), token_type_ids=torch.tensor([t])).logits.item()
            for i, t in zip(ids, types, strict=True)
        ]
    assert found == pytest.approx(np.array(expected), abs=1e-6)
    assert judge(["why " * 20], ["good"]).shape == (1,)
    assert judge.cut == 1


def test_turns_of_one_speaker_in_a_row_are_joined() -> None:
    prompt = "\n\nHuman: Hi\n\nHuman: There\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:"
    assert messages_of(prompt, "So.") == [
        {"role": "user", "content": "Hi\n\nThere"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why"},
        {"role": "assistant", "content": "So."},
    ]
    assert messages_of("Plain", "x")[0] == {"role": "user", "content": "Plain"}
    told = messages_of("\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:", "Yes.")
    assert told[:2] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 labels; a judge is a sequence classifier with one"):
        ClassifierTextScorer(decoder(tmp_path / "three", labels=3))
    with pytest.raises(UserError, match="no such folder"):
        ClassifierTextScorer(tmp_path / "none")


def test_a_template_that_refuses_the_dialogue_is_named(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"chat template refuses.*roles must alternate"):
        ClassifierTextScorer(decoder(tmp_path, template=template))(["why"], ["good"])


@pytest.mark.parametrize(
    "config", [DebertaV2Config, RobertaConfig, DistilBertConfig, ElectraConfig]
)
def test_an_encoder_judges_with_the_default_attention(
    config: type[PreTrainedConfig], tmp_path: Path
) -> None:
    tokenizer = words_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "dim": 16}
    values = {"vocab_size": len(tokenizer), "intermediate_size": 16, "num_labels": 1, "n_heads": 2}
    limits = {"max_position_embeddings": 24, "pad_token_id": 1, "hidden_dim": 16, "n_layers": 1}
    made = AutoModelForSequenceClassification.from_config(config(**sizes, **values, **limits))
    made.save_pretrained(tmp_path)
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(tmp_path)
    judge = ClassifierTextScorer(tmp_path)
    long = " ".join(["no one"] * 40)
    scores = judge([PROMPT, PROMPT], ["The first one.", long])
    assert np.isfinite(scores).all()
    assert judge.cut == 1, "positions end at 24"
