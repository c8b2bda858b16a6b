"""Causal language models and tokenizers: loading, building from scratch, and saving.

Models are read and written as Hugging Face folders; a head is a safetensors file beside the model's
own. Only safetensors are read: nothing that is downloaded gets unpickled.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import cached_file

import rlhf_exp.models.cpu_attention  # noqa: F401 - takes its place among transformers' own
from rlhf_exp.errors import UserError
from rlhf_exp.model_names import split_revision
from rlhf_exp.models.architecture import TYPES, Architecture
from rlhf_exp.models.frozen_trunk import TESTED_FAMILIES

transformers.logging.disable_progress_bar()  # a stage shows its own
# Rows are right-padded and read by their lengths, so the advice to pass a mask would mislead.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)

Attention = Literal["sdpa", "eager", "flash_attention_2"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SAFETENSORS, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
WEIGHTS, INDEX = f"model{SAFETENSORS}", f"model{INDEX_SUFFIX}"
ADAPTER_CONFIG = "adapter_config.json"
VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_FOLDER = "value_model"


def load_causal_lm(
    path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "sdpa",
    weights: bool = True,
) -> PreTrainedModel:
    """Load a causal language model with every dropout set to 0.

    Args:
        path: a folder, or a hub id, which may say its revision (`ORG/NAME@REVISION`).
        revision: branch, tag or commit of a hub id that says none.
        dtype: of the weights.
        attention: implementation; a family that has no `sdpa` (GPT-J) gets `eager`.
        weights: as for `load_pretrained`.

    Raises:
        UserError: there is no model at `path`, it has no safetensors, or lacks some weights.
    """
    config = load_config(path, revision)
    return load_pretrained(
        AutoModelForCausalLM, path, config, revision, dtype, attention, weights=weights
    )


def load_pretrained(
    auto_class: Any,  # noqa: ANN401 - one of transformers' auto classes
    path: str | Path,
    config: PreTrainedConfig,
    revision: str | None,
    dtype: torch.dtype,
    attention: Attention,
    keep_dropout: bool = False,
    weights: bool = True,
) -> PreTrainedModel:
    """Load a model by one of transformers' auto classes, with every dropout set to 0.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        path: a folder, or a hub id.
        config: the model's config; changed in place.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights.
        attention: as for `load_causal_lm`.
        keep_dropout: leave the model as its config describes it.
        weights: whether to load the weights. Without them parameters are on torch's meta device,
            to be taken from another process. A family that the tests do not cover is loaded all
            the same: it is measured before it trains.

    Raises:
        UserError: as for `load_causal_lm`.
    """
    refuse_other_files(path, config, revision)
    if not weights and config.model_type in TESTED_FAMILIES:
        return _without_weights(auto_class, without_dropout(config), dtype, attention)
    path, revision = split_revision(path, revision)
    try:
        model, report = auto_class.from_pretrained(
            path,
            revision=revision or "main",
            trust_remote_code=False,
            config=config if keep_dropout else without_dropout(config),
            dtype=dtype,
            attn_implementation=supported_attention(config, attention, auto_class),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(_load_error(path, error)) from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{path}: {len(missing)} weights of a {type(model).__name__} are not in its "
            f"safetensors files (first: {missing[0]}); give a complete model"
        )
    return train_padding_embedding(model)


def _without_weights(
    auto_class: Any,  # noqa: ANN401 - one of transformers' auto classes
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: Attention,
) -> PreTrainedModel:
    """Return the model of a config with parameters on the meta device, and buffers as computed."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:  # noqa: ANN401
        if parameter.is_meta:  # tied to one that is already there
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        with torch.random.fork_rng(devices=[]):
            model = auto_class.from_config(
                config,
                dtype=dtype,
                attn_implementation=supported_attention(config, attention, auto_class),
            )
    finally:
        hook.remove()
    return train_padding_embedding(model.eval())


def load_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's config without its weights.

    Raises:
        UserError: there is no model at `path`.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the model that the adapter names, and put the adapter into it.
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: the model is an adapter over another one; merge them "
            "(PEFT's merge_and_unload), save the result with save_pretrained, and give that folder"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{path}: the folder has no config.json, so it is no model; give a folder "
            "written by save_pretrained (config.json and *.safetensors)"
        )
    if not folder.is_dir() and (folder.is_absolute() or str(path).startswith((".", "~"))):
        raise UserError(f"{path}: no such folder; give a model's folder, or a hub id")
    path, revision = split_revision(path, revision)
    try:
        return AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(_load_error(path, error)) from error


def refuse_other_files(
    path: str | Path, config: PreTrainedConfig, revision: str | None = None
) -> None:
    """Raise if loading a model would read anything but safetensors of its own folder.

    transformers follows the names that it finds in the config and in an index, and what is no
    safetensors file it unpickles.

    Raises:
        UserError: names the file, what it names, and the remedy.
    """
    named = getattr(config, "transformers_weights", None)
    if named is not None and not _is_own_file(named, SAFETENSORS, INDEX_SUFFIX):
        raise UserError(
            f"{path}: transformers_weights in its config.json names {named!r}, which is no "
            "safetensors file of the model's own folder; only such files are read"
        )
    if named is None and _optional_file(path, WEIGHTS, revision) is not None:
        return  # an index beside it is not read
    name = named if named is not None and named.endswith(INDEX_SUFFIX) else INDEX
    index = _optional_file(path, name, revision)
    if index is not None:
        shard_names(index)


def shard_names(index: Path) -> list[str]:
    """Return the names of the safetensors files that an index of weights names, sorted.

    Raises:
        UserError: it is damaged, or names anything else than such files beside it.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error!r}); copy the model again") from error
    others = [name for name in names if not _is_own_file(name, SAFETENSORS)]
    if others:
        raise UserError(
            f"{index}: names {min(map(str, others))!r}, which is no safetensors file of the "
            "model's own folder; only such files are read, for pickled ones can run programs. "
            "Save the model with save_pretrained(safe_serialization=True)"
        )
    return sorted(names)


def _is_own_file(name: object, *suffixes: str) -> bool:
    """Whether a name is that of a file in the folder itself or below it, with such an ending."""
    if not isinstance(name, str) or not name.endswith(suffixes) or "\\" in name:
        return False
    parts = PurePosixPath(name)
    return not parts.is_absolute() and ".." not in parts.parts


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a hub id.

    Raises:
        UserError: there is none at `path`.
    """
    # transformers makes up an empty tokenizer for a folder that has none.
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path}: no tokenizer in the folder (none of {', '.join(TOKENIZER_FILES)}); save one "
            "there with tokenizer.save_pretrained"
        )
    path, revision = split_revision(path, revision)
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(
            f"{path}: no tokenizer can be loaded from there ({_first_line(error)}); a model folder "
            "needs a tokenizer.json and tokenizer_config.json"
        ) from error


def end_token_ids(path: str | Path, revision: str | None = None) -> list[int]:
    """Return the tokens that end a text by a model's `config.json` and `generation_config.json`.

    Chat models list several there, of which the tokenizer's end-of-sequence token is one.

    Raises:
        UserError: a file is damaged.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        file = _optional_file(path, name, revision)
        if file is None:
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); copy the model again") from error
        text = content.get("text_config") if isinstance(content, dict) else None
        for section in (content, text):
            value = section.get("eos_token_id") if isinstance(section, dict) else None
            values = value if isinstance(value, list) else [value]
            found.update(number for number in values if type(number) is int and number >= 0)
    return sorted(found)


def end_texts_at(model: PreTrainedModel, taught: int, ends: Iterable[int]) -> None:
    """Let `model.generate` end at the token that SFT teaches, unless it does so anyway.

    Args:
        model: its generation config is changed, and saved with it.
        taught: the token that ends each response in training.
        ends: all tokens that end a response, `taught` among them.
    """
    config = model.generation_config
    assert config is not None, "a causal language model generates"
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if taught not in known:
        config.eos_token_id = sorted(ends)


def _optional_file(path: str | Path, name: str, revision: str | None) -> Path | None:
    """Return a file of a folder or hub id; `None` if there is none."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    path, revision = split_revision(path, revision)
    found = cached_file(
        path,
        name,
        revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def build_causal_lm(
    architecture: Architecture,
    seed: int,
    eos_id: int | None = None,
    pad_id: int | None = None,
    bos_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "sdpa",
) -> PreTrainedModel:
    """Build a model with random weights, a function of `seed`.

    The state of torch's global generator is not changed.
    """
    config = config_of(architecture, eos_id=eos_id, pad_id=pad_id, bos_id=bos_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=supported_attention(config, attention)
        )
    return train_padding_embedding(model)


def meta_model(architecture: Architecture) -> PreTrainedModel:
    """Return a model of this shape without weights, on torch's meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(architecture))


def config_of(
    architecture: Architecture,
    eos_id: int | None = None,
    pad_id: int | None = None,
    bos_id: int | None = None,
) -> PreTrainedConfig:
    """Return transformers' config of a model of this shape, without dropout."""
    shape = architecture
    if shape.type not in TYPES:
        raise UserError(
            f"model.architecture.type={shape.type!r}: expected one of {', '.join(TYPES)}"
        )
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
        # "Small init" (Nguyen and Salazar 2019): the libraries' 0.02 suits widths near 1000, and
        # costs a narrow model a fifth of its training before it begins to learn.
        "initializer_range": math.sqrt(2.0 / (5.0 * shape.width)),
    }
    if shape.type in ("gpt2", "gptj"):
        fields["n_inner"] = shape.ffn_width
    else:
        fields["intermediate_size"] = shape.ffn_width
    if shape.type == "gptj":
        fields["rotary_dim"] = min(64, shape.width_per_head)
    if shape.type in ("llama", "qwen2", "qwen3"):
        fields["num_key_value_heads"] = shape.key_value_heads
    if shape.type in ("llama", "qwen3"):
        fields["head_dim"] = shape.width_per_head
    return without_dropout(AutoConfig.for_model(shape.type, **fields))


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the shape of the model that a config describes."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Architecture(
        type=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        ffn_width=inner or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        kv_heads=getattr(config, "num_key_value_heads", None),
        tied=bool(config.tie_word_embeddings),
        head_width=getattr(config, "head_dim", None),
    )


SCALED_BY_LENGTH = ("longrope", "dynamic")
"""Rotary embeddings that beyond their original length turn every position by another angle: keys
that are cached by then would be wrong, and so would shorter rows in a batch with a longer one."""


def context_of(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence that a model's positions allow; `None` if nothing limits it."""
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    # Some families have parameters of their own for each type of layer.
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in SCALED_BY_LENGTH:
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def supported_attention(
    config: PreTrainedConfig,
    attention: Attention,
    auto_class: Any = AutoModelForCausalLM,  # noqa: ANN401 - one of transformers' auto classes
) -> str:
    """Return `attention`, or `eager` where the model has no scaled-dot-product attention.

    Args:
        config: the model's config.
        attention: the implementation asked for.
        auto_class: the auto class that loads the model: an encoder is no causal language model.
    """
    model_class: Any = auto_class._model_mapping.get(type(config), None)
    if isinstance(model_class, tuple):  # some families have a class for each variant
        model_class = model_class[0]
    if attention == "sdpa" and model_class is not None and not model_class._supports_sdpa:
        return "eager"
    return attention


def is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether the model of a config reads in both directions, as BERT does."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return masked and not getattr(config, "is_decoder", False)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file, from its header.

    Raises:
        UserError: the file is missing, damaged or cut off.
    """
    try:
        with safe_open(path, "numpy") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the whole model") from error
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged safetensors file ({error}); copy the model again"
        ) from error


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout in `config` to 0: PPO compares log-probabilities of two forward passes."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and is_noise(name):
            setattr(config, name, 0.0)
    return config


def is_noise(name: str) -> bool:
    """Return whether a number of this name is the strength of a noise in train mode."""
    return any(part in name for part in ("drop", "jitter"))


def train_padding_embedding(model: PreTrainedModel) -> PreTrainedModel:
    """Give the padding token's embedding gradients, which some families withhold.

    Where padding and end-of-sequence are one token, a token with a meaning would stay untrained.
    """
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    return model


def _load_error(path: str | Path, error: BaseException) -> str:
    """Return the message for a model that cannot be loaded."""
    return (
        f"{path}: no model can be loaded from there ({_first_line(error)}); give a folder with "
        "config.json and *.safetensors, or a hub id"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def save_policy(
    model: PreTrainedModel,
    value_head: nn.Module | None,
    value_trunk: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
) -> None:
    """Write `model` as a Hugging Face folder, and the value head (and its model) beside it.

    Args:
        model: causal language model without an adapter.
        value_head: written to `value_head.safetensors`.
        value_trunk: written to the folder `value_model`.
        tokenizer: written with the model.
        folder: created if it does not exist.
    """
    save_causal_lm(model, tokenizer, folder)
    if value_head is not None:
        save_head(value_head, Path(folder) / VALUE_HEAD_FILE)
    if value_trunk is not None:
        write_model(value_trunk, Path(folder) / VALUE_MODEL_FOLDER)


def save_causal_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer."""
    write_model(model, folder)
    tokenizer.save_pretrained(folder)


def write_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write config and safetensors of a model without a distributed wrapper."""
    with _hidden_deepspeed():
        model.save_pretrained(folder)


@contextmanager
def _hidden_deepspeed() -> Iterator[None]:
    """Make DeepSpeed look as if it were not installed, unless it is imported already.

    `save_pretrained` unwraps modules by accelerate, which imports an installed DeepSpeed to
    recognise its engine. That takes 0.25 s to 2.5 s, and without DeepSpeed imported there cannot be
    an engine. `None` in `sys.modules` makes an import fail.
    """
    if "deepspeed" in sys.modules:
        yield
        return
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["deepspeed"]


def half_on_host(model: PreTrainedModel) -> bool:
    """Return whether the model's weights are in half precision, on a CPU."""
    return model.device.type == "cpu" and model.dtype.itemsize == 2


def with_state_dict(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """Return a model of the same class and config that holds the tensors in `state`."""
    with torch.device("meta"):
        copied = type(model)(copy.deepcopy(model.config))
    copied.load_state_dict(state, assign=True, strict=True)
    if getattr(model, "generation_config", None) is not None:
        copied.generation_config = model.generation_config
    return copied


def save_head(head: nn.Module, path: Path) -> None:
    """Write a head's parameters to a safetensors file."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()},
        path,
    )


def load_head(head: nn.Module, path: Path) -> None:
    """Load a head's parameters from a safetensors file.

    Raises:
        UserError: the file is missing, damaged, or of a head with another shape.
    """
    try:
        head.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not the head that is expected there ({error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
