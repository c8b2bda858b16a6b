"""Checks that several sections need: the model, a user's function, the address of a service.

The model's shape comes from `config.json` where `model.path` is a local folder, else from
`model.architecture`.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_exp.config.experiment import Family, ModelConfig
from rlhf_exp.config.problems import ConfigChecker
from rlhf_exp.config.schema_keys import all_keys
from rlhf_exp.function_source import function_module, function_source, takes_rows
from rlhf_exp.redaction import note_secret_variable, without_secrets

# 256 bytes, end of text and padding; imported from nowhere, so that checks need no tokenizer.
_SMALLEST_VOCABULARY = 258
# A field of a request, `NAME:JSON`, whose name says that it is a key; but not `max_tokens`.
_KEY_FIELD = re.compile(
    r"\W*[\w-]*(api[_-]?key|secret|passw\w*|authorization|access[_-]?token)\W*:", re.I
)
# Names of the same sizes in the configs of different families.
_LAYER_COUNT_NAMES = ("num_hidden_layers", "n_layer", "num_layers")
_CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "n_ctx")


def check_model(check: ConfigChecker) -> None:
    """Report the problems of `model`."""
    model = check.config.model
    sizes = ("layers", "width", "heads", "kv_heads", "ffn_width", "vocabulary", "context")
    check.at_least(1, *(f"model.architecture.{size}" for size in sizes))
    check.at_least(0, "model.seed")
    if model.path is None:
        _check_architecture(check)
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


def _check_architecture(check: ConfigChecker) -> None:
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


def local_folder(path: str | None) -> Path | None:
    """Return the absolute folder of a local model path; None for a hub id or None.

    A path is local if there is such a folder, or if it cannot be a hub id.
    """
    if path is None:
        return None
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    return folder.resolve() if looks_local or folder.is_dir() else None


def layer_count(model: ModelConfig) -> int | None:
    """Return the number of blocks: a local folder's own, else the architecture's."""
    return _model_size(model, _LAYER_COUNT_NAMES, model.architecture.layers)


def context_length(model: ModelConfig) -> int | None:
    """Return the longest sequence in tokens: a local folder's own, else the architecture's."""
    return _model_size(model, _CONTEXT_LENGTH_NAMES, model.architecture.context)


def head_width(model: ModelConfig) -> int | None:
    """Return the width of an attention head: a local folder's own, else the architecture's."""
    shape = model.architecture
    own = _model_size(model, ("head_dim",), 0)
    if own:
        return own
    width = _model_size(model, ("hidden_size", "n_embd"), shape.width)
    heads = _model_size(model, ("num_attention_heads", "n_head"), shape.heads)
    return width // heads if width and heads else None


def model_family(model: ModelConfig) -> str | None:
    """Return the family as transformers names it: a local folder's own, else the architecture's."""
    if local_folder(model.path) is None:
        return model.architecture.type.value
    family = _local_model_config(model).get("model_type")
    return family if isinstance(family, str) else None


def _model_size(model: ModelConfig, names: tuple[str, ...], default: int) -> int | None:
    if local_folder(model.path) is None:
        return default
    config = _local_model_config(model)
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _local_model_config(model: ModelConfig) -> dict[str, Any]:
    folder = local_folder(model.path)
    if folder is None:
        return {}
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_function(check: ConfigChecker, key: str) -> None:
    """Report a missing file, or a function that is not in it; the file is parsed, not run.

    Args:
        check: The config, and the problems found in it.
        key: The config key that names the function.
    """
    reference = check.value(key)
    file, colon, name = reference.rpartition(":")
    if not colon or not file or not name.isidentifier():
        message = (
            "expected a function of a file or module: my_reward.py:score, package.module:score."
        )
        check.add(key, message)
        return
    path = function_source(reference)[0].resolve()
    if not path.is_file():
        module = function_module(reference)
        missing = f"file {path}" if module is None else f"module {module} here, nor installed"
        check.add(key, f"there is no {missing}.")
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        check.add(key, f"{path} is not valid Python: {error}.")
        return
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name not in names:
        available = f"its functions are {', '.join(names)}" if names else "it has no function"
        check.add(key, f"{path} has no function {name}; {available}.")


# Not one text, which would make the module a part of whatever imports this one.
_MATH = ["rlhf_exp", "rewards", "math_answer"]


def check_reward_function(check: ConfigChecker, key: str) -> None:
    """Report what `check_function` does, and a function that takes other arguments.

    Args:
        check: The config, and the problems found in it.
        key: The config key that names the function.
    """
    before = len(check.problems)
    check_function(check, key)
    module = function_module(check.value(key)) or ""
    if module.split(".") == _MATH and find_spec("math_verify") is None:
        check.add(key, "needs math-verify; run `pip install math-verify` (extra `math`).")
    if len(check.problems) > before:
        return
    path, name = function_source(check.value(key))
    tree = ast.parse(path.read_bytes())
    # The last one of a name counts; what a decorator makes of it is known only when it is loaded.
    *_, node = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    if node.decorator_list:
        return
    try:
        takes_rows(_signature(node))
    except TypeError as error:
        check.add(key, f"{error}; see docs/how-to/rewards.md.")


def _signature(node: ast.FunctionDef) -> Signature:
    """Return the signature of a function's source: names, kinds and which have a default."""
    found, given = [], node.args
    first_default = len(given.posonlyargs) + len(given.args) - len(given.defaults)
    for number, item in enumerate([*given.posonlyargs, *given.args]):
        kind = Parameter.POSITIONAL_OR_KEYWORD
        default = Parameter.empty if number < first_default else None
        found.append(Parameter(item.arg, kind, default=default))
    if given.vararg is not None:
        found.append(Parameter(given.vararg.arg, Parameter.VAR_POSITIONAL))
    for item, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = Parameter.empty if value is None else None
        found.append(Parameter(item.arg, Parameter.KEYWORD_ONLY, default=default))
    if given.kwarg is not None:
        found.append(Parameter(given.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def check_secrets(check: ConfigChecker) -> None:
    """Report values that hold a password or a key: configs are stored with every result."""
    for key in all_keys():
        value = check.value(key)
        section, _, name = key.rpartition(".")
        texts = [
            text
            for text in (_elements(value) if isinstance(value, list | tuple) else [value])
            if isinstance(text, str)
        ]
        named = name == "request" and any(map(_KEY_FIELD.match, texts))
        if named or any(without_secrets(text) != text for text in texts):
            remedy = f"; see {section}.key_env" if name in ("url", "request") else ""
            check.add(key, f"must not hold a password or key, which would be stored{remedy}.")


def _elements(values: Iterable[object]) -> Iterator[object]:
    """Yield the elements of a list, and of its sections their values."""
    for value in values:
        if is_dataclass(value):
            yield from vars(value).values()
        else:
            yield value


def check_address(
    check: ConfigChecker, section: str, example: str, key_env: str | None = None
) -> None:
    """Report an invalid address or a missing API key; no request is sent.

    Args:
        check: The config, and the problems found in it.
        section: The dotted name of a section with the field `url`.
        example: A valid address.
        key_env: The key that names the variable of its API key; by default the section's own.
    """
    key = f"{section}.url"
    try:
        url = urlsplit(check.value(key) or "")
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        check.add(key, f"needs an address such as {example}.")
        return
    check.require(valid, key, f"needs an address such as {example}.")
    key_env = key_env or f"{section}.key_env"
    name = check.value(key_env)
    if name is not None:
        note_secret_variable(name)
    if name is not None and not os.environ.get(name) and not check.config.plan:
        message = "no such environment variable is set, or it is empty."
        check.add(key_env, message)
