"""The weights that a worker leaves, under its names, in the model that they started from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_exp.engines.handover import take_back
from rlhf_exp.errors import UserError
from rlhf_exp.trlx.convert import old_name
from tests.trlx.test_convert import model_of


def test_trained_weights_come_back(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    trained, model = model_of("gpt_neox"), model_of("gpt_neox")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter *= 1.5
    weights = {name: value.detach().clone() for name, value in trained.named_parameters()}
    weights["embed_out.weight"] = weights.pop("lm_head.weight")
    save_file(weights, path)
    take_back(model, path, partial(old_name, model))
    for found, expected in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="no weights that can be read"):
        take_back(model_of("gpt2"), path)
    weights = {name: value.detach() for name, value in model_of("gpt2").named_parameters()}
    save_file({**weights, "transformer.ln_f.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"weights of another model .*transformer\.ln_f\.bias"):
        take_back(model_of("gpt2"), path)
