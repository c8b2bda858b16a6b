"""`rlhf-exp export RUN DIR`: a run's model as a plain Hugging Face folder with its model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.errors import UserError
from rlhf_exp.report.gather import loading_code
from rlhf_exp.stages.context import SNAPSHOTS, snapshot_name
from rlhf_exp.store.artifact import Artifact

# The value function trains the policy and is of no use to those who only load it.
_LEFT_OUT = shutil.ignore_patterns("value_head.safetensors", "value_model")


def export(outputs: Path, run: str, folder: Path, step: int | None = None) -> Path:
    """Copy the model of `run` into `folder` and write its card.

    Args:
        outputs: The output folder.
        run: The run.
        folder: Empty or not there.
        step: Optimizer step of the snapshot to take instead of the published model.

    Raises:
        UserError: The run has no policy or no such snapshot, or `folder` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name another one")
    found = Outputs(outputs)
    artifact = found.policy(run)
    artifact.verify()
    source = artifact.path / "model" if step is None else _snapshot(artifact, step)
    shutil.copytree(source, folder, ignore=_LEFT_OUT, dirs_exist_ok=True)
    chain = found.artifacts(run)
    (folder / "README.md").write_text(model_card(artifact, chain, folder, step))
    return folder.resolve()


def _snapshot(artifact: Artifact, step: int) -> Path:
    """Return the folder of the model of a step."""
    published = int(artifact.manifest.metrics.get("published_step", -1))
    if step == published:
        return artifact.path / "model"
    folder = artifact.path / SNAPSHOTS
    if (folder / snapshot_name(step)).is_dir():
        return folder / snapshot_name(step)
    there = sorted({published, *(int(path.name[5:]) for path in folder.glob("step-*"))})
    raise UserError(
        f"--step {step}: {artifact.stage} {artifact.key} holds no model of that step, only of "
        f"{', '.join(map(str, there))}; {artifact.stage}.keep_every asks for more"
    )


def model_card(
    artifact: Artifact, chain: dict[str, Artifact], folder: Path, step: int | None = None
) -> str:
    """Return the card: what the model is, how it was trained, what it was measured at."""
    manifest = artifact.manifest
    config = manifest.config
    base = config["model"]["path"]
    head = ["---", "library_name: transformers", "tags: [rlhf, rlhf-exp]"]
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    origin = f"`{base}`" if base else "random weights, with a tokenizer trained on the same data"
    training = "supervised fine-tuning"
    if artifact.stage == "ppo":
        training += " and PPO against " + (
            f"the reward function `{config['ppo']['reward']['function']}`"
            if config["ppo"]["reward"]["function"]
            else "a reward model"
        )
    data = config["data"]["path"] or config["data"]["preferences"] or config["data"]["source"]
    lines = [
        *head,
        "---",
        "",
        f"# {artifact.stage} {artifact.key}",
        "",
        f"Trained with rlhf_exp by {training}, from {origin}.",
        "",
        f"- Data: `{data}`, prompt format `{config['data']['format']}`",
        f"- Made: {manifest.created}, revision {manifest.git.get('revision', 'unknown')}",
        f"- Keys: {', '.join(f'{stage} `{one.key}`' for stage, one in chain.items())}",
        *([] if step is None else [f"- Snapshot: after {step} optimizer steps"]),
        "",
        "## Use",
        "",
        "```python",
        loading_code(folder),
        "```",
        "",
    ]
    if step is not None:  # what was measured is the published model
        return "\n".join(lines)
    lines += ["## Measured", "", "| | |", "|---|---|"]
    for stage, one in chain.items():
        for name, value in sorted(one.manifest.metrics.items()):
            lines.append(f"| {stage} {name} | {value:.4g} |")
    lines += ["", "Scores are relative to this run's own reward model and test prompts.", ""]
    return "\n".join(lines)
