"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# No test may reach a hub or a tracking server, whatever the machine's settings.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data kept beside the project; `RLHF_EXP_TEST_DATA` names another place."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RLHF_EXP_TEST_DATA", default))
    if not (folder / "hh" / "harmless-train.jsonl.gz").is_file():
        pytest.skip(f"real data not found at {folder}")
    return folder
