"""The command that trains and evaluates: `launch.py` in a checkout, `rlhf-exp run` elsewhere."""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
PROGRAM = "python launch.py" if (_CHECKOUT / "launch.py").is_file() else "rlhf-exp run"
