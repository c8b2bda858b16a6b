"""Text in overrides and YAML files: kept as it is typed, and written so that it is read again.

Hydra's grammar and YAML turn text that looks like a number into one: `name=2024_01_02` would name a
run 20240102, and a store key of digits and an `e` would be infinite. Where the schema has text,
overrides are quoted before Hydra reads them, and a YAML file that needs quotes is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from antlr4 import CommonTokenStream, InputStream, ParserRuleContext, Token
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf._utils import get_yaml_loader  # noqa: PLC2701 - OmegaConf has no public one

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.config.problems import Problem, format_value

_LAUNCHER = "hydra.launcher"
_SWEPT = "hydra.sweeper.params."  # below it: keys of the config, whose values are overrides
_NUMBERS = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
# Functions of Hydra whose unnamed arguments are values of the key.
_OF_VALUES = ("choice", "shuffle", "sort", "tag", "str")
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
_RESERVED = ("null", "true", "false", "inf", "nan")


def keep_text(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which the text of text keys is quoted where Hydra would change it.

    Texts in lists, sections and sweeps, and the options of groups are kept too; `null` stays null.
    An override that cannot be parsed is left as it is.
    """
    return [_keep_text(text) for text in overrides]


def _keep_text(override: str) -> str:
    key, equals, _ = override.partition("=")
    annotation = _override_type(key.lstrip("+~").partition("@")[0])
    if not equals or not _holds_text(annotation):
        return override
    try:
        value = _parse(override).value()
    except (HydraException, RecursionError):
        return override
    for start, end in reversed(list(_spans_to_quote(value, annotation))):
        override = f"{override[:start]}'{override[start:end]}'{override[end:]}"
    return override


def _override_type(key: str) -> Any:  # noqa: ANN401 - a type annotation
    """Return the type of what is assigned to a key: text for a group, whose options are names."""
    annotation = _type_of(key)
    # Every section at the root is a group, and so is a name that the schema does not have.
    is_group = "/" in key or ("." not in key and (annotation is None or is_dataclass(annotation)))
    return str if is_group else annotation


def _type_of(key: str) -> Any:  # noqa: ANN401 - a type annotation
    """Return the type of a dotted key, without `None`; None for an unknown key."""
    names = key.removeprefix(_SWEPT).split(".")
    annotation: Any = Config
    if names[:2] == ["hydra", "launcher"]:
        names, annotation = names[2:], SlurmConfig
    elif names[0] == "hydra":
        names, annotation = names[1:], HydraConf
    for name in names:
        annotation = _item(annotation, name)
    # Hydra's own sections hold numbers where they say nothing.
    return None if annotation is Any and not key.startswith(_LAUNCHER) else annotation


def _item(annotation: Any, name: str) -> Any:  # noqa: ANN401 - type annotations
    """Return the type of an item of a section or mapping; None for an unknown one."""
    if is_dataclass(annotation):
        return _field_types(annotation).get(name)  # type: ignore[arg-type]
    return get_args(annotation)[-1] if get_origin(annotation) is dict else None


@cache
def _field_types(section: type) -> dict[str, Any]:
    hints = get_type_hints(section)
    return {item.name: _required(hints[item.name]) for item in fields(section)}


def _required(annotation: Any) -> Any:  # noqa: ANN401 - type annotations
    """Return a type without `None`."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return parts[0] if NoneType in get_args(annotation) else annotation


def _holds_text(annotation: Any) -> bool:  # noqa: ANN401 - a type annotation
    if is_dataclass(annotation) or annotation in (str, Any):
        return True
    return get_origin(annotation) in (list, dict) and _holds_text(get_args(annotation)[-1])


def _parse(override: str) -> Any:  # noqa: ANN401 - generated code without types
    """Return Hydra's parse tree of an override.

    Raises:
        HydraException: It is not valid.
    """
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for recognizer in (lexer, parser):
        recognizer.removeErrorListeners()
        recognizer.addErrorListener(HydraErrorListener())
    return parser.override()


def _spans_to_quote(
    context: ParserRuleContext | None,
    annotation: Any,  # noqa: ANN401 - a type annotation
) -> Iterator[tuple[int, int]]:
    """Yield start and end of each text that Hydra would take for a number or a truth value."""
    if isinstance(context, OverrideParser.PrimitiveContext):
        symbols = [child.symbol for child in context.getChildren()]
        symbols = [symbol for symbol in symbols if symbol.type != OverrideLexer.WS]
        if len(symbols) == 1 and _is_text(symbols[0], annotation):
            yield symbols[0].start, symbols[0].stop + 1
    elif isinstance(context, OverrideParser.FunctionContext):
        yield from _spans_in_function(context, annotation)
    elif isinstance(context, OverrideParser.DictKeyValuePairContext):
        name = context.dictKey().getText().strip()
        yield from _spans_to_quote(context.element(), _item(annotation, name))
    elif isinstance(context, OverrideParser.ListContainerContext):
        item = get_args(annotation)[-1] if get_origin(annotation) is list else annotation
        for element in context.element():
            yield from _spans_to_quote(element, item)
    elif isinstance(context, ParserRuleContext):
        for child in context.getChildren():
            yield from _spans_to_quote(child, annotation)


def _spans_in_function(
    context: OverrideParser.FunctionContext,
    annotation: Any,  # noqa: ANN401 - a type annotation
) -> Iterator[tuple[int, int]]:
    named = False
    for child in context.getChildren():
        is_value = isinstance(child, OverrideParser.ElementContext) and not named
        if is_value and context.ID().getText() in _OF_VALUES:
            yield from _spans_to_quote(child, annotation)
        named = isinstance(child, OverrideParser.ArgNameContext)


def _is_text(symbol: Token, annotation: Any) -> bool:  # noqa: ANN401 - a type annotation
    """Return whether a number or truth value, as Hydra reads it, is text in the schema."""
    if annotation is Any:  # an option of sbatch, which gets what is written
        numbers = {OverrideLexer.INT: int, OverrideLexer.FLOAT: float}
        number = numbers.get(symbol.type)
        return number is not None and str(number(symbol.text)) != symbol.text
    return annotation is str and symbol.type in _NUMBERS


def override_of(key: str, value: Any) -> str:  # noqa: ANN401 - any field's value
    """Return the override that gives a key exactly this value."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:  # noqa: ANN401 - any field's value
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if is_dataclass(value):
        items = (override_of(item.name, getattr(value, item.name)) for item in fields(value))
        return "{" + ",".join(item.replace("=", ":", 1) for item in items) + "}"
    if not isinstance(value, str):
        return format_value(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return QuotedString(literal(value), Quote.single).with_quotes()


def literal(text: str) -> str:
    """Return text as OmegaConf reads it back: what looks like an interpolation is none."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def text_problems(path: Path, package: str) -> list[Problem]:
    """Return the texts in a config file that YAML would change: numbers, dates, `on` and `off`.

    Args:
        path: The file, valid YAML.
        package: The section that its keys belong to; empty for the root.
    """
    loader = _yaml_loader()(path.read_text(encoding="utf-8"))
    root = loader.get_single_node()
    problems = []
    for key, node in _texts(root, package, _type_of(package) if package else Config):
        value = loader.construct_object(node)
        if value is not None and not isinstance(value, str) and str(value) != node.value:
            message = f"YAML reads {value}; text is quoted here: '{node.value}'."
            where = f"{path}:{node.start_mark.line + 1}: {key}"
            problems.append(Problem(where, node.value, message))
    return problems


_yaml_loader = cache(get_yaml_loader)


def _texts(
    node: yaml.Node | None,
    key: str,
    annotation: Any,  # noqa: ANN401 - a type annotation
) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the keys and nodes of text in a YAML tree."""
    if isinstance(node, yaml.MappingNode):
        for name_node, value in node.value:
            name = str(name_node.value)
            dotted = f"{key}.{name}" if key else name
            yield from _texts(value, dotted, _type_of(dotted) or _item(annotation, name))
    elif isinstance(node, yaml.SequenceNode) and get_origin(annotation) is list:
        for element in node.value:
            yield from _texts(element, key, get_args(annotation)[0])
    elif isinstance(node, yaml.ScalarNode) and annotation in (str, Any):
        yield key, node
