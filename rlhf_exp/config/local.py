"""`hydra/launcher=local` and `joblib`: the jobs of a multirun on this machine.

The schema behind `conf/hydra/launcher/local.yaml`. It is Hydra's launcher section, not part of an
experiment: nothing of it is in a key of the store.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCHER = "hydra_plugins.rlhf_exp_local.LocalLauncher"


@dataclass
class LocalConfig:
    """This machine.

    Attributes:
        n_jobs: Jobs that run at the same time; -1: as many as cores and GPUs allow.
    """

    _target_: str = LAUNCHER
    n_jobs: int = 1
