"""A job of a multirun: one experiment, or the part of one worker in a study."""

from __future__ import annotations

from rlhf_exp.config.experiment import Config


def run_job(
    config: Config, overrides: list[str], *, recorded: bool = True, logged: bool = True
) -> float | None:
    """Run a job.

    Args:
        config: The experiment, or the study.
        overrides: The command line, for the record.
        recorded: Whether it is a run of its own.
        logged: Whether it writes a log of its own.

    Returns:
        The objective, of a study the best so far.

    Raises:
        UserError: An error that the user can mend.
        JobsFailed: A study's worker gives up.
        KeyboardInterrupt: The user stopped the job; a checkpoint holds the work so far.
    """
    if config.study.trials is not None:
        from rlhf_exp.launchers.optuna.worker import run_worker

        return run_worker(config, overrides)
    from rlhf_exp.experiment import run

    if recorded and logged:
        return run(config, overrides)
    return run(config, overrides, recorded=recorded, logged=logged)
