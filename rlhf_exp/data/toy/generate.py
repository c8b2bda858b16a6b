"""The bundled data: dialogues, pairs and prompts, a pure function of seed and sizes.

A prompt is a subject, a wording and a detail. Validation and test hold out whole combinations of
subject and wording, so that their prompts are new in more than a word. Demonstrations are a mixture
of good and bad responses, which leaves PPO something to improve; pairs are labelled by a rater who
errs the more easily, the closer the two sides are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from rlhf_exp.data.rows import Demonstration, History, Preference, Prompt, Splits, Turn
from rlhf_exp.data.toy.phrases import DETAILS, WORDINGS
from rlhf_exp.data.toy.responses import KINDS, draw_kind
from rlhf_exp.data.toy.subjects import Subject, subjects
from rlhf_exp.errors import UserError

HELD_OUT = 0.08  # share of the combinations of subject and wording, for validation and test each


@dataclass(frozen=True)
class ToySizes:
    """How many rows: three kinds to train on, and prompts (with as many pairs) held out."""

    demonstrations: int = 4000
    preferences: int = 4000
    prompts: int = 3200
    validation: int = 200
    test: int = 200


@dataclass(frozen=True)
class Request:
    """A prompt before it is written out; `wording` and `detail` are numbers of their lists."""

    subject: Subject
    wording: int
    detail: int

    def history(self) -> History:
        """Return the prompt's turns."""
        turns = []
        for number, pattern in enumerate(WORDINGS[self.wording]):
            text = pattern.format(
                task=self.subject.task, doing=self.subject.doing, detail=DETAILS[self.detail]
            )
            turns.append(Turn("assistant" if number % 2 else "human", text))
        return tuple(turns)


ToyRows = tuple[Splits[Demonstration], Splits[Preference], Splits[Prompt]]


def corpus_rows(seed: int, sizes: ToySizes | None = None, label_noise: float = 0.12) -> ToyRows:
    """Return demonstrations, preferences and prompts in their splits.

    Every prompt's `original` is its demonstration; the prompts to train on begin with those of the
    demonstrations.

    Args:
        seed: decides everything.
        sizes: numbers of rows.
        label_noise: expected share of pairs whose sides are exchanged, below 0.5.

    Raises:
        UserError: more prompts are asked for than there are, or the noise is out of range.
    """
    sizes = sizes or ToySizes()
    if not 0 <= label_noise < 0.5:
        raise UserError(
            f"data.toy.label_noise is {label_noise}; expected 0 or more and less than 0.5"
        )
    train, validation, test = _requests(seed)
    shown = max(sizes.demonstrations, sizes.prompts)
    _check("data.toy.demonstrations and data.toy.prompts", shown, len(train))
    _check("data.toy.preferences", sizes.preferences, len(train))
    _check("data.toy.validation", sizes.validation, len(validation))
    _check("data.toy.test", sizes.test, len(test))
    demonstrations = Splits(
        _demonstrations(_rng(seed, "train"), train[:shown]),
        _demonstrations(_rng(seed, "validation"), validation[: sizes.validation]),
        _demonstrations(_rng(seed, "test"), test[: sizes.test]),
    )
    # From the far end, so that pairs and demonstrations share few prompts.
    compared = train[len(train) - sizes.preferences :]
    groups = (compared, validation[: sizes.validation], test[: sizes.test])
    preferences = Splits(*_preferences(_rng(seed, "pairs"), groups, label_noise))
    prompts = Splits(*([_prompt(row) for row in rows] for _, rows in demonstrations.all()))
    del demonstrations.train[sizes.demonstrations :], prompts.train[sizes.prompts :]
    return demonstrations, preferences, prompts


def _requests(seed: int) -> tuple[list[Request], list[Request], list[Request]]:
    """Return all requests in random order: for training, validation and test."""
    rng = _rng(seed, "requests")
    pairs = [(subject, wording) for subject in subjects() for wording in range(len(WORDINGS))]
    rng.shuffle(pairs)
    aside = round(HELD_OUT * len(pairs))
    groups = []
    for group in (pairs[2 * aside :], pairs[:aside], pairs[aside : 2 * aside]):
        requests = [Request(*pair, detail) for pair in group for detail in range(len(DETAILS))]
        rng.shuffle(requests)
        groups.append(requests)
    train, validation, test = groups
    return train, validation, test


def _demonstrations(rng: Random, requests: Sequence[Request]) -> list[Demonstration]:
    shares = [kind.shown for kind in KINDS.values()]
    rows = []
    for number, request in enumerate(requests):
        response = KINDS[draw_kind(rng, shares)].write(rng, request.subject)
        rows.append(Demonstration(request.history(), response, f"toy:{number}"))
    return rows


def _prompt(row: Demonstration) -> Prompt:
    return Prompt(row.history, row.response, row.origin)


def _preferences(
    rng: Random, groups: Sequence[Sequence[Request]], label_noise: float
) -> list[list[Preference]]:
    """Return the pairs of every group of requests, all judged by the same rater."""
    drawn = [[_pair(rng, request) for request in group] for group in groups]
    margins = [better - worse for pairs in drawn for _, better, _, worse in pairs]
    temperature = _temperature(margins, label_noise)
    result = []
    for group, pairs in zip(groups, drawn, strict=True):
        rows = []
        for number, (request, pair) in enumerate(zip(group, pairs, strict=True)):
            chosen, better, rejected, worse = pair
            if rng.random() < _error(better - worse, temperature):
                chosen, rejected = rejected, chosen
            rows.append(Preference(request.history(), chosen, rejected, f"toy:{number}"))
        result.append(rows)
    return result


def _pair(rng: Random, request: Request) -> tuple[str, float, str, float]:
    """Return a better and a worse response, each with its quality."""
    shares = [kind.compared for kind in KINDS.values()]
    while True:
        first, second = (KINDS[draw_kind(rng, shares)] for _ in range(2))
        if first.quality != second.quality:
            break
    better, worse = sorted((first, second), key=lambda kind: -kind.quality)
    subject = request.subject
    return better.write(rng, subject), better.quality, worse.write(rng, subject), worse.quality


def _error(margin: float, temperature: float) -> float:
    """Return how likely a rater prefers the worse side (Bradley and Terry 1952)."""
    return 0.0 if temperature == 0 else 1 / (1 + math.exp(min(margin / temperature, 700)))


def _temperature(margins: Sequence[float], label_noise: float) -> float:
    """Return the rater's temperature at which the expected share of errors is `label_noise`."""
    if label_noise == 0 or not margins:
        return 0.0
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        share = sum(_error(margin, middle) for margin in margins) / len(margins)
        low, high = (middle, high) if share < label_noise else (low, middle)
    return high


def _check(key: str, wanted: int, available: int) -> None:
    if not 0 < wanted <= available:
        raise UserError(f"{key}: {wanted} rows asked for; the toy data has 1 to {available}")


def _rng(seed: int, purpose: str) -> Random:
    return Random(f"{seed}:{purpose}")
