"""One pass of the trunk over sampled responses, against full forwards without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_exp.models.frozen_trunk import Trunk
from rlhf_exp.rollout.sampler import sample
from rlhf_exp.rollout.trunk_pass import with_trunk_states
from tests.rollout.test_closing import CLOSE, check_closing, ended_in_all_ways
from tests.rollout.test_sampler import (
    GPT_STYLE,
    LENGTHS,
    build,
    full_forward,
    make_prompts,
    settings,
)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_states_are_those_of_the_full_forward(family: str, batch: int) -> None:
    plain = replace(ended_in_all_ways(family, 3, None), states=None)
    model = build(family)
    samples = with_trunk_states(plain, Trunk(model, 1).module, batch, CLOSE)
    check_closing(family, samples)
    assert samples.states is not None
    for row, length in enumerate(LENGTHS):
        whole = length + int(samples.response_lengths[row])
        _, states = full_forward(model, samples.tokens[row, :whole])
        torch.testing.assert_close(samples.states[row, :whole], states[1], rtol=1e-4, atol=1e-4)


def test_no_position_is_left_for_the_closing_token() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**{**GPT_STYLE, "n_positions": 16})).eval()
    for longest, known in ((6, True), (7, False)):
        samples = sample(model, make_prompts([2, longest]), settings(), 5)
        found = with_trunk_states(samples, Trunk(model, 1).module, 2, CLOSE)
        assert (found.closing is not None) == known
