"""Finding a run's artifacts below an output folder."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.records import Records, RunRecord
from rlhf_exp.store.store import Store

POLICIES = ("ppo", "sft")


class Outputs:
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

    def artifacts(self, run: str) -> dict[str, Artifact]:
        """Return the results of a run by stage, in the order they were made.

        Raises:
            UserError: There is no such run, or none of its results is in the store.
        """
        record = self.run(run)
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
