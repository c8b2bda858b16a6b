"""What results in the store do not hold although it is asked for now."""

from __future__ import annotations

from rlhf_exp.config.root import Config
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.pipeline.plan import State, Step


def lacking_extras(config: Config, steps: list[Step]) -> list[str]:
    """Return a sentence for each result in the store that lacks what it is to hold besides.

    Snapshots and the state are in no key: asking for them does not train again what is there.
    """
    lines = []
    for step in steps:
        if step.state != State.cached or step.artifact is None or step.stage == "eval":
            continue
        section: TrainingConfig = getattr(config, step.stage)
        made = step.artifact.manifest.config.get(step.stage, {})
        wanted: dict[str, object] = {
            "keep_every": section.keep_every,
            "keep": [one.name for one in section.keep],
        }
        if step.stage == "ppo":
            wanted["keep_state"] = config.ppo.keep_state
        lacks = [
            f"{step.stage}.{name}"
            for name, value in wanted.items()
            if value and made.get(name) != value
        ]
        if lacks:
            lines.append(
                f"{step.stage} {step.key} is in the store without what {' and '.join(lacks)} "
                f"asks for; rerun=[{step.stage}] makes it again with it"
            )
    return lines
