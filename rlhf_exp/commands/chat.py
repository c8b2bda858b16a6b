"""`rlhf-exp chat RUN [--against sft]`: talk to a run's model, or to two at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_exp.batch import Prompts
from rlhf_exp.commands.runs import POLICIES, Outputs
from rlhf_exp.data.codec import Codec
from rlhf_exp.data.rows import Turn
from rlhf_exp.data.visible import visible
from rlhf_exp.models.load import load_causal_lm, load_tokenizer
from rlhf_exp.rollout.sampler import Sampling, sample
from rlhf_exp.rollout.stops import Stopper
from rlhf_exp.store.artifact import Artifact

HELP = "Type a message; an empty line starts a new conversation, Ctrl-D ends."


@dataclass
class Speaker:
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
    def of(cls, artifact: Artifact, name: str) -> Speaker:
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
        settings = Sampling(
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
    found = Outputs(outputs)
    first = found.policy(run)
    speakers = [Speaker.of(first, first.stage)]
    if against is not None:
        role = against if against in POLICIES else None
        second = found.policy(run if role else against, role)
        speakers.append(Speaker.of(second, second.stage if role else against))
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
