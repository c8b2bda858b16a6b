"""The process of a point: `python -m rlhf_exp.launchers.local_job FILE`, a JSON of `PointJob`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from rlhf_exp.config.compose import from_dict
from rlhf_exp.errors import UserError
from rlhf_exp.redaction import formatted_exception, install
from rlhf_exp.store.atomic_files import write_json_atomic


def main(file: str) -> int:
    """Run the job in a file and write its result; return the exit code."""
    install()
    job_file = Path(file)
    job = json.loads(job_file.read_text(encoding="utf-8"))
    job_file.unlink()
    threading.Thread(target=_interrupt_without_parent, daemon=True).start()
    try:
        result = _run(job)
    except KeyboardInterrupt:
        return 130
    write_json_atomic(Path(job["result"]), result)
    return 1 if "error" in result else 0


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; return its objective or its error."""
    from rlhf_exp.launchers.run_job import run_job

    try:
        config, overrides = from_dict(job["config"]), list(job["overrides"])
        objective = run_job(config, overrides, recorded=job["recorded"], logged=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return {"error": str(error)}
    except Exception as error:
        text = formatted_exception(error)
        print(text, end="", file=sys.stderr)
        return {"error": text}
    return {"objective": objective}


def _interrupt_without_parent() -> None:
    """Send this process Ctrl-C when its parent is gone, which is when its standard input ends."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
