"""The Hydra plugin `hydra/launcher=local`, a thin adapter to `rlhf_exp.launchers.local`.

Hydra finds plugins in this package only, and loads them whenever it starts: imports are deferred.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class LocalLauncher(Launcher):
    """Runs the jobs of a multirun on this machine."""

    def __init__(self, n_jobs: int) -> None:
        """Take the launcher's section."""
        self.n_jobs = n_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep Hydra's objects for `launch`."""
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run one batch of jobs, whose configs are composed here, once."""
        from rlhf_exp.config.compose import to_config
        from rlhf_exp.config.text_values import keep_text
        from rlhf_exp.errors import UserError
        from rlhf_exp.launchers.local import launch

        jobs = []
        for overrides in job_overrides:
            tree = self.context.config_loader.load_sweep_config(self.config, keep_text(overrides))
            task = list(tree.hydra.overrides.task)
            with open_dict(tree):
                del tree["hydra"]
            jobs.append((task, to_config(tree)))
        if self.config.hydra.sweeper.get("max_batch_size") is not None:
            raise UserError(
                "hydra.sweeper.max_batch_size: a batch would wait for the whole batch before it; "
                "set hydra.launcher.n_jobs instead"
            )
        # Returning a failed job would make Hydra print its whole command line; `launch` raises.
        return [
            JobReturn(
                overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=objective
            )
            for overrides, objective in zip(job_overrides, launch(self.n_jobs, jobs), strict=True)
        ]
