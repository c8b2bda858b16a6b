"""The reference of the config, `docs/config.md`: every group, option and key.

`python -m rlhf_exp.config.reference` writes it anew; a test says when it is out of date.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.config.fields import in_key
from rlhf_exp.config.groups import CONF, read_groups
from rlhf_exp.config.keys import Key, all_keys

PATH = CONF.parent / "docs" / "config.md"

_HEAD = """\
# Config reference

Made from the schema in `rlhf_exp/config/` and the files of `conf/` by
`python -m rlhf_exp.config.reference`; do not edit. `python launch.py --help SECTION` shows
the same.

Every key can be set on the command line (`ppo.lr=1e-4`), in a YAML file of `conf/`, or swept over
with `-m`. Defaults are the schema's; an option of a group may set others. Keys marked *free* change
how a result is computed, not the result: an artifact in the store does not depend on them.
"""


def reference() -> str:
    """Return the reference as Markdown."""
    parts = [_HEAD, "## Groups\n"]
    for group in read_groups().values():
        rows = [
            f"| `{option}`{' (default)' if option == group.chosen else ''} | {_cell(text)} |"
            for option, text in group.options.items()
        ]
        parts.append(f"### `{group.name}`\n\n| option | |\n|---|---|\n" + "\n".join(rows) + "\n")
    parts.append("## Keys\n")
    keys = all_keys()
    root = [key for key in keys.values() if not key.parent and key.section is None]
    parts.append("### At the root\n\n" + _table(root))
    for key in keys.values():
        if key.section is not None:
            inside = [k for k in keys.values() if k.parent == key.name and k.section is None]
            parts.append(f"### `{key.name}`\n\n{key.doc}\n\n" + _table(inside))
    return "\n".join(parts)


def _table(keys: list[Key]) -> str:
    rows = [
        f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.doc)}"
        f"{'' if in_key(key.item) else ' *Free.*'} |"
        for key in keys
    ]
    return "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(path: Path = PATH) -> None:
    """Write the reference to a file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    write()
