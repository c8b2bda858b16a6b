"""The process of a point: `python -m rlhf_exp.launchers.local_job FILE`, with its work as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from rlhf_exp.config.compose import from_dict
from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import write_json_atomic


def main(file: str) -> int:
    """Do the work that a file describes, and leave how it ended; return the exit code."""
    order = Path(file)
    work = json.loads(order.read_text(encoding="utf-8"))
    order.unlink()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        result = _result(work)
    except KeyboardInterrupt:
        return 130
    write_json_atomic(Path(work["result"]), result)
    return 1 if "error" in result else 0


def _result(work: dict[str, Any]) -> dict[str, Any]:
    from rlhf_exp.launchers.run_job import run_job

    try:
        config, overrides = from_dict(work["config"]), list(work["overrides"])
        objective = run_job(config, overrides, recorded=work["recorded"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return {"error": str(error)}
    except Exception:
        traceback.print_exc()
        return {"error": traceback.format_exc()}
    return {"objective": objective}


def _leave_with_parent() -> None:
    """Press Ctrl-C when the process that started this one is gone: its pipe has ended."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
