"""The program of another interpreter that trains: `python -I FOLDER FILE FD`.

FOLDER is this one; FILE a module with `LIBRARIES`, the names of distributions, and `work(line,
plan)`; FD a connection to the process that starts it (`process.py`). It says hello, is told where
its plan is, has `work` carry it out, and ends when that is done or the other end is gone. It
imports nothing of this project but the files beside it and beside FILE, which are named so that
they hide no library.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from engine_line import Stopped, WorkerChannel


def work(line: WorkerChannel, file: Path) -> None:
    """Carry out the plan."""
    sys.path.insert(0, str(file.parent))
    engine = importlib.import_module(file.stem)
    answer = line.ask(kind="hello", versions={name: version(name) for name in engine.LIBRARIES})
    with suppress(Stopped):
        engine.work(line, json.loads(Path(answer["plan"]).read_text(encoding="utf-8")))


def main() -> None:
    """Work, and tell how it ended."""
    line = WorkerChannel(int(sys.argv[2]))
    end = {"kind": "done"}
    try:
        work(line, Path(sys.argv[1]))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        end = {"kind": "failed", "error": message, "traceback": traceback.format_exc()}
    sys.stdout.flush()  # once the other end knows, it ends this process
    line.send(**end)
    os._exit(0)  # libraries leave threads behind


if __name__ == "__main__":
    main()
