"""The command line of `launch.py`: checked, composed by Hydra, handed to the pipeline.

Config errors are found before Hydra makes a folder or starts a job, also under `-m`. Exit codes: 0
done, 1 a bug or failed jobs, 2 an error that the user can correct, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from omegaconf import DictConfig

from rlhf_exp.errors import Detached, JobsFailed, UserError
from rlhf_exp.processes.environment import find_launch_environment, is_leader
from rlhf_exp.redaction import install
from rlhf_exp.safe_text import accept_any_text, well_formed
from rlhf_exp.store.atomic_files import write_error

if TYPE_CHECKING:
    from rlhf_exp.config.compose import ComposedConfig
    from rlhf_exp.config.experiment import Config

# Kept for `launch` to raise: Hydra would print a job's user error with its own traceback.
_user_errors: list[UserError] = []
# Only the leader writes Hydra's usual folder; other processes would write the same one.
_FOLLOWER_OVERRIDES = (
    "hydra.output_subdir=null",
    "hydra.run.dir=${output_dir}/hydra/followers",
    "hydra.sweep.dir=${output_dir}/hydra/followers",
)
# A plan leaves nothing behind, and is made of a read-only folder as well.
_PLAN_OVERRIDES = ("hydra.output_subdir=null", "hydra.run.dir=.")


def main(argv: Sequence[str]) -> int:
    """Run `launch.py` with its arguments and return the exit code."""
    install()
    accept_any_text()
    try:
        if "-h" in argv or "--help" in argv:
            print(_help(argv), end="")
            return 0
        launch(argv)
    except UserError as error:
        _print_error(error)
        return 2
    except JobsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Detached as detached:
        print(detached, file=sys.stderr)
        return 130
    except Exception as error:
        refused = write_error(error)
        if refused is None:
            raise
        _print_error(refused)
        return 2
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


def _help(argv: Sequence[str]) -> str:
    from rlhf_exp.config.help import help_text

    if not any("=" in argument or argument.startswith("--config") for argument in argv):
        topics = [argument for argument in argv if not argument.startswith("-")]
        return help_text(topics[0] if topics else None)
    # Hydra takes a third of a second to import, which plain help does without.
    from rlhf_exp.config.folders import config_folders

    arguments = _parse(argv)
    topics = [text for text in arguments.overrides if "=" not in text and not text.startswith("~")]
    overrides = [text for text in arguments.overrides if text not in topics]
    folders, overrides = config_folders(overrides, arguments.config_dir)
    return help_text(topics[0] if topics else None, folders, overrides)


@dataclass(frozen=True)
class Jobs:
    """What a command line asks to run.

    Attributes:
        config: The config of the run; of a multirun, what its points have in common.
        multirun: Whether it is a multirun, as every run on Slurm is.
        overrides: The overrides that start it.
    """

    config: Config
    multirun: bool
    overrides: list[str]


def launch(argv: Sequence[str]) -> Jobs | None:
    """Run a command line to its end, and return what it ran, `None` where it only shows something.

    Raises:
        UserError: The command line or the config is wrong, or an error that the user can mend.
        JobsFailed: Jobs of a multirun failed.
        KeyboardInterrupt: The user stopped it; `Detached` if jobs go on elsewhere.
    """
    import hydra

    from rlhf_exp.config.compose import as_user_errors, register_schema
    from rlhf_exp.config.folders import config_folders, search_overrides
    from rlhf_exp.config.overrides import override_problems, prepare
    from rlhf_exp.config.problems import raise_problems
    from rlhf_exp.config.schema_keys import CONF, read_groups

    for argument in argv:
        if well_formed(argument) != argument:
            # Configs are stored as UTF-8.
            raise UserError(
                f"{argument!a}: holds bytes that are no UTF-8; rename the file, or pass it by a "
                "link whose name is UTF-8"
            )
    arguments = _parse(argv)
    flags = [argument for argument in argv if argument not in arguments.overrides]
    if arguments.shell_completion:
        folders, overrides = config_folders([], arguments.config_dir)[0], arguments.overrides
    else:
        folders, overrides = config_folders(arguments.overrides, arguments.config_dir)
        groups = read_groups(folders)
        overrides = prepare(overrides, groups)
        raise_problems(override_problems(overrides, groups))
    jobs = None
    if not (arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion):
        jobs = _check_jobs(overrides, arguments.multirun, folders)
        overrides = jobs.overrides
        flags += ["--multirun"] if jobs.multirun and not arguments.multirun else []
    if not is_leader():
        overrides += _FOLLOWER_OVERRIDES
    # Without this, Hydra hides the exception and exits with 1, whatever the error.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *flags, *search_overrides(folders[1:]), *overrides]
    register_schema()
    _user_errors.clear()
    with as_user_errors():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    if _user_errors:
        raise _user_errors[0]
    return jobs


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser  # noqa: PLC2701 - Hydra has no public one

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help and --hydra-help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.config_path or arguments.config_name:
        raise UserError("--config-path and --config-name: add a folder with --config-dir instead")
    if arguments.experimental_rerun:
        raise UserError(
            "--experimental-rerun: give the run's own command again, which `rlhf-exp status NAME` "
            "and its report show; what is in the store is not made again"
        )
    if arguments.config_dir is not None:
        arguments.config_dir = Path(arguments.config_dir).expanduser().resolve()
    return arguments


def _check_jobs(overrides: list[str], multirun: bool, folders: Sequence[Path]) -> Jobs:
    """Compose and check every job that would run.

    Raises:
        UserError: With the problems of all jobs.
    """
    from rlhf_exp.config.checks import config_problems
    from rlhf_exp.config.checks_sweep import check_points, slurm_problems
    from rlhf_exp.config.compose import compose
    from rlhf_exp.config.overrides import (
        override_problems,
        prepare,
        several_values_problem,
        sweep_points,
        swept_overrides,
    )
    from rlhf_exp.config.problems import Problem, raise_problems
    from rlhf_exp.config.schema_keys import read_groups

    swept_texts = swept_overrides(overrides)
    base = compose([text for text in overrides if text not in swept_texts], folders)
    problems: list[Problem | str] = []
    on_slurm = base.site is not None and not base.config.plan
    multirun = multirun or base.multirun
    groups = read_groups(folders)
    _print_notes(base, folders)
    if base.config.study.trials is not None:
        overrides = _study_overrides(overrides, base, multirun, folders)
        swept_texts = swept_overrides(overrides)
    if not multirun:
        problems += [several_values_problem(text, groups) for text in swept_texts]
    swept_by_files = prepare(base.sweep, groups)
    raise_problems(override_problems(swept_by_files, groups))
    configs = [base.config]
    if multirun and base.choices["hydra/sweeper"] == "basic":
        # Hydra's sweeper reads the files' sweeps itself; on the command line it gets them as meant.
        keys = {text.partition("=")[0] for text in overrides}
        changed = [text for text in swept_by_files if text not in base.sweep]
        overrides = [text for text in changed if text.partition("=")[0] not in keys] + overrides
        points = sweep_points([*swept_by_files, *overrides])
        configs, messages = check_points(points, lambda point: compose(point, folders).config)
        problems += messages
    else:
        problems += config_problems(base.config, multirun or on_slurm)
    if base.site is not None and on_slurm:
        problems += slurm_problems(base.site, configs)
    raise_problems(problems)
    if base.config.plan and not multirun:
        overrides = [*overrides, *_PLAN_OVERRIDES]
    # Hydra uses launchers in multiruns only; on Slurm, a single run is a multirun of one.
    return Jobs(base.config, multirun or on_slurm, overrides)


def _print_notes(base: ComposedConfig, folders: Sequence[Path]) -> None:
    """Say what of the user's has another meaning than it may seem."""
    if not is_leader():
        return
    for folder in folders[1:]:
        file = folder / "config.yaml"
        if file.is_file() and file.read_bytes() != (folders[0] / "config.yaml").read_bytes():
            remedy = f"write its values into {folder / 'experiment' / 'NAME.yaml'}"
            print(f"note: {file} is not read; {remedy}", file=sys.stderr)
    if base.choices.get("hydra/launcher") == "joblib":
        text = "hydra/launcher=joblib is called `parallel` now, for it is not the library joblib"
        print(f"note: {text}", file=sys.stderr)


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
