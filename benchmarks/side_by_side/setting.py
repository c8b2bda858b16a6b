"""What both sides of a comparison are told: one experiment, in plain numbers.

Nothing heavy is imported: the harness, which never trains, reads this too. The setting travels to
the workers as JSON, and the models and prompts as files in `Setting.folder`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """The shape of the GPT-NeoX that policy, value and reward model share.

    Attributes:
        layers: number of blocks.
        width: hidden width.
        heads: attention heads a block.
        vocabulary: rows of the embedding and of the untied head.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(layers=4, width=128, heads=4, vocabulary=2048),  # 1.3 M parameters
    "30m": Shape(layers=12, width=384, heads=6, vocabulary=12288),  # 30.7 M parameters
}
TRAINED_BLOCKS = {"all": None, "top2": 2}


@dataclass(frozen=True)
class Setting:
    """One experiment, the same for both sides.

    Both sides get no weight decay, no clipping of the gradient's norm (TRL's PPO trainer clips
    none), a constant learning rate, a fixed KL coefficient and unscaled scores.

    Attributes:
        folder: where `prepare` put the models and the prompts.
        model: a name in `SHAPES`.
        train: a name in `TRAINED_BLOCKS`.
        rollouts: responses per iteration.
        prompt_tokens: length of every prompt.
        response_tokens: length of every response; no token ends one early.
        epochs: passes over an iteration's rollouts.
        minibatches: optimizer steps per pass.
        prompts: size of the set of prompts.
        lr: learning rate of AdamW.
        beta2: AdamW's second decay rate.
        kl_coef: penalty per nat.
        clip_range: of the probability ratio and of the values.
        vf_coef: weight of the value loss.
        gamma: discount per token.
        lam: lambda of generalised advantage estimation.
        seed: of models, prompts and sampling.
        counted_reward: whether the score is `reward.counted_share` and not the reward model's.
        own_values: whether our value function has weights of its own, as the peer's has; else its
            head reads the policy's states.
        reward_blocks: how many blocks of the reward model are its own, as if it had been trained
            from the policy in its top blocks; `None`: all.
        precision: of our side's matrix products.
    """

    folder: str
    model: str = "tiny"
    train: str = "all"
    rollouts: int = 64
    prompt_tokens: int = 80
    response_tokens: int = 40
    epochs: int = 4
    minibatches: int = 4
    prompts: int = 256
    lr: float = 1e-4
    beta2: float = 0.95
    kl_coef: float = 0.05
    clip_range: float = 0.2
    vf_coef: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    seed: int = 0
    counted_reward: bool = False
    own_values: bool = False
    reward_blocks: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def shape(self) -> Shape:
        """The models' shape."""
        return SHAPES[self.model]

    @property
    def trained_blocks(self) -> int | None:
        """How many of the last blocks train; `None` for every parameter."""
        return TRAINED_BLOCKS[self.train]

    @property
    def unused_token(self) -> int:
        """A token id past the vocabulary: as padding and end of sequence it is never sampled."""
        return self.shape.vocabulary

    def path(self, name: str) -> Path:
        """Return the file or folder of one of `prepare`'s products."""
        return Path(self.folder) / name

    def to_json(self) -> str:
        """Return the setting as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))
