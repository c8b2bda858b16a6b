"""The compiled guard without which the CPU build of torch makes no tensor of a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

LIBRARY = "PRETENDED_CUDA_GUARD"
"""Environment variable with the path of the compiled library."""


class GuardUnavailable(Exception):
    """There can be no guard, with the reason: no compiler, or a torch that has CUDA itself."""


def compile_guard(folder: Path) -> Path:
    """Compile `guard.cpp` against the installed torch; return the library.

    Raises:
        GuardUnavailable: There is no compiler, it fails, or torch is a build with CUDA.
    """
    from torch.version import cuda

    if cuda is not None:
        raise GuardUnavailable(f"torch is a build with CUDA {cuda}; to pretend takes one for CPUs")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise GuardUnavailable("no C++ compiler (c++, g++, clang++) on this machine")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    library = folder / "guard.so"
    command = [
        *(compiler, "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{root / 'include'}"),
        *(str(Path(__file__).with_name("guard.cpp")), "-o", str(library)),
        *(f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GuardUnavailable(f"the guard does not compile: {done.stderr.strip()[-500:]}")
    return library


def load_guard() -> None:
    """Load the library that `LIBRARY` names; torch must not have been imported yet."""
    ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL)
