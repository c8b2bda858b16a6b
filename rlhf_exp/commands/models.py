"""`rlhf-exp chat RUN` talks to a run's model, or to two at once; `export RUN DIR` copies the model.

An exported folder is a plain Hugging Face model with its model card (`model_card.py`).
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
from rlhf_exp.commands.hub_upload import create_repository, upload
from rlhf_exp.commands.model_card import model_card
from rlhf_exp.commands.runs import POLICIES, OutputFolder
from rlhf_exp.data.rows import Turn
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import end_token_ids, load_causal_lm, load_tokenizer
from rlhf_exp.rollout.decoder import CacheKind
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.safe_text import visible, well_formed
from rlhf_exp.stages.context import SNAPSHOTS, snapshot_name
from rlhf_exp.store.artifact import Artifact

CHAT_HELP = "Type a message; an empty line starts a new conversation, Ctrl-D ends."
NOT_UTF8 = "(bytes that are no UTF-8 are read as \ufffd; a terminal in UTF-8 sends none)"
# The value function is used in training only.
_IGNORED_FILES = shutil.ignore_patterns("value_head.safetensors", "value_model")


def chat(
    outputs: Path,
    run: str,
    against: str | None,
    temperature: float,
    seed: int,
    lines: Iterable[str] | None = None,
) -> None:
    """Answer each line of the standard input, with one model or two.

    Args:
        outputs: The output folder.
        run: The run whose policy answers.
        against: A second model: a role of the same run, or another run.
        temperature: Of sampling; 0 takes the most probable token.
        seed: Of sampling.
        lines: Messages; the standard input by default.
    """
    folder = OutputFolder(outputs)
    first = folder.policy(run)
    speakers = [ChatModel.of(first, first.stage)]
    if against is not None:
        role = against if against in POLICIES else None
        second = folder.policy(run if role else against, role)
        speakers.append(ChatModel.of(second, second.stage if role else against))
    print(CHAT_HELP, file=sys.stderr)
    for line in lines if lines is not None else _typed_lines():
        message = well_formed(line.strip())
        if message != line.strip():
            print(NOT_UTF8, file=sys.stderr)
        if not message:
            for speaker in speakers:
                speaker.history = ()
            print("(a new conversation)", file=sys.stderr)
            continue
        for speaker in speakers:
            print(f"{speaker.name}> {visible(speaker.answer(message, temperature, seed))}")


def _typed_lines() -> Iterable[str]:
    while True:
        try:
            yield input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return


@dataclass
class ChatModel:
    """One model in a conversation of its own.

    Attributes:
        name: Shown before its answers.
        model: The policy.
        codec: Its tokenizer and prompt format.
        seq_length: Most tokens of prompt and answer together.
        max_new_tokens: Most tokens of an answer.
        cache: Kind of cache that sampling uses.
        history: The conversation so far.
    """

    name: str
    model: PreTrainedModel
    codec: Codec
    seq_length: int
    max_new_tokens: int
    cache: CacheKind = "slots"
    history: tuple[Turn, ...] = ()

    @classmethod
    def of(cls, artifact: Artifact, name: str) -> ChatModel:
        """Load the model of an artifact."""
        artifact.verify(lambda name: name.startswith("model/"))
        config, folder = artifact.manifest.config, artifact.path / "model"
        codec = Codec(load_tokenizer(folder), config["data"]["format"], end_token_ids(folder))
        new = config["ppo"]["generation"]["max_new_tokens"]
        # Results from before the field existed were sampled with slots.
        cache = config["model"].get("cache", "slots")
        return cls(name, load_causal_lm(folder), codec, config["ppo"]["seq_length"], new, cache)

    def answer(self, message: str, temperature: float, seed: int) -> str:
        """Return the answer to `message`; the prompt's beginning is cut if it is too long."""
        self.history = (*self.history, Turn("human", message))
        ids = self.codec.encode_prompt(self.history)[-(self.seq_length - self.max_new_tokens) :]
        index = torch.tensor([len(self.history)])
        prompts = Prompts(torch.tensor([ids]), torch.tensor([len(ids)]), index, index)
        settings = SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=temperature or 1.0,
            batch=1,
            eos_id=self.codec.eos_id,
            end_ids=self.codec.end_ids,
            pad_id=self.codec.pad_id,
            greedy=temperature == 0.0,
            cache=self.cache,
        )
        stopper = Stopper(self.codec.tokenizer, self.codec.stop_strings)
        samples = sample(self.model, prompts, settings, seed, stopper)
        start, length = int(samples.prompt_lengths[0]), int(samples.content_lengths[0])
        text = self.codec.decode(samples.tokens[0, start : start + length].tolist()).strip()
        self.history = (*self.history, Turn("assistant", text))
        return text


def export(
    outputs: Path,
    run: str,
    folder: Path,
    step: int | None = None,
    push: str | None = None,
    private: bool = False,
) -> str:
    """Copy the model of `run` into `folder` and write its card.

    Args:
        outputs: The output folder.
        run: The run.
        folder: An empty folder, or a new one.
        step: Optimizer step of a snapshot to export instead of the published model.
        push: A repository of the Hugging Face hub that gets the folder's content, too.
        private: Whether the repository, if it is new, is private.

    Returns:
        The folder, and the address of the commit if it was pushed.

    Raises:
        UserError: The run has no policy or no such snapshot, `folder` is not empty, or the hub
            refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name another one")
    output_folder = OutputFolder(outputs)
    artifact = output_folder.policy(run)
    source = artifact.path / "model" if step is None else _snapshot_folder(artifact, step)
    prefix = f"{source.relative_to(artifact.path).as_posix()}/"
    artifact.verify(lambda name: name.startswith(prefix))
    if push is not None:
        create_repository(push, private)  # before a large model is copied
    shutil.copytree(source, folder, ignore=_IGNORED_FILES, dirs_exist_ok=True)
    name, chain = output_folder.run(run, POLICIES).name, output_folder.artifacts(run, POLICIES)
    card = model_card(artifact, chain, name, push, step)
    (folder / "README.md").write_text(card, encoding="utf-8")
    exported = str(folder.resolve())
    if push is None:
        return exported
    return f"{exported}\n{upload(push, folder, f'{artifact.stage} {artifact.key}')}"


def _snapshot_folder(artifact: Artifact, step: int) -> Path:
    """Return the folder of the model after an optimizer step."""
    published = int(artifact.manifest.metrics.get("published_step", -1))
    if step == published:
        return artifact.path / "model"
    folder = artifact.path / SNAPSHOTS
    if (folder / snapshot_name(step)).is_dir():
        return folder / snapshot_name(step)
    steps = sorted({published, *(int(path.name[5:]) for path in folder.glob("step-*"))})
    raise UserError(
        f"--step {step}: {artifact.stage} {artifact.key} holds no model of that step, only of "
        f"{', '.join(map(str, steps))}; {artifact.stage}.keep_every asks for more"
    )
