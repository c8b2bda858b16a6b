"""The reward model: where it reads its score, its pairs, its folder.

A reward model over the policy's trunk: the same scores, the trunk held once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_exp.batch import Preferences
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.models.reward_model import RewardModel, scores_from_branch, share_frozen_trunk

Build = Callable[..., PreTrainedModel]
LENGTHS = torch.tensor([9, 4, 1])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 89, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tiny: Build, shared_data: Path, tmp_path: Path) -> tuple[RewardModel, Path]:
    reward = RewardModel(tiny("gpt_neox"))
    reward.set_normalisation(0.25, 1.5)
    reward.save(tmp_path, load_tokenizer(shared_data / "stories260k"))
    return reward, tmp_path


def test_score_is_read_at_the_last_real_token(tiny: Build, family: str, tokens: Tensor) -> None:
    model = tiny(family)
    reward = RewardModel(model)
    reward.set_normalisation(0.125, 2.0)
    scores = reward.scores(tokens, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        hidden = model.base_model(tokens[row : row + 1, :length]).last_hidden_state[0, -1]
        expected = (hidden * reward.head.weight[0]).sum() - 0.125
        assert abs(scores[row] - expected) < 1e-5


def test_score_depends_neither_on_padding_nor_on_other_rows(
    tiny: Build, family: str, tokens: Tensor
) -> None:
    reward = RewardModel(tiny(family))
    scores = reward.scores(tokens, LENGTHS)
    wide = torch.full((2, 14), 33)
    wide[:, :9] = tokens[1:]
    wide[torch.arange(14) >= LENGTHS[1:, None]] = 44
    assert (reward.scores(wide, LENGTHS[1:]) - scores[1:]).abs().max() < 1e-5


def test_pairs_of_unequal_width_in_one_forward(tiny: Build, tokens: Tensor) -> None:
    reward = RewardModel(tiny("llama"))
    calls = []
    reward.trunk.register_forward_hook(lambda *_: calls.append(1))
    pair = Preferences(
        tokens, LENGTHS, tokens[:, :4], torch.tensor([4, 3, 2]), torch.ones(3, dtype=torch.float32)
    )
    chosen, rejected = reward(pair)
    assert len(calls) == 1
    assert (chosen - reward.scores(tokens, LENGTHS)).abs().max() < 1e-5
    alone = reward.scores(tokens[:, :4], torch.tensor([4, 3, 2]))
    assert (rejected - alone).abs().max() < 1e-5


def test_scores_average_zero_after_normalisation(tiny: Build, tokens: Tensor) -> None:
    reward = RewardModel(tiny("gpt2"))
    for _ in range(2):  # a second time, on scores that are normalised already
        scores = reward.scores(tokens, LENGTHS)
        reward.set_normalisation(scores.mean().item() + 0.5, scores.std().item())
        assert abs(reward.scores(tokens, LENGTHS).mean() + 0.5) < 1e-6


def test_loaded_model_scores_the_same(saved: tuple[RewardModel, Path], tokens: Tensor) -> None:
    reward, folder = saved
    again = RewardModel.load(folder)
    assert torch.equal(again.scores(tokens, LENGTHS), reward.scores(tokens, LENGTHS))
    assert (again.mean.item(), again.std.item()) == (0.25, 1.5)
    assert not again.training


def test_transformers_loads_the_trunk(saved: tuple[RewardModel, Path], tokens: Tensor) -> None:
    reward, folder = saved
    trunk, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    hidden = trunk(tokens[:1]).last_hidden_state[0, -1]
    expected = (hidden * reward.head.weight[0]).sum() - 0.25
    assert abs(reward.scores(tokens[:1], LENGTHS[:1]) - expected) < 1e-5


def test_half_precision_trunk_keeps_its_head(
    saved: tuple[RewardModel, Path], tokens: Tensor
) -> None:
    reward = RewardModel.load(saved[1], dtype=torch.bfloat16)
    assert reward.head.weight.dtype == reward.scores(tokens, LENGTHS).dtype == torch.float32
    assert reward.trunk.dtype == torch.bfloat16


def test_adapter_is_merged_on_save(
    tiny: Build, family: str, tokens: Tensor, shared_data: Path, tmp_path: Path
) -> None:
    reward = RewardModel(tiny(family), lora=LoraSettings(rank=2))
    for name, parameter in reward.trainable_named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    reward.save(tmp_path, load_tokenizer(shared_data / "stories260k"))
    again = RewardModel.load(tmp_path).scores(tokens, LENGTHS)
    assert (again - reward.scores(tokens, LENGTHS)).abs().max() < 1e-4


def test_what_trains(tiny: Build, family: str) -> None:
    reward = RewardModel(tiny(family), train_blocks=1)
    parts = decoder_parts(reward.trunk)
    expected = [*parts.blocks[3].parameters(), *parts.norm.parameters(), reward.head.weight]
    trained = {id(value) for _, value in reward.trainable_named_parameters()}
    assert trained == {id(value) for value in expected}


def test_classifier_with_one_label_is_a_reward_model(
    tiny: Build, tokens: Tensor, tmp_path: Path
) -> None:
    config = tiny("llama").config
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(tmp_path)
    scores = RewardModel.load(tmp_path).scores(tokens[:1], LENGTHS[:1])
    assert abs(scores - classifier(tokens[:1]).logits[0, 0]) < 1e-5


def test_language_model_is_no_reward_model(tiny: Build, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no reward model"):
        RewardModel.load(tmp_path)


def test_damaged_head(saved: tuple[RewardModel, Path]) -> None:
    (saved[1] / "reward_head.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="damaged safetensors file"):
        RewardModel.load(saved[1])


@pytest.mark.parametrize("text", ["", "{}", '{"mean": NaN, "std": 1}', '{"mean": "x", "std": 1}'])
def test_damaged_normalisation(saved: tuple[RewardModel, Path], text: str) -> None:
    path = saved[1] / "reward_model.json"
    assert json.loads(path.read_text()) == {"mean": 0.25, "std": 1.5}
    path.write_text(text)
    with pytest.raises(UserError, match="'mean'"):
        RewardModel.load(saved[1])


Batch = dict[str, Tensor]


def trained_reward(model: PreTrainedModel, blocks: int) -> RewardModel:
    """A reward model whose last blocks and final norm have moved away from `model`'s."""
    reward = RewardModel(model, train_blocks=blocks, seed=3)
    with torch.no_grad():
        for parameter in reward.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    reward.set_normalisation(0.7, 1.0)
    return reward.eval()


@pytest.mark.parametrize("reward_blocks", [1, 2])
def test_scores_over_the_policys_states_are_the_reward_models_own(
    tiny: Build, family: str, rows: Batch, reward_blocks: int
) -> None:
    policy = Policy(tiny(family), train_blocks=2)
    lengths = rows["prompt_lengths"] + rows["response_lengths"]
    expected = trained_reward(tiny(family), reward_blocks).scores(rows["tokens"], lengths)
    shared = trained_reward(tiny(family), reward_blocks)
    branch = share_frozen_trunk(shared, policy)
    assert branch is not None
    states = policy.trunk_states(rows["tokens"])
    found = scores_from_branch(shared, branch, states, lengths - 1)
    assert (found - expected).abs().max() < 2e-5
    # Token ids still go the whole way, through the policy's blocks.
    assert (shared.scores(rows["tokens"], lengths) - expected).abs().max() < 2e-5
    held = {id(p) for p in policy.parameters()}
    own = [p for p in shared.parameters() if id(p) not in held]
    parts = decoder_parts(tiny(family))
    above = sum(p.numel() for block in parts.blocks[2:] for p in block.parameters())
    above += sum(p.numel() for p in parts.norm.parameters()) + 32  # the head
    assert sum(p.numel() for p in own) == above


def test_what_is_not_the_same_is_not_shared(tiny: Build, family: str) -> None:
    def adopted(reward: RewardModel, blocks: int | None = 2) -> bool:
        before = [id(module) for module in reward.modules()]
        branch = share_frozen_trunk(reward, Policy(tiny(family), train_blocks=blocks))
        assert (branch is None) == (before == [id(module) for module in reward.modules()])
        return branch is not None

    assert adopted(trained_reward(tiny(family), 2))
    assert not adopted(trained_reward(tiny(family), 2), None), "nothing of the policy is frozen"
    assert not adopted(trained_reward(tiny(family), 2), 4), "no block of the policy is frozen"
    assert not adopted(trained_reward(tiny(family), 3)), "it trained a block of the policy's trunk"
    assert not adopted(trained_reward(tiny(family, seed=1), 2)), "another model"
    half = RewardModel(tiny(family).to(torch.bfloat16), train_blocks=2)
    assert not adopted(half), "another number format"
    other = trained_reward(tiny(family), 2)
    with torch.no_grad():
        decoder_parts(other.trunk).embedding.weight[5, 3] += 1e-6
    assert not adopted(other), "one number differs"
    wider = trained_reward(tiny(family, context=64), 2)
    assert not adopted(wider), "another config"


def test_a_classifiers_score_is_read_before_its_padding(
    tiny: Build, tokens: Tensor, tmp_path: Path
) -> None:
    """As transformers reads it: where texts end by the padding token, at the token before."""
    config = tiny("llama").config
    config.num_labels, config.pad_token_id = 1, 3
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    row = torch.cat([tokens[0, :7] % 3, torch.tensor([3, 3])])[None]
    padded = torch.cat([row, torch.full((1, 4), 1)], 1)
    with torch.no_grad():
        scores = RewardModel.load(tmp_path).scores(padded, torch.tensor([9]))
        assert abs(scores - classifier(row).logits[0, 0]) < 1e-5
        assert abs(scores - classifier(row[:, :7]).logits[0, 0]) < 1e-5
