"""Answers of the models under evaluation, and `samples.jsonl`, the file that keeps them.

The file has one line an answer, so that every number of an evaluation can be computed again without
the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rlhf_exp.data.jsonl import UnreadableLine, read_jsonl, unpaired_surrogate
from rlhf_exp.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt.

    Attributes:
        part: the part of the evaluation that sampled it, such as `preference`.
        model: the model's name in tables.
        row: the prompt's number in that part.
        sample: the answer's number among those to the same prompt.
        seed: seed of the noise.
        sampling: how the tokens were drawn: `temperature`, `top_p`, `top_k`, `max_new_tokens`;
            empty where that is not known.
        prompt: the prompt as the model read it.
        text: the answer, without its end-of-sequence token or stop string and outer white space.
        tokens: its length in tokens, those that ended it included.
        finish: `eos`, `stop` or `length`: why it ended.
        score: its reward, if the part needs it.
        referee: its reward by a second reward model, if the part needs it.
        terms: what a sum of rewards is made of, by the terms' names, before weights.
        kl: log-probability under the model minus that under the baseline, in nats, likewise.
        facts: the data's own facts of the prompt; with the first of its answers only.
    """

    part: str
    model: str
    row: int
    sample: int
    seed: int
    prompt: str
    text: str
    tokens: int
    finish: str
    score: float | None = None
    referee: float | None = None
    kl: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)


def sampling_words(sampling: Mapping[str, float | int]) -> str:
    """Return how answers were sampled, in words; empty if unknown."""
    if not sampling:
        return ""
    length = f"up to {sampling['max_new_tokens']} tokens"
    if sampling["temperature"] == 0:
        return f"{length}, the most probable one each time"
    words = f"{length} at temperature {sampling['temperature']:g}"
    if sampling["top_k"]:
        words += f", top-k {sampling['top_k']}"
    return words if sampling["top_p"] == 1 else f"{words}, top-p {sampling['top_p']:g}"


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write one line an answer."""
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for answer in answers:
            handle.write(json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """Read the answers that `write_answers` wrote.

    Raises:
        UserError: a line is not an answer.
    """
    answers = []
    for origin, record in read_jsonl(path, "eval.samples"):
        try:
            if isinstance(record, UnreadableLine):
                raise ValueError(record.reason)
            answers.append(_answer(record))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{origin}: not an answer ({error}); expected a line of the samples.jsonl of an "
                "evaluation"
            ) from error
    return answers


def _answer(record: object) -> Answer:
    """Return the answer in a record.

    Raises:
        ValueError: A field is of another type, or holds half of a surrogate pair.
        TypeError: A field is missing.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object was expected, found {type(record).__name__}")
    known = {item.name for item in fields(Answer)}
    answer = Answer(**{name: record[name] for name in record.keys() & known})
    for name in ("part", "model", "prompt", "text", "finish"):
        value = getattr(answer, name)
        if not isinstance(value, str) or unpaired_surrogate(value):
            raise ValueError(f"`{name}` is {value!r:.80}, text was expected")
    for name in ("row", "sample", "seed", "tokens"):
        if type(getattr(answer, name)) is not int:
            raise ValueError(f"`{name}` is {getattr(answer, name)!r:.80}, an integer was expected")
    for name in ("score", "referee", "kl"):
        if type(getattr(answer, name)) not in {int, float, type(None)}:
            raise ValueError(f"`{name}` is {getattr(answer, name)!r:.80}, a number was expected")
    if not all(isinstance(each, Mapping) for each in (answer.facts, answer.sampling, answer.terms)):
        raise ValueError("`facts`, `sampling` and `terms` are to be JSON objects")
    return answer
