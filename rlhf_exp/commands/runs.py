"""Finding a run's artifacts below an output folder.

Plain text tables for the terminal.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.report.sweep.data import flatten, given, order_of, shown
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.run_records import Records, RunRecord
from rlhf_exp.store.store import Store

POLICIES = ("ppo", "sft")
# A comma before the next key; those inside a value, such as a list, are the value's.
_SEPARATOR = re.compile(r",(?=[A-Za-z_][\w./]*=)")


class OutputFolder:
    """The store and the run records of an `output_dir`.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.records = Records(folder / "sweeps")

    def run(self, run: str) -> RunRecord:
        """Return the run that `run` means: `latest`, a name, a key's beginning, or a folder."""
        return self.records.resolve(run, self.store)

    def select(self, runs: str) -> list[RunRecord]:
        """Return the runs that `runs` means: as `run`, but of a name all points.

        After a colon, values of the command line or config choose among them:
        `kl:ppo.lr=1e-4,ppo.kl.coef=0.1`.

        Raises:
            UserError: There are none.
        """
        if runs == "latest":
            return [self.run(runs)]
        name, colon, wanted = runs.partition(":")
        if not colon or Path(runs).exists():
            return self.records.resolve_all(runs, self.store)
        found = self.records.resolve_all(name, self.store)
        values = given(_SEPARATOR.split(wanted))
        if not values:
            raise UserError(f"{runs}: after the colon, expected KEY=VALUE,... such as ppo.lr=1e-4")
        held = [(record, self._settings(record)) for record in found]
        for key, value in values.items():
            held = _with_value(runs, held, key, value)
        return [record for record, _ in held]

    def _settings(self, record: RunRecord) -> dict[str, str]:
        """Return a run's values by key: its config's, else its command line's."""
        stage, key = list(record.keys.items())[-1]
        artifact = self.store.lookup(stage, key)
        config = {} if artifact is None else flatten(artifact.manifest.config)
        return given(record.overrides) | {name: shown(value) for name, value in config.items()}

    def artifacts(self, run: str) -> dict[str, Artifact]:
        """Return the results of a run by stage, in the order they were made.

        Raises:
            UserError: There is no such run, or none of its results is in the store.
        """
        return self.artifacts_of(self.run(run), run)

    def artifacts_of(self, record: RunRecord, run: str) -> dict[str, Artifact]:
        """Return the results of a record; `run` is what the user calls it. See `artifacts`."""
        found = {
            stage: artifact
            for stage, key in record.keys.items()
            if (artifact := self.store.lookup(stage, key)) is not None
        }
        if not found:
            raise UserError(
                f"{run}: none of the run's results is in {self.store.root} (status: "
                f"{record.status}); run it to the end first"
            )
        # A record of one artifact names that alone: its parents complete the chain.
        order = ("sft", "reward", "ppo", "eval")
        for artifact in list(found.values()):
            for stage, key in artifact.manifest.parents.items():
                # An evaluation's further models are parents too, by other names than a stage's.
                new = stage in order and stage not in found
                parent = self.store.lookup(stage, key) if new else None
                if parent is not None:
                    found[stage] = parent
        return {stage: found[stage] for stage in order if stage in found}

    def policy(self, run: str, role: str | None = None) -> Artifact:
        """Return the artifact of a run's policy: PPO's if there is one, else SFT's.

        Args:
            run: The run.
            role: `sft` or `ppo`, to have that one.

        Raises:
            UserError: The run has none.
        """
        artifacts = self.artifacts(run)
        roles = POLICIES if role is None else (role,)
        for name in roles:
            if name in artifacts:
                return artifacts[name]
        raise UserError(
            f"{run} has no {' or '.join(roles)} model, only {', '.join(artifacts) or 'nothing'}"
        )


def _with_value(
    runs: str, held: list[tuple[RunRecord, dict[str, str]]], key: str, value: str
) -> list[tuple[RunRecord, dict[str, str]]]:
    kept = [pair for pair in held if pair[1].get(key) == value]
    if not kept:
        values = sorted({pair[1][key] for pair in held if key in pair[1]}, key=order_of)
        known = f"it is {', '.join(values)} in them" if values else "none of them has such a key"
        raise UserError(f"{runs}: of {len(held)} runs none has {key}={value}; {known}")
    return kept


WIDTH = 140


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """Return a table as text; cells are shown as they are, whatever markup is in them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH).print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
