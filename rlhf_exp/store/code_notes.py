"""What parsing a module has found, remembered on disk by the module's content.

Parsing the 150 modules behind a stage takes half a second, reading them a hundredth of one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rlhf_exp.store.files import write_json_atomic


class Found(NamedTuple):
    """What a module is.

    Attributes:
        digest: Of its syntax tree; "" for an empty module.
        names: What of the package it imports, sorted.
    """

    digest: str
    names: tuple[str, ...]


class CodeNotes:
    """Remembers what parsing has found; several processes may share the file.

    Args:
        path: The JSON file; `None`: nothing is remembered. One that cannot be read or written costs
            time only, as does one whose folder nobody has made yet: a plan leaves nothing behind.
        parser: Source file of what parses: notes of another one, or of another Python, do not
            count.
    """

    def __init__(self, path: Path | None, parser: Path) -> None:
        self.path = path
        made_by = f"{sys.version_info[:2]} {hashlib.sha256(parser.read_bytes()).hexdigest()}"
        self._made_by = made_by
        self._fresh: dict[str, list[object]] = {}
        self._known = self._read()

    def of(self, source: bytes, place: str, parse: Callable[[], Found]) -> Found:
        """Return what a module is, from the notes or by parsing.

        Args:
            source: Its file's content.
            place: What else counts, such as its name.
            parse: Finds out.
        """
        name = hashlib.sha256(f"{place}\0".encode() + source).hexdigest()
        try:
            digest, names = self._known[name]
            return Found(str(digest), tuple(map(str, names)))  # type: ignore[call-overload]
        except (KeyError, TypeError, ValueError):
            found = parse()
        self._known[name] = self._fresh[name] = [found.digest, found.names]
        return found

    def keep(self) -> None:
        """Write down what is new, beside what other processes have written meanwhile."""
        if self.path is None or not self._fresh or not self.path.parent.is_dir():
            return
        modules = self._read() | self._fresh
        try:
            content = {"made_by": self._made_by, "modules": modules}
            write_json_atomic(self.path, content, durable=False)
        except OSError:
            return
        self._fresh = {}

    def _read(self) -> dict[str, list[object]]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known = content["modules"] if content["made_by"] == self._made_by else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}
