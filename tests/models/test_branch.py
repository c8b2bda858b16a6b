"""Trunk and branch against the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.errors import UserError
from rlhf_exp.models.branch import Branch, Trunk, check_branch

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_branch_over_trunk_is_the_whole_model(
    tiny: Build, family: str, rows: Batch, k: int
) -> None:
    model = tiny(family)
    states = Trunk(model, 4 - k)(rows["tokens"])
    hidden = Branch.of(model, k, share=True)(states)
    whole = model(rows["tokens"], output_hidden_states=True)
    assert torch.equal(states, whole.hidden_states[4 - k])
    assert (model.lm_head(hidden) - whole.logits).abs().max() < 1e-5


def test_sliding_window_of_the_upper_blocks_is_kept(tiny: Build, rows: Batch) -> None:
    model = tiny("qwen2")
    config = copy.deepcopy(model.config)
    config.sliding_window = 4
    config.layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    sliding = type(model)(config)
    sliding.load_state_dict(model.state_dict())
    hidden = Branch.of(sliding, 2, share=True)(Trunk(sliding, 2)(rows["tokens"]))
    whole = sliding.base_model(rows["tokens"]).last_hidden_state
    assert torch.equal(hidden, whole)
    assert not torch.allclose(hidden, model.base_model(rows["tokens"]).last_hidden_state)


def test_shared_branch_follows_the_model_and_a_copy_does_not(
    tiny: Build, family: str, rows: Batch
) -> None:
    model = tiny(family)
    states = Trunk(model, 2)(rows["tokens"])
    shared, copied = Branch.of(model, 2, share=True), Branch.of(model, 2, share=False)
    before = shared(states).detach()
    assert torch.equal(copied(states), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(shared(states), before)
    assert torch.equal(copied(states), before)


def test_copy_has_no_gradient_and_no_embedding(tiny: Build, family: str, rows: Batch) -> None:
    model = tiny(family)
    base = Branch.of(model, 1, share=False).module
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(parameter.is_meta for parameter in base.parameters())
    # one block of four and a norm of 32 or 64, no table of 89 x 32
    assert sum(p.numel() for p in base.parameters()) < model.num_parameters() / 3


@pytest.mark.parametrize("k", [0, 5])
def test_number_of_blocks_out_of_range(tiny: Build, k: int) -> None:
    with pytest.raises(UserError, match=f"train_blocks={k}: the model has 4 blocks"):
        Branch.of(tiny("llama"), k, share=True)


def test_family_that_scales_its_logits_is_refused(tiny: Build) -> None:
    model = tiny("llama")
    model.config.model_type = "another"
    check_branch(model, 2)
    head = model.lm_head
    model.forward = lambda **inputs: type(
        "Output", (), {"logits": head(model.base_model(**inputs).last_hidden_state) * 1.5}
    )
    with pytest.raises(UserError, match="'another' model cannot be cut"):
        check_branch(model, 2)
