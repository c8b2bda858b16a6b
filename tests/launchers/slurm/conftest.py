"""A Slurm for the tests that need one; they are skipped, with the reason, where it cannot run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.launchers.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster with empty queues; Slurm's commands find it from this process too."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    # Jobs have all their threads on two cores; bit identity needs a fixed number anyway.
    assert os.environ["OMP_NUM_THREADS"] == "1"
    yield slurm
    slurm.run("scancel", "--user=root", "--signal=KILL")
    slurm.run("scancel", "--user=root")
