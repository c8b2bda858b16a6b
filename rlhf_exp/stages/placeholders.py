"""Placeholder models: of the right shape, for a probe that needs models nobody has trained yet."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from rlhf_exp.config.experiment import Config
from rlhf_exp.models.pretrained import load_config, save_causal_lm
from rlhf_exp.models.reward_model import NORMALISATION_FILE, REWARD_HEAD_FILE, write_reward_head
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.setup import world_for
from rlhf_exp.stages.sft import base_model

_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "vocab*",
    "merges*",
)


def run(config: Config, context: StageContext) -> StageResult:
    """Return, as facts, the folder of each of `sft` and `reward` that `context.models` lacks.

    The SFT model is the base model: `model.path` as it is, or random weights written to
    `context.folder`. The reward model is the SFT model's trunk with a head of zeros.
    """
    with world_for(config) as world:
        folders = world.run_on_all(lambda: _make_missing(config, context) if world.is_main else {})
    return StageResult({}, facts=dict(folders[0]))


def _make_missing(config: Config, context: StageContext) -> dict[str, str]:
    folders: dict[str, str] = {}
    if "sft" not in context.models:
        folders["sft"] = str(_sft_model(config, context))
    if "reward" not in context.models:
        source = Path(folders.get("sft") or context.models["sft"])
        if not source.is_dir():
            source = _snapshot(str(source), None)
        folders["reward"] = str(_reward_model(source, context.folder / "reward"))
    return folders


def _sft_model(config: Config, context: StageContext) -> Path:
    path = context.models.get("base")
    if path is not None:
        return Path(path) if Path(path).is_dir() else _snapshot(path, config.model.revision)
    folder = context.folder / "sft"
    codec, model = base_model(config.model, context)
    save_causal_lm(model, codec.tokenizer, folder)
    return folder


def _snapshot(hub_id: str, revision: str | None) -> Path:
    """Return the local copy of a hub id, downloaded on first use."""
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_MODEL_FILES)))


def _reward_model(source: Path, folder: Path) -> Path:
    """Make a reward model from a causal language model's files, by links instead of copies."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in (REWARD_HEAD_FILE, NORMALISATION_FILE):
            (folder / file.name).symlink_to(file.resolve())
    width = load_config(source).hidden_size
    head = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        head.weight.zero_()
    write_reward_head(head, 0.0, 1.0, folder)
    return folder
