"""Weights in PyTorch's pickled files (`.bin`, `.pt`): read as tensors alone, kept as safetensors.

A pickle can run programs. These files are read by torch's restricted unpickler
(`weights_only=True`), which knows tensors and nothing that runs, and what holds anything but named
tensors is refused. They are read once: `convert_model` writes a folder of safetensors, which
everything else reads.

Published reward models have a format of their own (`convert_reward`): a causal language model's
trunk under `transformer.`, and a head without bias, `v_head.weight`, whose output at the text's
end-of-sequence token is the score. Such a repository may have neither config nor tokenizer.

D width.
"""

from __future__ import annotations

import pickle
import shutil
from fnmatch import fnmatch
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from rlhf_exp.errors import UserError
from rlhf_exp.model_names import SHARDS, pickled_weight_names
from rlhf_exp.models.pretrained import (
    TOKENIZER_FILES,
    is_encoder,
    load_config,
    load_tokenizer,
)
from rlhf_exp.models.reward_model import write_reward_head

COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
HEAD, TRUNK = "v_head.weight", "transformer."
BUFFERS = (
    *(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),
    *(".rotary_emb.inv_freq", ".embed_positions"),
)
"""Endings of tensors that older versions of transformers saved and newer ones compute: causal masks
and positions."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the named tensors of a pickled file, mapped from the disk where it allows that.

    Raises:
        UserError: it is damaged, or holds anything but named tensors.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: holds more than tensors, or is damaged, and was not unpickled "
            f"({_reason(error)}). Save the weights alone: torch.save(model.state_dict(), FILE), or "
            "model.save_pretrained(FOLDER), which writes safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged ({_reason(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{file}: {str(name)[:60]!r} is a {type(value).__name__}, and only tensors are "
                "read; save the weights alone: torch.save(model.state_dict(), FILE)"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise UserError(f"{file}: {name!r} is no plain tensor; save the weights as such")
    return content


def convert_model(folder: Path, target: Path) -> None:
    """Write a folder like `folder`, with safetensors of the same names for its pickled weights.

    Args:
        folder: A model with its config, or one whose trunk and head are named as `convert_reward`
            knows them.
        target: An empty folder.

    Raises:
        UserError: The weights cannot be read as tensors alone.
    """
    state = _weights(folder)
    for path in sorted(folder.iterdir()):
        copied = any(fnmatch(path.name, pattern) for pattern in COPIED)
        if copied and not path.name.endswith(".bin.index.json"):
            shutil.copyfile(path, target / path.name)
    save_torch_state_dict(_apart(state), target)


def convert_reward(folder: Path, trunk: str | None, target: Path) -> None:
    """Write a reward model in this project's format, from one with pickled weights.

    A sequence classifier stays one, with safetensors. The published format becomes a trunk with a
    head beside it.

    Args:
        folder: The reward model.
        trunk: Hub id or folder of the model whose config and tokenizer the trunk has; `None`: those
            in `folder`.
        target: An empty folder.

    Raises:
        UserError: The weights cannot be read, are no reward model's, or do not fit the trunk.
    """
    state = _weights(folder)
    if HEAD not in state:
        convert_model(folder, target)
        return
    has_config = (folder / "config.json").is_file()
    source = str(folder) if has_config and trunk is None else trunk
    if source is None:
        raise UserError(
            f"{folder}: a reward model without a config.json; say which model its trunk is, by hub "
            "id or folder: reward.trunk=EleutherAI/gpt-j-6b"
        )
    config = load_config(source)
    if is_encoder(config):
        raise UserError(f"{source}: a {config.model_type} is no decoder, as a reward's trunk is")
    weights = _trunk_of(folder, state, config, source)
    head = nn.Linear(config.hidden_size, 1, bias=False)
    if state[HEAD].shape != head.weight.shape:
        raise UserError(
            f"{folder}: {HEAD} has the shape {tuple(state[HEAD].shape)}, and a head over {source} "
            f"{tuple(head.weight.shape)}"
        )
    with torch.no_grad():
        head.weight.copy_(state[HEAD])
    with torch.device("meta"):
        config.architectures = [type(AutoModel.from_config(config)).__name__]
    config.save_pretrained(target)
    save_torch_state_dict(_apart(weights), target)
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    load_tokenizer(folder if own else source).save_pretrained(target)
    write_reward_head(head, 0.0, 1.0, target)


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return a folder's tensors by name."""
    names = pickled_weight_names(path.name for path in folder.iterdir())
    shards = all(fnmatch(name, SHARDS) for name in names)
    if len(names) > 1 and not shards:
        raise UserError(
            f"{folder}: several files may hold the weights ({', '.join(names)}); leave one of them"
        )
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_tensors(folder / name)
    return state


def _trunk_of(
    folder: Path, state: dict[str, Tensor], config: PreTrainedConfig, source: str
) -> dict[str, Tensor]:
    """Return the trunk's tensors as transformers names them, all of them and no others."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefixes = (TRUNK, f"{model.base_model_prefix}.")
    found = {
        name.removeprefix(prefix): value
        for prefix in prefixes
        for name, value in state.items()
        if name.startswith(prefix)
    }
    found = {
        name: value
        for name, value in found.items()
        if name in expected or not f".{name}".endswith(BUFFERS)
    }
    missing = sorted(expected.keys() - found.keys())
    outside = {n for n in state if n != HEAD and not n.startswith(prefixes)}
    further = sorted((found.keys() - expected.keys()) | outside)
    for what, names in (("lacks", missing), ("also has", further)):
        if names:
            raise UserError(
                f"{folder}: its trunk is not that of {source} (a {config.model_type}): it {what} "
                f"{len(names)} weights, the first {names[0]!r}; give its own with reward.trunk"
            )
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{folder}: {name} has the shape {tuple(found[name].shape)}, and {shape} in "
                f"{source}; give the trunk's own model with reward.trunk"
            )
    return found


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, as safetensors needs them."""
    seen: set[int] = set()
    apart = {}
    for name, value in state.items():
        tensor = value.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unsupported = [line for line in lines if line.startswith("WeightsUnpickler error")]
    return (unsupported or lines or [type(error).__name__])[0]
