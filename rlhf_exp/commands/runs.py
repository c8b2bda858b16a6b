"""What commands share: an output folder's runs and artifacts by name, and text tables."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import STAGES, Config
from rlhf_exp.config.folders import config_folders
from rlhf_exp.config.overrides import override_problems, prepare, sweep_points
from rlhf_exp.config.problems import raise_problems
from rlhf_exp.config.schema_keys import read_groups
from rlhf_exp.errors import UserError
from rlhf_exp.report.sweep.settings import flatten, format_override, override_values, sort_key
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store

POLICIES = ("ppo", "dpo", "sft")
# A comma before the next key; those inside a value, such as a list, are the value's.
_SEPARATOR = re.compile(r",(?=[A-Za-z_][\w./]*=)")
TABLE_WIDTH = 140


class OutputFolder:
    """An `output_dir`, with its store and its run records.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(path / "store")
        self.records = Records(path / "sweeps")
        self._announced: set[str] = set()

    def run(self, run: str, stages: Sequence[str] = ()) -> RunRecord:
        """Return a run by `latest`, its name, the beginning of its key, or its folder.

        A name that several runs share means the newest that is done, and this is printed to the
        standard error.

        Args:
            run: The run.
            stages: Of several runs of that name, only those with one of these stages count, if any.

        Raises:
            UserError: There is no such run, or several and none of them is what is asked for.
        """
        if run not in self.records.names():
            return self.records.resolve(run, self.store)
        named = self.records.sweep(run)
        usable = [
            record
            for record in named
            if record.status is Status.done and (not stages or set(stages) & record.keys.keys())
        ]
        if len(named) == 1 or not usable:
            return self.records.resolve(run, self.store)
        chosen = usable[-1]
        if run not in self._announced:
            self._announced.add(run)
            settings = " ".join(chosen.overrides)
            print(
                f"{run}: {len(named)} runs have this name; this is the newest that is done, "
                f"{run}/{chosen.key} ({settings or 'no overrides'}). `rlhf-exp status {run}` lists "
                f"them; {run}/KEY names another.",
                file=sys.stderr,
            )
        return chosen

    def select(self, runs: str) -> list[RunRecord]:
        """Return runs as `run` does, but all points of a name.

        After a colon, values of the command line or config select some of them:
        `kl:ppo.lr=1e-4,ppo.kl.coef=0.1`.

        Raises:
            UserError: There are no such runs.
        """
        if runs == "latest":
            return [self.run(runs)]
        name, colon, selection = runs.partition(":")
        if not colon or Path(runs).exists():
            return self.records.resolve_all(runs, self.store)
        records = self.records.resolve_all(name, self.store)
        values = override_values(_SEPARATOR.split(selection))
        if not values:
            raise UserError(f"{runs}: after the colon, expected KEY=VALUE,... such as ppo.lr=1e-4")
        candidates = [(record, self._settings(record)) for record in records]
        for key, value in values.items():
            candidates = _keep_with_value(runs, candidates, key, value)
        return [record for record, _ in candidates]

    def _settings(self, record: RunRecord) -> dict[str, str]:
        """Return a run's values by config key: the config's, else the command line's."""
        stage, key = list(record.keys.items())[-1]
        artifact = self.store.lookup(stage, key)
        config = {} if artifact is None else flatten(artifact.manifest.config)
        overrides = override_values(record.overrides)
        return overrides | {name: format_override(value) for name, value in config.items()}

    def artifacts(self, run: str, stages: Sequence[str] = ()) -> dict[str, Artifact]:
        """Return the artifacts of a run by stage, in the order of the stages.

        Args:
            run: The run.
            stages: Of several runs of that name, only those with one of these stages count, if any.

        Raises:
            UserError: There is no such run, or none of its results is in the store.
        """
        return self.artifacts_of(self.run(run, stages), run)

    def artifacts_of(self, record: RunRecord, run: str) -> dict[str, Artifact]:
        """Return the artifacts of a record, as `artifacts` does; errors name it `run`."""
        artifacts = {
            stage: artifact
            for stage, key in record.keys.items()
            if (artifact := self.store.lookup(stage, key)) is not None
        }
        if not artifacts:
            raise UserError(
                f"{run}: none of the run's results is in {self.store.root} (status: "
                f"{record.status}); run it to the end first"
            )
        # The record of a single artifact has its key only: its parents complete the stages.
        for artifact in list(artifacts.values()):
            for stage, key in artifact.manifest.parents.items():
                # Further models of an evaluation are parents too, under names of their own.
                missing = stage in STAGES and stage not in artifacts
                parent = self.store.lookup(stage, key) if missing else None
                if parent is not None:
                    artifacts[stage] = parent
        return {stage: artifacts[stage] for stage in STAGES if stage in artifacts}

    def policy(self, run: str, role: str | None = None) -> Artifact:
        """Return the artifact of a run's policy: PPO's if there is one, else DPO's, else SFT's.

        Args:
            run: The run.
            role: `sft`, `dpo` or `ppo` for that one.

        Raises:
            UserError: The run has no such policy.
        """
        roles = POLICIES if role is None else (role,)
        artifacts = self.artifacts(run, POLICIES)
        for name in roles:
            if name in artifacts:
                return artifacts[name]
        raise UserError(
            f"{run} has no {' or '.join(roles)} model, only {', '.join(artifacts) or 'nothing'}"
        )


def _keep_with_value(
    runs: str, candidates: list[tuple[RunRecord, dict[str, str]]], key: str, value: str
) -> list[tuple[RunRecord, dict[str, str]]]:
    matches = [pair for pair in candidates if pair[1].get(key) == value]
    if not matches:
        values = sorted({pair[1][key] for pair in candidates if key in pair[1]}, key=sort_key)
        available = (
            f"it is {', '.join(values)} in them" if values else "none of them has such a key"
        )
        raise UserError(f"{runs}: of {len(candidates)} runs none has {key}={value}; {available}")
    return matches


def composed_points(overrides: Sequence[str], config_dir: Path | None) -> Iterator[Config]:
    """Yield the config of a run, or of each point of a multirun.

    Args:
        overrides: As on `launch.py`'s command line.
        config_dir: A further config folder.

    Raises:
        UserError: The command line is wrong.
    """
    folders, others = config_folders(overrides, config_dir)
    groups = read_groups(folders)
    prepared = prepare(others, groups)
    raise_problems(override_problems(prepared, groups))
    for point in sweep_points(prepared):
        yield compose(point, folders).config


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """Return a table as text; markup in cells is not interpreted."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rich_table = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        rich_table.add_row(*(Text(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=TABLE_WIDTH).print(rich_table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
