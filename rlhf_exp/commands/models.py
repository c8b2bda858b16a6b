"""`rlhf-exp chat RUN [--against sft]`: talk to a run's model, or to two at once.

`rlhf-exp export RUN DIR`: a run's model as a plain Hugging Face folder with its model card.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_exp.batch import Prompts
from rlhf_exp.commands.runs import POLICIES, OutputFolder
from rlhf_exp.data.rows import Turn
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import load_causal_lm, load_tokenizer
from rlhf_exp.report.run.gather import loading_code
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.safe_text import visible
from rlhf_exp.stages.context import SNAPSHOTS, snapshot_name
from rlhf_exp.store.artifact import Artifact

HELP = "Type a message; an empty line starts a new conversation, Ctrl-D ends."


@dataclass
class ChatModel:
    """One model in a conversation of its own.

    Attributes:
        name: What to call it.
        model: The model.
        codec: Its codec.
        room: Tokens of prompt and response together.
        max_new_tokens: Longest answer.
        history: The conversation so far.
    """

    name: str
    model: PreTrainedModel
    codec: Codec
    room: int
    max_new_tokens: int
    history: tuple[Turn, ...] = ()

    @classmethod
    def of(cls, artifact: Artifact, name: str) -> ChatModel:
        """Load the model of an artifact."""
        config, folder = artifact.manifest.config, artifact.path / "model"
        codec = Codec(load_tokenizer(folder), config["data"]["format"])
        new = config["ppo"]["generation"]["max_new_tokens"]
        return cls(name, load_causal_lm(folder), codec, config["ppo"]["seq_length"], new)

    def answer(self, message: str, temperature: float, seed: int) -> str:
        """Return the answer to `message`; old turns are forgotten where they no longer fit."""
        self.history = (*self.history, Turn("human", message))
        ids = self.codec.encode_prompt(self.history)[-(self.room - self.max_new_tokens) :]
        number = torch.tensor([len(self.history)])
        prompts = Prompts(torch.tensor([ids]), torch.tensor([len(ids)]), number, number)
        settings = SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=temperature or 1.0,
            batch=1,
            eos_id=self.codec.eos_id,
            pad_id=self.codec.pad_id,
            greedy=temperature == 0.0,
        )
        stopper = Stopper(self.codec.tokenizer, self.codec.stop_strings)
        samples = sample(self.model, prompts, settings, seed, stopper)
        start, length = int(samples.prompt_lengths[0]), int(samples.content_lengths[0])
        text = self.codec.decode(samples.tokens[0, start : start + length].tolist()).strip()
        self.history = (*self.history, Turn("assistant", text))
        return text


def chat(
    outputs: Path,
    run: str,
    against: str | None,
    temperature: float,
    seed: int,
    lines: Iterable[str] | None = None,
) -> None:
    """Answer each line of the standard input.

    Args:
        outputs: The output folder.
        run: The run whose policy answers.
        against: A second model: a role of the same run, or another run.
        temperature: Of sampling; 0 takes the most probable token.
        seed: Of sampling.
        lines: Messages; the standard input by default.
    """
    found = OutputFolder(outputs)
    first = found.policy(run)
    speakers = [ChatModel.of(first, first.stage)]
    if against is not None:
        role = against if against in POLICIES else None
        second = found.policy(run if role else against, role)
        speakers.append(ChatModel.of(second, second.stage if role else against))
    print(HELP, file=sys.stderr)
    for line in lines if lines is not None else _typed():
        message = line.strip()
        if not message:
            for speaker in speakers:
                speaker.history = ()
            print("(a new conversation)", file=sys.stderr)
            continue
        for speaker in speakers:
            print(f"{speaker.name}> {visible(speaker.answer(message, temperature, seed))}")


def _typed() -> Iterable[str]:
    while True:
        try:
            yield input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return


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
    found = OutputFolder(outputs)
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
