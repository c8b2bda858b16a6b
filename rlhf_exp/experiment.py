"""One experiment from its config to its report: plan, run, record, evaluate, tell."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.executor import StageExecutor, executor_for, follow, settled_place
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.pipeline.plan import Step, StepState, plan, records_of, refuse_changed
from rlhf_exp.pipeline.plan_table import memory_table, plan_table
from rlhf_exp.pipeline.preflight import lacking_extras, preflight, reward_ready
from rlhf_exp.pipeline.probe import probe, probe_table
from rlhf_exp.pipeline.run import FinishedStep, run_steps
from rlhf_exp.processes.environment import leads
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.run_records import Process, RunRecord, Status

UNNAMED = "unnamed"


def run(
    config: Config,
    overrides: list[str],
    *,
    recorded: bool = True,
    crew: StageExecutor | None = None,
) -> float | None:
    """Run an experiment, or print its plan.

    Args:
        config: The experiment, checked.
        overrides: The command line, for the record.
        recorded: Whether it is a run of its own, with a record and a report, and not only brings up
            to date what runs share.
        crew: Who does the stages; by default who the config and the surroundings say.

    Returns:
        What a search maximises: the last training stage's objective on validation data.

    Raises:
        UserError: Something the user can mend.
        KeyboardInterrupt: The user stopped the run; a checkpoint holds what was done.
    """
    config = pinned(config)
    if config.plan:
        if leads():
            _show(config, Console(stderr=True))
        return None
    if crew is None:
        place = settled_place(config)
        if place is not None and place.rank:
            return follow(config, place)
        crew = executor_for(config, place)
    objective = None
    try:
        if config.probe:
            _probe(config, crew)
        else:
            objective = _lead(config, overrides, crew, recorded)
    except BaseException as error:
        crew.end(error)
        raise
    crew.end(None, objective)
    return objective


def _show(config: Config, console: Console) -> list[Step]:
    """Print the plan."""
    steps = plan(config)
    console.print(plan_table(steps))
    for line in lacking_extras(config, steps):
        console.print(Text(line))
    if config.plan or config.probe:
        console.print(memory_table(config))
    return steps


def _probe(config: Config, crew: StageExecutor) -> None:
    """Measure a few iterations of each stage asked for, and print what was found."""
    console = Console(stderr=True)
    steps = _show(config, console)
    if any(step.stage == "ppo" and step.state is not StepState.given for step in steps):
        reward_ready(config)
    for probed in probe(config, steps, crew, lambda text: console.print(Text(text))):
        Console().print(probe_table(config, probed))


def _lead(
    config: Config, overrides: list[str], crew: StageExecutor, recorded: bool
) -> float | None:
    """Plan, run with the help of others, record, evaluate, tell; return the objective."""
    console = Console(stderr=True)
    steps = _show(config, console)
    refuse_changed(steps)
    preflight(config, steps)
    if not recorded:
        return _objective(run_steps(config, steps, crew, lambda text: console.print(Text(text))))
    record = RunRecord(
        name=config.name or UNNAMED,
        stage=config.stage.name,
        keys={step.stage: step.key for step in steps},
        overrides=tuple(overrides),
        seed=config.seed,
        status=Status.running,
        process=Process.current(),
    )
    done = _recorded(config, steps, record, crew, console)
    objective = _objective(done)
    records_of(config).write(replace(record, status=Status.done, objective=objective))
    _tell(config, done, console)
    return objective


def _recorded(
    config: Config, steps: list[Step], record: RunRecord, crew: StageExecutor, console: Console
) -> list[FinishedStep]:
    """Run the steps, keeping the run's record true however they end."""
    records = records_of(config)
    records.write(record)
    try:
        return run_steps(config, steps, crew, lambda text: console.print(Text(text)))
    except (KeyboardInterrupt, SystemExit):
        records.write(replace(record, status=Status.interrupted))
        raise
    except UserError as error:
        records.write(replace(record, status=Status.failed, error=str(error)))
        raise
    except Exception:
        records.write(replace(record, status=Status.failed, error=traceback.format_exc()))
        raise


def _objective(done: list[FinishedStep]) -> float | None:
    trained = [one for one in done if one.step.stage != "eval" and one.artifact is not None]
    last = trained[-1].artifact if trained else None
    return None if last is None else last.manifest.objective


def _tell(config: Config, done: list[FinishedStep], console: Console) -> None:
    """Write the report, and print the results, its path and how to load the model."""
    from rlhf_exp.report.run.gather import gather, loading_code
    from rlhf_exp.report.run.page import build_report, comparisons_of
    from rlhf_exp.report.run.reward_quality import REWARD_QUALITY_FILE, print_reward_quality
    from rlhf_exp.report.run.terminal import print_comparison
    from rlhf_exp.report.run.toxicity import TOXICITY_FILE, print_toxicity

    artifacts: dict[str, Artifact] = {
        one.step.stage: one.artifact for one in done if one.artifact is not None
    }
    if not artifacts:
        return
    final = list(artifacts.values())[-1]
    title = config.name or f"{final.stage} {final.key[:8]}"
    trained = [one.step.stage for one in done if one.trained]
    data = gather(title, artifacts, trained)
    path = Path(config.output_dir) / "reports" / f"{final.stage}-{final.key}.html"
    build_report(data, path)
    out = Console()
    for one in comparisons_of(data):
        print_comparison(one, out)
    if TOXICITY_FILE in data.parts:
        print_toxicity(data.parts[TOXICITY_FILE], out)
    if REWARD_QUALITY_FILE in data.parts:
        print_reward_quality(data.parts[REWARD_QUALITY_FILE], out)
    out.print(f"\nReport: {path.resolve()}", soft_wrap=True, highlight=False)
    models = [one for one in done if one.step.stage in ("sft", "ppo")]
    if models:
        out.print(f"\n{loading_code(Path(models[-1].model))}", soft_wrap=True, markup=False)
