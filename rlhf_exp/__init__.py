"""RLHF experiments: the Python interface is `run`, `compose`, `Run` and `Sweep` of `rlhf_exp.api`.

Importing the package imports none of its modules; these names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_exp.api import Run, Sweep, compose, run

__version__ = "0.1.0"
__all__ = ["Run", "Sweep", "__version__", "compose", "run"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
