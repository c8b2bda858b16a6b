"""Small reward models in the formats that are published, written by torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from rlhf_exp.data.tokenizer import train_tokenizer

WIDTH, VOCABULARY = 16, 300
END = 0
"""The end-of-sequence token of the tests' rows."""


def write_trunk(folder: Path, layers: int = 2) -> Path:
    """Write a GPT-J language model with its tokenizer, as the published trunk's model is."""
    sizes = {"n_embd": WIDTH, "n_layer": layers, "n_head": 2, "n_positions": 256, "rotary_dim": 4}
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, **sizes))
    model.save_pretrained(folder)
    train_tokenizer(["ab ab ac"], 258).save_pretrained(folder)
    return folder


def write_published(folder: Path, trunk: Path, name: str = "hf_ckpt.pt") -> Path:
    """Write half-precision weights of another trunk with a head, and nothing else."""
    torch.manual_seed(1)
    model = GPTJForCausalLM(GPTJForCausalLM.from_pretrained(trunk).config)
    state = {f"transformer.{key}": value for key, value in model.transformer.state_dict().items()}
    for block in range(len(model.transformer.h)):
        # Versions of that time saved the masks, too.
        state[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
        state[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e9)
    state["v_head.weight"] = torch.randn(1, WIDTH)
    folder.mkdir()
    torch.save({key: value.half() for key, value in state.items()}, folder / name)
    return folder


class PublishedReward(nn.Module):
    """The published model by torch and transformers: score of the first end token's state."""

    def __init__(self, folder: Path, trunk: Path) -> None:
        super().__init__()
        self.transformer = AutoModelForCausalLM.from_pretrained(trunk).transformer
        self.v_head = nn.Linear(WIDTH, 1, bias=False)
        (file,) = folder.glob("*.pt")
        state = torch.load(file, weights_only=True)
        # Strict but for the masks, which this version of the library computes.
        missing, further = self.load_state_dict(state, strict=False)
        assert not missing
        assert all(".attn." in key for key in further)
        self.eval()

    @torch.no_grad()
    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores of rows of tokens [N], each ended here and padded by that token."""
        width = max(map(len, rows)) + 1
        tokens = torch.tensor([[*row, *[END] * (width - len(row))] for row in rows])
        scores = self.v_head(self.transformer(tokens)[0]).squeeze(-1)
        ends = (tokens == END).float().argmax(1)
        return scores.gather(1, ends[:, None])[:, 0]
