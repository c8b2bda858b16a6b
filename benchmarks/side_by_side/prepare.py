"""Write the models and prompts that both sides load.

usage: python -m side_by_side.prepare SETTING_AS_JSON        (run by `benchmarks/ppo.py`)

Policy, reward and value model are GPT-NeoX of one shape with random weights. The value model is the
policy's trunk with a small head, for a peer whose value function is a model of its own.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

from side_by_side.setting import Setting


def model_config(setting: Setting) -> GPTNeoXConfig:
    """Return the configuration of every model of this setting."""
    shape = setting.shape
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        # A token closes what a reward model reads, and one position is left after it.
        max_position_embeddings=setting.prompt_tokens + setting.response_tokens + 2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    config.num_labels = 1
    return config


@torch.no_grad()
def give_direction(policy: GPTNeoXForCausalLM, vocabulary: int) -> None:
    """Let the tokens that `reward.counted_share` counts share a direction in the head.

    A trained head has such directions for kinds of tokens. In a random one each token has to be
    learned on its own, and a comparison of learners would take thousands of iterations.
    """
    head = policy.get_output_embeddings().weight  # [V, D]
    head[: vocabulary // 4] += 3.0 * head.std() * torch.randn(head.shape[1])


def prepare(setting: Setting) -> None:
    """Write `policy/`, `reward/`, `value/` and `prompts.npy` ([N, P] int64) into the folder."""
    torch.manual_seed(setting.seed)
    config = model_config(setting)
    policy = GPTNeoXForCausalLM(config)
    if setting.counted_reward:
        give_direction(policy, setting.shape.vocabulary)
    policy.save_pretrained(setting.path("policy"))
    reward = GPTNeoXForSequenceClassification(config)
    if setting.reward_blocks is not None:
        below = setting.shape.layers - setting.reward_blocks
        reward.gpt_neox.embed_in.load_state_dict(policy.gpt_neox.embed_in.state_dict())
        for own, same in zip(reward.gpt_neox.layers[:below], policy.gpt_neox.layers, strict=False):
            own.load_state_dict(same.state_dict())
    reward.save_pretrained(setting.path("reward"))
    value = GPTNeoXForSequenceClassification(config)
    value.gpt_neox.load_state_dict(policy.gpt_neox.state_dict())
    torch.nn.init.normal_(value.score.weight, std=0.01)
    value.save_pretrained(setting.path("value"))
    noise = np.random.default_rng(setting.seed)
    size = (setting.prompts, setting.prompt_tokens)
    np.save(setting.path("prompts.npy"), noise.integers(0, setting.shape.vocabulary, size))


if __name__ == "__main__":
    prepare(Setting.from_json(sys.argv[1]))
