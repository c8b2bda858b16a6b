"""The Hydra plugin `hydra/launcher=slurm`, a thin adapter to `rlhf_exp.launchers.slurm.launcher`.

Hydra finds plugins in this package only, and loads them whenever it starts: imports are deferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class SlurmLauncher(Launcher):
    """Submits the jobs of a multirun to Slurm and waits for them."""

    def __init__(self, **site: Any) -> None:  # noqa: ANN401 - as Hydra calls it
        """Accept the launcher's section as Hydra passes it; `launch` reads it with its types."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep Hydra's objects for `launch`."""
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit one batch of jobs, whose configs are composed here, once, and wait for them."""
        from rlhf_exp.config.compose import to_config
        from rlhf_exp.config.launchers import SlurmConfig
        from rlhf_exp.config.text_values import keep_text

        jobs = []
        for overrides in job_overrides:
            tree = self.context.config_loader.load_sweep_config(self.config, keep_text(overrides))
            task = list(tree.hydra.overrides.task)
            with open_dict(tree):
                del tree["hydra"]
            jobs.append((task, to_config(tree)))
        site = OmegaConf.to_object(self.config.hydra.launcher)
        assert isinstance(site, SlurmConfig), "the option starts from the schema"
        results: list[float | Exception | None]
        if jobs[0][1].plan:  # is made here, also where submitit is not installed
            from rlhf_exp.launchers.run_job import run_job

            results = [run_job(config, overrides) for overrides, config in jobs]
        else:
            from rlhf_exp.launchers.slurm.launcher import launch

            results = launch(site, jobs)
        return [
            JobReturn(
                overrides=list(overrides),
                status=JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED,
                _return_value=result,
            )
            for overrides, result in zip(job_overrides, results, strict=True)
        ]
