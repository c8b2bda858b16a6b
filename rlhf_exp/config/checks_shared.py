"""Rules for `model`.

Rules for a user's function, given as `file.py:name`.

Rules for a service behind an address.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_exp.config.experiment import Family, ModelConfig
from rlhf_exp.config.problems import ConfigChecker

# A byte-level vocabulary: 256 bytes, end of text, padding.
_SMALLEST_VOCABULARY = 258
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")


def local_folder(path: str | None) -> Path | None:
    """Return the absolute folder that a model path means; None for a hub id.

    A path is a folder if there is one of that name, or if it cannot be a hub id.
    """
    if path is None:
        return None
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    return folder.resolve() if looks_local or folder.is_dir() else None


def _real_config(model: ModelConfig) -> dict[str, Any]:
    folder = local_folder(model.path)
    if folder is None:
        return {}
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _size(model: ModelConfig, names: tuple[str, ...], otherwise: int) -> int | None:
    if local_folder(model.path) is None:
        return otherwise
    real = _real_config(model)
    return next((real[name] for name in names if isinstance(real.get(name), int)), None)


def layer_count(model: ModelConfig) -> int | None:
    """Return the number of blocks: a local folder's own, else the architecture's."""
    return _size(model, _LAYERS, model.architecture.layers)


def context_length(model: ModelConfig) -> int | None:
    """Return the longest sequence in tokens: a local folder's own, else the architecture's."""
    return _size(model, _CONTEXT, model.architecture.context)


def model_family(model: ModelConfig) -> str | None:
    """Return the family as transformers names it: a local folder's own, else the architecture's."""
    if local_folder(model.path) is None:
        return model.architecture.type.value
    family = _real_config(model).get("model_type")
    return family if isinstance(family, str) else None


def check_model(check: ConfigChecker) -> None:
    """Report what is wrong with `model`."""
    model = check.config.model
    sizes = ("layers", "width", "heads", "kv_heads", "ffn_width", "vocabulary", "context")
    check.at_least(1, *(f"model.architecture.{size}" for size in sizes))
    check.at_least(0, "model.seed")
    if model.path is None:
        _check_scratch(check)
        check.require(
            model.revision is None, "model.revision", "a model from scratch has no revision."
        )
    folder = local_folder(model.path)
    if folder is not None and not folder.is_dir():
        check.add("model.path", f"there is no folder {folder}.")
    elif folder is not None and not (folder / "config.json").is_file():
        check.add("model.path", f"{folder} holds no model: it has no config.json.")
    elif folder is not None and model.revision is not None:
        check.add("model.revision", "a folder has no revision; a hub id has.")


def _check_scratch(check: ConfigChecker) -> None:
    shape = check.config.model.architecture
    heads, kv_heads = shape.heads, shape.kv_heads
    if heads >= 1 and shape.width % heads:
        check.add("model.architecture.width", f"must divide by the {heads} heads.")
    elif heads >= 1 and (shape.width // heads) % 2:
        check.add("model.architecture.width", f"needs an even share for each of {heads} heads.")
    grouped = shape.type in (Family.llama, Family.qwen2)
    if kv_heads is not None and kv_heads != heads:
        if not grouped:
            check.add("model.architecture.kv_heads", f"{shape.type.name} has none; use null.")
        elif kv_heads >= 1 and heads % kv_heads:
            check.add("model.architecture.kv_heads", f"must divide the {heads} heads.")
    check.require(
        shape.vocabulary >= _SMALLEST_VOCABULARY,
        "model.architecture.vocabulary",
        f"must be at least {_SMALLEST_VOCABULARY}: all bytes, end of text and padding.",
    )


def check_function(check: ConfigChecker, key: str) -> None:
    """Report a file or a function in it that is not there; nothing is run.

    Args:
        check: Collects the problems.
        key: The config key that names the function.
    """
    file, colon, name = check.value(key).rpartition(":")
    if not colon or not file or not name.isidentifier():
        check.add(key, "expected a file and a function in it: my_reward.py:score.")
        return
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        check.add(key, f"there is no file {path}.")
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        check.add(key, f"{path} is not valid Python: {error}.")
        return
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name not in names:
        listed = f"its functions are {', '.join(names)}" if names else "it has no function"
        check.add(key, f"{path} has no function {name}; {listed}.")


def check_address(check: ConfigChecker, section: str, example: str) -> None:
    """Report an address or a key that cannot be used; nobody is asked.

    Args:
        check: Collects the problems.
        section: Has the fields `url` and `key_env`.
        example: A valid address.
    """
    key = f"{section}.url"
    try:
        url = urlsplit(check.value(key) or "")
        whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        check.add(key, f"needs an address such as {example}.")
        return
    check.require(whole, key, f"needs an address such as {example}.")
    if url.username or url.password:
        check.add(key, f"must not hold a password; see {section}.key_env.")
    name = check.value(f"{section}.key_env")
    if name is not None and not os.environ.get(name) and not check.config.plan:
        message = "no such environment variable is set, or it is empty."
        check.add(f"{section}.key_env", message)
