"""Replies that were paid for, kept by what was asked: one JSON line each, only ever appended.

A writer that is killed leaves at most one broken line, and so may two that write at once on a
network file system: such a line is passed over, and its question asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_exp.evaluation.judges.endpoint import Reply


class Replies:
    """The replies in a file; safe to share between threads.

    Args:
        path: the file, made with the first reply.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known = _read(path)

    def get(self, body: Mapping[str, Any]) -> Reply | None:
        """Return the reply to a request, if there is one."""
        return self._known.get(digest(body))

    def add(self, body: Mapping[str, Any], reply: Reply) -> None:
        """Keep a reply."""
        record = {"request": digest(body), "model": body.get("model"), **asdict(reply)}
        # The line break in front ends whatever a killed writer left there.
        line = "\n" + json.dumps(record) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Replies can quote what is private in prompts.
            place = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(place, line.encode())
            finally:
                os.close(place)
            self._known[record["request"]] = reply


def digest(body: Mapping[str, Any]) -> str:
    """Return the sha256 of a request: the model's name, all messages and all settings."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Reply]:
    found = {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            reply = Reply(
                str(record["content"]),
                int(record["prompt_tokens"]),
                int(record["completion_tokens"]),
            )
            found[str(record["request"])] = reply
        except (ValueError, KeyError, TypeError):
            continue
    return found
