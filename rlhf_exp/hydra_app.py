"""The command line of `launch.py`: checked, composed by Hydra, handed to the pipeline.

Config errors are found before Hydra makes a folder or starts a job, also under `-m`. Exit codes: 0
done, 1 a bug or failed jobs, 2 an error that the user can correct, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.errors import Detached, JobsFailed, UserError
from rlhf_exp.processes.environment import find_launch_environment, is_leader
from rlhf_exp.redaction import install
from rlhf_exp.safe_text import accept_any_text, well_formed

if TYPE_CHECKING:
    from rlhf_exp.config.compose import ComposedConfig

# Kept for `_launch` to raise: Hydra would print a job's user error with its own traceback.
_user_errors: list[UserError] = []
# Only the leader writes Hydra's usual folder; other processes would write the same one.
_FOLLOWER_OVERRIDES = (
    "hydra.output_subdir=null",
    "hydra.run.dir=${output_dir}/hydra/followers",
    "hydra.sweep.dir=${output_dir}/hydra/followers",
)


def main(argv: Sequence[str]) -> int:
    """Run `launch.py` with its arguments and return the exit code."""
    install()
    accept_any_text()
    try:
        if "-h" in argv or "--help" in argv:
            from rlhf_exp.config.help import help_text

            topics = [argument for argument in argv if not argument.startswith("-")]
            print(help_text(topics[0] if topics else None), end="")
            return 0
        _launch(argv)
    except UserError as error:
        _print_error(error)
        return 2
    except JobsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Detached as detached:
        print(detached, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _print_error(error: UserError) -> None:
    """Print an error once for each machine, since all processes find the same config errors."""
    try:
        environment = find_launch_environment()
    except UserError:
        environment = None
    if environment is None or not environment.rank:
        print(f"error: {error}", file=sys.stderr)
    elif not environment.local_rank:
        print(f"error in the process of rank {environment.rank}: {error}", file=sys.stderr)


def _launch(argv: Sequence[str]) -> None:
    import hydra

    from rlhf_exp.config.compose import as_user_errors, register_schema
    from rlhf_exp.config.overrides import override_problems, wrap_list_values
    from rlhf_exp.config.problems import raise_problems
    from rlhf_exp.config.schema_keys import read_groups

    for argument in argv:
        if well_formed(argument) != argument:
            # Configs are stored as UTF-8.
            raise UserError(
                f"{argument!a}: holds bytes that are no UTF-8; rename the file, or pass it by a "
                "link whose name is UTF-8"
            )
    arguments = _parse(argv)
    folders = [CONF, *([arguments.config_dir] if arguments.config_dir else [])]
    flags = [argument for argument in argv if argument not in arguments.overrides]
    overrides = wrap_list_values(arguments.overrides)
    raise_problems(override_problems(overrides, read_groups(folders)))
    if not (arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion):
        overrides, on_slurm = _check_jobs(overrides, arguments.multirun, folders)
        # Hydra uses launchers in multiruns only; on Slurm, a single run is a multirun of one.
        flags += ["--multirun"] if on_slurm and not arguments.multirun else []
    if not is_leader():
        overrides += _FOLLOWER_OVERRIDES
    # Without this, Hydra hides the exception and exits with 1, whatever the error.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *flags, *overrides]
    register_schema()
    _user_errors.clear()
    with as_user_errors():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    if _user_errors:
        raise _user_errors[0]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser  # noqa: PLC2701 - Hydra has no public one

    arguments = get_args_parser().parse_intermixed_args(list(argv))
    if arguments.config_path or arguments.config_name:
        raise UserError("--config-path and --config-name: add a folder with --config-dir instead")
    if arguments.config_dir is not None:
        arguments.config_dir = Path(arguments.config_dir).expanduser().resolve()
        if not arguments.config_dir.is_dir():
            raise UserError(f"--config-dir: there is no folder {arguments.config_dir}")
    return arguments


def _check_jobs(
    overrides: list[str], multirun: bool, folders: Sequence[Path]
) -> tuple[list[str], bool]:
    """Compose and check every job that would run.

    Returns:
        The overrides that start these jobs, and whether they run on Slurm.

    Raises:
        UserError: With the problems of all jobs.
    """
    from rlhf_exp.config.checks import config_problems
    from rlhf_exp.config.checks_sweep import check_points, slurm_problems
    from rlhf_exp.config.compose import compose
    from rlhf_exp.config.overrides import override_problems, sweep_points, swept_overrides
    from rlhf_exp.config.problems import Problem, raise_problems
    from rlhf_exp.config.schema_keys import read_groups

    swept_texts = swept_overrides(overrides)
    base = compose([text for text in overrides if text not in swept_texts], folders)
    problems: list[Problem | str] = []
    on_slurm = base.site is not None and not base.config.plan
    multirun = multirun or base.multirun
    if base.config.study.trials is not None:
        overrides = _study_overrides(overrides, base, multirun, folders)
        swept_texts = swept_overrides(overrides)
    if not multirun:
        for text in swept_texts:
            key, _, value = text.partition("=")
            message = f"several values need -m; a list is written {key}=[{value}]."
            problems.append(Problem(key, value, message))
    raise_problems(override_problems(base.sweep, read_groups(folders)))
    configs = [base.config]
    if multirun and base.choices["hydra/sweeper"] == "basic":
        points = sweep_points([*base.sweep, *overrides])
        configs, messages = check_points(points, lambda point: compose(point, folders).config)
        problems += messages
    else:
        problems += config_problems(base.config, multirun or on_slurm)
    if base.site is not None and on_slurm:
        problems += slurm_problems(base.site, configs)
    raise_problems(problems)
    return overrides, on_slurm


def _study_overrides(
    overrides: list[str], base: ComposedConfig, multirun: bool, folders: Sequence[Path]
) -> list[str]:
    """Return the overrides of a study's workers; write the command line of its trials to a file."""
    from rlhf_exp.config.checks import config_problems
    from rlhf_exp.config.compose import compose
    from rlhf_exp.config.problems import raise_problems
    from rlhf_exp.config.schema_keys import read_groups
    from rlhf_exp.config.search_space import (
        overrides_between,
        single_trial_overrides,
        worker_job_overrides,
        worker_overrides,
    )

    overrides, problems = worker_overrides(overrides, base, read_groups(folders), multirun)
    raise_problems(problems)
    config = compose(overrides, folders).config
    problems += config_problems(config, multirun)
    raise_problems(problems)
    if config.plan or not is_leader():
        return overrides
    trial_overrides = single_trial_overrides(overrides)
    trial_base = compose(trial_overrides, folders).config
    from rlhf_exp.launchers.optuna.trial import write_command

    write_command(config, [*trial_overrides, *overrides_between(trial_base, config)])
    return [*overrides, *worker_job_overrides(config.study.workers, base.site is None)]


def job(tree: DictConfig) -> float | None:
    """Run one composed experiment: Hydra's task function.

    Returns:
        The objective of a search; None if there is none.

    Raises:
        UserError: In a multirun, where Hydra names the job.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from rlhf_exp.config.compose import to_config

    hydra_config = HydraConfig.get()
    try:
        config, overrides = to_config(tree), list(hydra_config.overrides.task)
        from rlhf_exp.launchers.run_job import run_job

        return run_job(config, overrides)
    except UserError as error:
        if hydra_config.mode == RunMode.MULTIRUN:
            raise
        _user_errors.append(error)
        return None
