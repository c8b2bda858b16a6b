"""A stand-in for W&B's server, which the environment names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.tracking.server import KEY, WandbServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """Running, with a key to it; nothing of the user's own W&B settings is seen."""
    running = WandbServer().start()
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # its settings are those of the first run of a process
    yield running
    running.stop()
    wandb.teardown()
