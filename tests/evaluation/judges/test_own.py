"""Our own reward model as a judge of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_exp.data.codec import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.own import OwnRewardModel
from rlhf_exp.models.load import load_tokenizer
from rlhf_exp.models.reward_model import RewardModel
from tests.lab import artifact

PROMPT = "\n\nHuman: Which one is the better of the two?\n\nAssistant:"
ANSWERS = ["The first one.", "I would not know, but I like the second one more.", ""]


@torch.no_grad()
def test_each_row_scores_as_it_does_alone(small_run: Path) -> None:
    folder = artifact(small_run, "reward").path / "model"
    model, tokenizer = RewardModel.load(folder), load_tokenizer(folder)
    judge = OwnRewardModel(model, Codec(tokenizer, "hh"), batch=2)
    found = judge([PROMPT] * 3, ANSWERS)
    start = tokenizer(PROMPT)["input_ids"]
    for answer, score in zip(ANSWERS, found, strict=True):
        ids = [*start, *tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        alone = model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item()
        assert score == pytest.approx(alone, abs=1e-5)
    assert len(set(found.tolist())) == 3
    assert judge.cut == 0
    # A row that is too long loses its beginning.
    short = OwnRewardModel(model, Codec(tokenizer, "hh"), seq_length=6)
    ids = [*start, *tokenizer(f" {ANSWERS[0]}")["input_ids"], tokenizer.eos_token_id][-6:]
    alone = model.scores(torch.tensor([ids]), torch.tensor([6])).item()
    assert short([PROMPT], ANSWERS[:1])[0] == pytest.approx(alone, abs=1e-5)
    assert short.cut == 1


def test_a_prompt_that_asks_nothing_is_named(small_run: Path) -> None:
    folder = artifact(small_run, "reward").path / "model"
    judge = OwnRewardModel(RewardModel.load(folder), Codec(load_tokenizer(folder), "hh"))
    with pytest.raises(UserError, match=r"no prompt for a judge: .*'Assistant: Hello'"):
        judge(["Assistant: Hello"], ["Hi"])
