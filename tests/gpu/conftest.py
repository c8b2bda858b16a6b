"""Tests that need a CUDA device: `python -m pytest -m gpu`, or the last section of `gpu.py`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _device() -> None:
    """Skip where there is no CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
