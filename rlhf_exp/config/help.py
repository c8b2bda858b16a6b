"""Generated documentation of the config: `launch.py --help` and `docs/reference/config.md`.

Both come from the schema and from the first comments of the YAML files. A test compares the page
with what `python -m rlhf_exp.config.help` writes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from rlhf_exp.config.fields import in_key
from rlhf_exp.config.schema_keys import (
    CONF,
    ConfigGroup,
    ConfigKey,
    all_keys,
    closest_keys,
    did_you_mean,
    read_groups,
)
from rlhf_exp.errors import UserError
from rlhf_exp.program import PROGRAM

REFERENCE_PATH = CONF.parent / "docs" / "reference" / "config.md"
_WIDTH = 100
_USAGE = """\
Trains a language model on human preferences: SFT, reward model, PPO, evaluation.

  python launch.py                                  the whole pipeline, tiny, on a CPU
  python launch.py GROUP=OPTION KEY=VALUE ...       another experiment
  python launch.py plan=true ...                    what would run, and what it needs
  python launch.py -m name=NAME ppo.lr=1e-4,3e-4    one run for each value
  python launch.py --cfg job ...                    the whole config, without running
  python launch.py --help SECTION                   the keys of a section, such as ppo or ppo.kl
  python launch.py GROUP=OPTION --help SECTION      the same, with that option's values
  python launch.py --config-dir DIR ...             with your own groups' options in DIR
"""
_REFERENCE_HEAD = """\
# Config reference

Made from the schema in `rlhf_exp/config/` and the files of `conf/` by
`python -m rlhf_exp.config.help`; do not edit. `python launch.py --help SECTION` shows
the same.

Every key can be set on the command line (`ppo.lr=1e-4`), in a YAML file of `conf/`, or swept over
with `-m`. Defaults are the schema's; an option of a group may set others. Keys marked *free* change
how a result is computed, not the result: an artifact in the store does not depend on them.
"""


def help_text(
    topic: str | None = None, folders: Sequence[Path] = (CONF,), overrides: Sequence[str] = ()
) -> str:
    """Return the help on everything or on one topic.

    Args:
        topic: A group, a section or a key.
        folders: The config folders.
        overrides: A command line, whose options and values are shown in place of the defaults.

    Raises:
        UserError: If there is no such topic, or the command line is wrong.
    """
    groups, keys = read_groups(folders), dict(all_keys())
    if overrides:
        groups, keys = _with_values(groups, keys, folders, overrides)
    if topic is None:
        return _overview(groups, keys)
    if topic not in groups and topic not in keys:
        similar = closest_keys(topic, list(groups))
        raise UserError(f"--help {topic}: there is no such group or key.{did_you_mean(similar)}")
    parts = [_describe_group(groups[topic])] if topic in groups else []
    if topic in keys:
        section_keys = [key for name, key in keys.items() if name.startswith(topic + ".")]
        parts.append(_describe_keys(section_keys or [keys[topic]]))
    return "\n".join(parts)


def _with_values(
    groups: dict[str, ConfigGroup],
    keys: dict[str, ConfigKey],
    folders: Sequence[Path],
    overrides: Sequence[str],
) -> tuple[dict[str, ConfigGroup], dict[str, ConfigKey]]:
    """Return groups and keys with a command line's options and values as their defaults."""
    from rlhf_exp.config.compose import compose  # with Hydra, which plain help does without
    from rlhf_exp.config.overrides import override_problems, prepare, swept_overrides
    from rlhf_exp.config.problems import format_value, raise_problems

    prepared = prepare(overrides, groups)
    raise_problems(override_problems(prepared, groups))
    swept = swept_overrides(prepared)
    composed = compose([text for text in prepared if text not in swept], folders)
    groups = {
        name: replace(group, default=composed.choices.get(name, group.default))
        for name, group in groups.items()
    }
    return groups, {
        name: replace(key, default=format_value(attrgetter(name)(composed.config)))
        for name, key in keys.items()
    }


def _overview(groups: dict[str, ConfigGroup], keys: dict[str, ConfigKey]) -> str:
    root = [key for key in keys.values() if not key.parent]
    root_keys = [key for key in root if key.section is None and key.name not in groups]
    sections = "".join(f"  {key.name:<14}{key.doc}\n" for key in root if key.section is not None)
    group_list = "\n".join(_describe_group(group) for group in groups.values())
    usage = _USAGE.replace("python launch.py", PROGRAM)
    return (
        f"{usage}\nGroups (* is the default option)\n\n{group_list}\n"
        f"Sections (--help SECTION lists the keys)\n\n{sections}\n"
        f"Keys of no section\n\n{_describe_keys(root_keys)}"
    )


def _describe_group(group: ConfigGroup) -> str:
    lines = [f"  {group.name}"]
    for option, text in group.options.items():
        mark = "*" if option == group.default else " "
        lines.append(f"   {mark} {option:<16}{text}")
    return "\n".join(lines) + "\n"


def _describe_keys(keys: Iterable[ConfigKey]) -> str:
    lines = []
    for key in keys:
        if key.section is not None:
            lines.append(f"\n  {key.name}: {key.doc}")
            continue
        lines.append(f"  {key.name}={key.default}")
        text = f"{key.doc} ({key.type})"
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def write(path: Path = REFERENCE_PATH) -> None:
    """Write the reference of the config, `docs/reference/config.md` by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """Return the reference of all groups, options and keys as Markdown."""
    parts = [_REFERENCE_HEAD, "## Groups\n"]
    for group in read_groups().values():
        rows = [
            f"| `{option}`{' (default)' if option == group.default else ''} | {_cell(text)} |"
            for option, text in group.options.items()
        ]
        parts.append(f"### `{group.name}`\n\n| option | |\n|---|---|\n" + "\n".join(rows) + "\n")
    parts.append("## Keys\n")
    keys = all_keys()
    root = [key for key in keys.values() if not key.parent and key.section is None]
    parts.append("### At the root\n\n" + _table(root))
    for key in keys.values():
        if key.section is not None:
            section_keys = [
                section_key
                for section_key in keys.values()
                if section_key.parent == key.name and section_key.section is None
            ]
            parts.append(f"### `{key.name}`\n\n{key.doc}\n\n" + _table(section_keys))
    return "\n".join(parts)


def _table(keys: list[ConfigKey]) -> str:
    rows = [
        f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.doc)}"
        f"{'' if in_key(key.field) else ' *Free.*'} |"
        for key in keys
    ]
    return "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write()
