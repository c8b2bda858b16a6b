"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

# No test may reach a hub or a tracking server, whatever the machine's settings.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data kept beside the project; `RLHF_EXP_TEST_DATA` names another place."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RLHF_EXP_TEST_DATA", default))
    if not (folder / "hh" / "harmless-train.jsonl.gz").is_file():
        pytest.skip(f"real data not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one small run of all stages; for reading only (`run_copy` may be changed)."""
    from tests.lab import launch

    folder = tmp_path_factory.mktemp("small") / "outputs"
    assert launch(folder, "name=small") == 0
    return folder


@pytest.fixture
def run_copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run's results, for tests that change them."""
    return shutil.copytree(small_run, tmp_path / "outputs")
