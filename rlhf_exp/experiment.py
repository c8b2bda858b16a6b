"""An experiment from its config to its report: plan, run, record, print."""

from __future__ import annotations

import io
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

from rich.console import Console
from rich.text import Text

from rlhf_exp.config.experiment import Config, TrackingMode
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.executor import (
    StageExecutor,
    checked_launch_environment,
    executor_for,
    work_for_leader,
)
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.pipeline.learning_rates import learning_rate_warnings
from rlhf_exp.pipeline.memory_fit import fits_of
from rlhf_exp.pipeline.plan import Step, StepState, plan, records_of, refuse_changed
from rlhf_exp.pipeline.plan_table import memory_table, plan_table
from rlhf_exp.pipeline.precision import slow_bfloat16, with_precision
from rlhf_exp.pipeline.preflight import lacking_extras, preflight, reward_ready
from rlhf_exp.pipeline.probe import probe, probe_table
from rlhf_exp.pipeline.run import FinishedStep, run_steps
from rlhf_exp.processes.environment import is_leader
from rlhf_exp.processes.failures import exit_code_of
from rlhf_exp.program import PROGRAM
from rlhf_exp.redaction import formatted_exception
from rlhf_exp.run_log import Tee, append, open_log, recording
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.atomic_files import write_error
from rlhf_exp.store.run_records import Process, Records, RunRecord, Status

logger = logging.getLogger(__name__)

UNNAMED = "unnamed"


def run(
    config: Config,
    overrides: list[str],
    *,
    recorded: bool = True,
    logged: bool = True,
    executor: StageExecutor | None = None,
) -> float | None:
    """Run an experiment, or print its plan.

    Args:
        config: The experiment, checked.
        overrides: The command line, for the record.
        recorded: Whether it is a run of its own, with a record and a report; otherwise it only
            brings the models up to date that other runs share.
        logged: Whether to write a log; what else starts runs may have one of all their output.
        executor: Runs the stages; by default chosen by config and launch environment.

    Returns:
        The objective of a search: that of the last training stage, on validation data.

    Raises:
        UserError: An error that the user can mend.
        KeyboardInterrupt: The user stopped the run; a checkpoint holds the work so far.
    """
    config = pinned(config)
    notes: list[str] = []
    if is_leader():  # the others are given its choice
        config, choice = with_precision(config)
        if choice is not None:
            overrides, notes = choice.overrides(overrides), [str(choice)]
    if config.plan:
        if is_leader():
            _show(config, Console(), notes)
        return None
    if executor is None:
        environment = checked_launch_environment(config)
        if environment is not None and environment.rank:
            return work_for_leader(config, environment)
        executor = executor_for(config, environment)
    objective = None
    try:
        if config.probe:
            _probe(config, executor, notes)
        else:
            objective = _run(config, overrides, executor, recorded, logged, notes)
    except BaseException as error:
        refused = write_error(error, Path(config.output_dir))
        executor.end(refused or error)
        if refused is not None:
            raise refused from error
        raise
    executor.end(None, objective)
    return objective


def _show(config: Config, console: Console, notes: Sequence[str]) -> list[Step]:
    """Print the plan, and notes on how it came to be; return its steps."""
    steps = plan(config)
    console.print(plan_table(steps))
    for note in notes:
        console.print(Text(note))
    for line in lacking_extras(config, steps):
        console.print(Text(line))
    for line in learning_rate_warnings(config, steps):
        console.print(Text(f"\nwarning: {line}\n", "bold red"))
    if config.plan or config.probe:
        console.print(memory_table(config))
        for fit in fits_of(config):
            console.print(Text(str(fit)))
    return steps


def _probe(config: Config, executor: StageExecutor, notes: Sequence[str]) -> None:
    """Measure a few iterations of each training stage, and print the measurements."""
    console = Console(stderr=True)
    steps = _show(config, console, notes)
    if any(step.stage == "ppo" and step.state is not StepState.given for step in steps):
        reward_ready(config)
    for probed in probe(config, steps, executor, lambda text: console.print(Text(text))):
        Console().print(probe_table(config, probed))


def _run(
    config: Config,
    overrides: list[str],
    executor: StageExecutor,
    recorded: bool,
    logged: bool,
    notes: Sequence[str],
) -> float | None:
    """Plan, run, record and report; return the objective."""
    console = Console(stderr=True)
    steps = _show(config, console, notes)
    refuse_changed(steps)
    preflight(config, steps, executor.materials)
    slow = slow_bfloat16(config) if any(step.needs_work for step in steps) else None
    if slow is not None:
        notes = [*notes, f"warning: {slow}"]
        console.print(Text(notes[-1], "bold red"))
    if not recorded:
        done = run_steps(config, steps, executor, _teller(console), overrides=overrides)
        return _objective(done)
    record = RunRecord(
        name=config.name or UNNAMED,
        stage=config.stage.name,
        keys={step.stage: step.key for step in steps},
        overrides=tuple(overrides),
        seed=config.seed,
        status=Status.running,
        process=Process.current(),
    )
    records_of(config).write(record)
    log = open_log(Path(config.output_dir), record.name, record.key) if logged else None
    if log is not None:
        append(log, f"$ {PROGRAM} {shlex.join(overrides)}")
        Console(file=cast(IO[str], Tee(io.StringIO(), log)), width=100).print(plan_table(steps))
        for note in notes:
            append(log, note)
        console = Console(file=cast(IO[str], Tee(sys.stderr, log)))
    with recording(log):
        try:
            done = _run_recorded(config, steps, record, executor, console, log)
        except BaseException as error:
            if log is not None:
                append(log, _last_words(error))
            raise
        objective = _objective(done)
        records_of(config).write(replace(record, status=Status.done, objective=objective))
        _report(config, done, log)
    return objective


def _teller(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(Text(text))


def _last_words(error: BaseException) -> str:
    """Return the end of a run for its log."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return f"interrupted ({type(error).__name__}): the same command goes on"
    return formatted_exception(error)


def _run_recorded(
    config: Config,
    steps: list[Step],
    record: RunRecord,
    executor: StageExecutor,
    console: Console,
    log: Path | None,
) -> list[FinishedStep]:
    """Run the steps, and record how they end."""
    records, overrides = records_of(config), record.overrides
    try:
        return run_steps(config, steps, executor, _teller(console), overrides=overrides, log=log)
    except (KeyboardInterrupt, SystemExit) as error:
        records.write(replace(record, status=Status.interrupted))
        if exit_code_of(error) == 0:
            raise RuntimeError("a stage has ended the program, without a result") from error
        raise
    except UserError as error:
        _record_failure(records, record, str(error), log)
        raise
    except Exception as error:
        refused = write_error(error, Path(config.output_dir))
        _record_failure(records, record, str(refused or formatted_exception(error)), log)
        raise


def _record_failure(records: Records, record: RunRecord, error: str, log: Path | None) -> None:
    """Record that a run has failed; where that cannot be written, its own error says more."""
    path = None if log is None else str(log)
    with suppress(OSError):
        records.write(replace(record, status=Status.failed, error=error, log=path))


def _objective(done: list[FinishedStep]) -> float | None:
    trained = [
        finished.artifact
        for finished in done
        if finished.step.stage != "eval" and finished.artifact is not None
    ]
    return trained[-1].manifest.objective if trained else None


def _report(config: Config, done: list[FinishedStep], log: Path | None) -> None:
    """Write the report, and print the results, its path and how to load the model."""
    from rlhf_exp.report.run.best_of import BEST_OF_FILE, print_best_of
    from rlhf_exp.report.run.gather import gather, loading_code
    from rlhf_exp.report.run.harness import HARNESS_FILE, print_harness
    from rlhf_exp.report.run.page import (
        build_report,
        comparisons_of,
        headlines_of,
        report_path,
    )
    from rlhf_exp.report.run.reward_quality import REWARD_QUALITY_FILE, print_reward_quality
    from rlhf_exp.report.run.terminal import print_comparison, print_headlines
    from rlhf_exp.report.run.toxicity import TOXICITY_FILE, print_toxicity

    artifacts: dict[str, Artifact] = {
        finished.step.stage: finished.artifact for finished in done if finished.artifact is not None
    }
    if not artifacts:
        return
    final = list(artifacts.values())[-1]
    title = config.name or f"{final.stage} {final.key[:8]}"
    trained = [finished.step.stage for finished in done if finished.trained]
    data = gather(title, artifacts, trained)
    path = report_path(Path(config.output_dir), final.stage, final.key)
    build_report(data, path)
    if final.stage in trained and config.tracking.mode is TrackingMode.online:
        from rlhf_exp.tracking.wandb_sync import attach_report

        reason = attach_report(final.path, path)
        if reason is not None:
            logger.warning("the report is not attached to the run at W&B: %s", reason)
    out = Console() if log is None else Console(file=cast(IO[str], Tee(sys.stdout, log)))
    print_headlines(headlines_of(data), out)
    for comparison in comparisons_of(data):
        print_comparison(comparison, out)
    if BEST_OF_FILE in data.parts:
        print_best_of(data.parts[BEST_OF_FILE], out)
    if TOXICITY_FILE in data.parts:
        print_toxicity(data.parts[TOXICITY_FILE], out)
    if REWARD_QUALITY_FILE in data.parts:
        print_reward_quality(data.parts[REWARD_QUALITY_FILE], out)
    if HARNESS_FILE in data.parts:
        print_harness(data.parts[HARNESS_FILE], out)
    out.print(f"\nReport: {path.resolve()}", soft_wrap=True, highlight=False)
    if log is not None:
        out.print(f"Log: {log.resolve()}", soft_wrap=True, highlight=False)
    models = [finished for finished in done if finished.step.stage in ("sft", "dpo", "ppo")]
    if models:
        out.print(f"\n{loading_code(Path(models[-1].model))}", soft_wrap=True, markup=False)
