"""The states of the token that closes a row's content, against full forwards without a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_exp.batch import FinishReason, Samples
from rlhf_exp.rollout import sampler
from rlhf_exp.rollout.sampler import sample
from rlhf_exp.rollout.transcript import Stopper
from tests.rollout.test_sampler import (
    FAMILIES,
    GPT_STYLE,
    LENGTHS,
    ONLY_LIBRARY,
    blocks,
    build,
    full_forward,
    make_prompts,
    settings,
    tokenizer_of_letters,
)

CLOSE = 33


def ended_in_all_ways(family: str, batch: int, close: int | None) -> Samples:
    """Rows that end by token 22, by a stop string that row 4 says, and by their length."""
    model, prompts = build(family), make_prompts(LENGTHS)
    tokenizer = tokenizer_of_letters()
    free = sample(model, prompts, settings(), seed=5)
    stop = tokenizer.decode(free.tokens[4, LENGTHS[4] + 2 : LENGTHS[4] + 5].tolist())
    return sample(
        model,
        prompts,
        settings(eos_id=int(free.tokens[2, LENGTHS[2] + 3]), batch=batch),
        seed=5,
        stopper=Stopper(tokenizer, [stop]),
        capture=blocks(model)[1],
        close=close,
    )


def check_closing(family: str, samples: Samples) -> None:
    assert samples.closing is not None
    for row, length in enumerate(LENGTHS):
        content = samples.tokens[row, : length + int(samples.content_lengths[row])]
        closed = torch.cat([content, torch.tensor([CLOSE])])
        _, states = full_forward(build(family), closed)
        if samples.finish[row] == FinishReason.LENGTH:
            assert samples.states is not None
            last = samples.states[row, len(content) - 1]
            torch.testing.assert_close(last, states[1][-2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(samples.closing[row], states[1][-1], rtol=1e-4, atol=1e-4)


def check_states(samples: Samples, plain: Samples) -> None:
    """The same as without closing; and the last token's, where it is content."""
    assert samples.states is not None
    assert plain.states is not None
    for row, length in enumerate(LENGTHS):
        fed = length + int(samples.response_lengths[row]) - 1
        torch.testing.assert_close(
            samples.states[row, :fed], plain.states[row, :fed], rtol=0, atol=1e-4
        )
        known = samples.finish[row] == FinishReason.LENGTH
        assert bool(samples.states[row, fed].abs().sum() > 0) == known
        assert samples.states[row, fed + 1 :].abs().sum() == 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONLY_LIBRARY])
def test_closing_states_are_those_of_the_full_forward(family: str) -> None:
    samples = ended_in_all_ways(family, 3, CLOSE)
    assert set(samples.finish.tolist()) == {
        FinishReason.EOS,
        FinishReason.STOP,
        FinishReason.LENGTH,
    }
    check_closing(family, samples)
    # And nothing else is changed by them.
    plain = ended_in_all_ways(family, 3, None)
    assert plain.closing is None
    assert samples.tokens.tolist() == plain.tokens.tolist()
    assert samples.finish.tolist() == plain.finish.tolist()
    check_states(samples, plain)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("stride", [1, 5])
def test_whatever_the_batch_and_however_often_the_host_looks(
    monkeypatch: pytest.MonkeyPatch, batch: int, stride: int
) -> None:
    if stride > 1:
        monkeypatch.setattr(sampler, "on_accelerator", lambda device: True)
        monkeypatch.setattr(sampler, "ACCELERATOR_STRIDE", stride)
    samples = ended_in_all_ways("gpt_neox", batch, CLOSE)
    check_closing("gpt_neox", samples)
    monkeypatch.undo()
    plain = ended_in_all_ways("gpt_neox", 7, None)
    check_states(samples, plain)


def test_no_position_is_left_for_it() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**{**GPT_STYLE, "n_positions": 16})).eval()
    for longest, known in ((5, True), (6, False)):
        samples = sample(
            model, make_prompts([2, longest]), settings(), 5, capture=blocks(model)[1], close=CLOSE
        )
        assert (samples.closing is not None) == known
