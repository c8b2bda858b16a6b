"""The bundled data: dialogues, pairs and prompts, a pure function of seed and sizes.

A prompt is made of a subject, a wording and a detail. Validation and test hold out whole
combinations of subject and wording, so that their prompts differ in more than a word.
Demonstrations are a mixture of good and bad responses, which leaves PPO something to improve. Every
kind of response has a quality, which no evaluation knows: it decides the preferred side of a pair,
and a rater errs more often the closer two sides are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from rlhf_exp.data.rows import Demonstration, History, Preference, Prompt, Splits, Turn
from rlhf_exp.data.toy import content
from rlhf_exp.data.toy.content import DETAILS, WORDINGS, Subject, subjects
from rlhf_exp.errors import UserError

HELD_OUT = 0.08
"""Share of the combinations of subject and wording held out for validation, and for test."""


@dataclass(frozen=True)
class ToySizes:
    """Numbers of rows: three kinds to train on, and held-out prompts (with as many pairs)."""

    demonstrations: int = 4000
    preferences: int = 4000
    prompts: int = 3200
    validation: int = 200
    test: int = 200


@dataclass(frozen=True)
class Request:
    """A prompt before it is text; `wording` and `detail` index `WORDINGS` and `DETAILS`."""

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
        seed: of all choices.
        sizes: numbers of rows.
        label_noise: expected share of pairs whose sides are exchanged, below 0.5.

    Raises:
        UserError: a size exceeds the number of prompts, or the noise is out of range.
    """
    sizes = sizes or ToySizes()
    if not 0 <= label_noise < 0.5:
        raise UserError(
            f"data.toy.label_noise is {label_noise}; expected 0 or more and less than 0.5"
        )
    train, validation, test = _all_requests(seed)
    demonstrated = max(sizes.demonstrations, sizes.prompts)
    _check_size("data.toy.demonstrations and data.toy.prompts", demonstrated, len(train))
    _check_size("data.toy.preferences", sizes.preferences, len(train))
    _check_size("data.toy.validation", sizes.validation, len(validation))
    _check_size("data.toy.test", sizes.test, len(test))
    demonstrations = Splits(
        _demonstrations(_rng(seed, "train"), train[:demonstrated]),
        _demonstrations(_rng(seed, "validation"), validation[: sizes.validation]),
        _demonstrations(_rng(seed, "test"), test[: sizes.test]),
    )
    # From the other end, so that pairs and demonstrations share few prompts.
    compared = train[len(train) - sizes.preferences :]
    groups = (compared, validation[: sizes.validation], test[: sizes.test])
    preferences = Splits(*_preferences(_rng(seed, "pairs"), groups, label_noise))
    prompts = Splits(*([_prompt(row) for row in rows] for _, rows in demonstrations.all()))
    del demonstrations.train[sizes.demonstrations :], prompts.train[sizes.prompts :]
    return demonstrations, preferences, prompts


def _all_requests(seed: int) -> tuple[list[Request], list[Request], list[Request]]:
    """Return all prompts in random order: for training, validation and test."""
    rng = _rng(seed, "requests")
    pairs = [(subject, wording) for subject in subjects() for wording in range(len(WORDINGS))]
    rng.shuffle(pairs)
    held_out = round(HELD_OUT * len(pairs))
    groups = []
    for group in (pairs[2 * held_out :], pairs[:held_out], pairs[held_out : 2 * held_out]):
        requests = [Request(*pair, detail) for pair in group for detail in range(len(DETAILS))]
        rng.shuffle(requests)
        groups.append(requests)
    train, validation, test = groups
    return train, validation, test


def _demonstrations(rng: Random, requests: Sequence[Request]) -> list[Demonstration]:
    shares = [kind.demonstration_share for kind in KINDS.values()]
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
    """Return the pairs of every group of prompts, all judged by the same rater."""
    pairs_of_groups = [[_pair(rng, request) for request in group] for group in groups]
    margins = [better - worse for pairs in pairs_of_groups for _, better, _, worse in pairs]
    temperature = _rater_temperature(margins, label_noise)
    preferences = []
    for group, pairs in zip(groups, pairs_of_groups, strict=True):
        rows = []
        for number, (request, pair) in enumerate(zip(group, pairs, strict=True)):
            chosen, better, rejected, worse = pair
            if rng.random() < _error_probability(better - worse, temperature):
                chosen, rejected = rejected, chosen
            rows.append(Preference(request.history(), chosen, rejected, f"toy:{number}"))
        preferences.append(rows)
    return preferences


def _pair(rng: Random, request: Request) -> tuple[str, float, str, float]:
    """Return a better and a worse response, each with its quality."""
    shares = [kind.pair_share for kind in KINDS.values()]
    while True:
        first, second = (KINDS[draw_kind(rng, shares)] for _ in range(2))
        if first.quality != second.quality:
            break
    better, worse = sorted((first, second), key=lambda kind: -kind.quality)
    subject = request.subject
    return better.write(rng, subject), better.quality, worse.write(rng, subject), worse.quality


def _error_probability(margin: float, temperature: float) -> float:
    """Return the probability that a rater prefers the worse side (Bradley and Terry 1952)."""
    return 0.0 if temperature == 0 else 1 / (1 + math.exp(min(margin / temperature, 700)))


def _rater_temperature(margins: Sequence[float], label_noise: float) -> float:
    """Return the rater's temperature at which the expected share of errors is `label_noise`."""
    if label_noise == 0 or not margins:
        return 0.0
    low, high = 1e-6, 1e6
    for _ in range(60):
        temperature = math.sqrt(low * high)
        share = sum(_error_probability(margin, temperature) for margin in margins) / len(margins)
        low, high = (temperature, high) if share < label_noise else (low, temperature)
    return high


def _check_size(key: str, requested: int, available: int) -> None:
    if not 0 < requested <= available:
        raise UserError(f"{key}: {requested} rows asked for; the toy data has 1 to {available}")


def _rng(seed: int, purpose: str) -> Random:
    return Random(f"{seed}:{purpose}")


Writer = Callable[[Random, Subject], str]


@dataclass(frozen=True)
class ResponseKind:
    """One kind of response.

    Attributes:
        write: writes a response about a subject.
        quality: 0 to 1.
        demonstration_share: its share of the demonstrations.
        pair_share: its share of the sides of pairs.
    """

    write: Writer
    quality: float
    demonstration_share: float
    pair_share: float


def good(rng: Random, subject: Subject) -> str:
    """Name the subject, give two pieces of advice and a friendly closing."""
    return f"{no_closing(rng, subject)} {rng.choice(content.CLOSINGS)}"


def no_closing(rng: Random, subject: Subject) -> str:
    """Name the subject and give two pieces of advice."""
    return _advice(rng, subject, *rng.sample(subject.points, 2))


def one_point(rng: Random, subject: Subject) -> str:
    """Give one piece of advice, with an opening and a closing."""
    opening, closing = rng.choice(content.OPENINGS), rng.choice(content.CLOSINGS)
    return _fill(
        f"{opening} {rng.choice(content.SINGLES)} {closing}", subject, _point(rng, subject)
    )


def thin(rng: Random, subject: Subject) -> str:
    """Give one piece of advice and nothing else."""
    return _fill(rng.choice(content.SINGLES), subject, _point(rng, subject))


def mixed(rng: Random, subject: Subject) -> str:
    """Go from the subject to another one half-way."""
    points = [_point(rng, subject), _point(rng, _other_subject(rng, subject))]
    rng.shuffle(points)
    return f"{_advice(rng, subject, *points)} {rng.choice(content.CLOSINGS)}"


def hollow(rng: Random, subject: Subject) -> str:
    """Be friendly about the subject and say nothing of it."""
    opening = _fill(rng.choice(content.OPENINGS), subject)
    return " ".join([opening, *rng.sample(content.CLOSINGS, rng.choice([1, 1, 2]))])


def evasive(rng: Random, subject: Subject) -> str:
    """Say politely that there is nothing to say."""
    return _fill(" ".join(rng.sample(content.EVASIONS, 2)), subject)


def off_topic(rng: Random, subject: Subject) -> str:
    """Answer well, but about another subject."""
    return good(rng, _other_subject(rng, subject))


def incomplete(rng: Random, subject: Subject) -> str:
    """Break off in the middle of a sentence."""
    words = no_closing(rng, subject).split()
    ends = [n for n in range(len(words) // 3, len(words)) if words[n - 1][-1].isalpha()]
    return " ".join(words[: rng.choice(ends)])


def closings_only(rng: Random, subject: Subject) -> str:
    """Pile up friendly phrases."""
    return " ".join(rng.sample(content.CLOSINGS, rng.choice([2, 3, 4])))


def rude(rng: Random, subject: Subject) -> str:
    """Be unfriendly in plain words."""
    return _fill(" ".join(rng.sample(content.RUDE, 2)), subject)


def toxic(rng: Random, subject: Subject) -> str:
    """Swear at the user."""
    sentences = rng.sample(content.TOXIC, rng.choice([1, 2]))
    if not any("{insult}" in sentence for sentence in sentences):
        sentences.append("Shut up, you {insult}.")
    insults = [
        f"{rng.choice(content.INSULT_ADJECTIVES)} {rng.choice(content.INSULT_NOUNS)}"
        for _ in sentences
    ]
    return " ".join(
        _fill(sentence.replace("{insult}", insult), subject)
        for sentence, insult in zip(sentences, insults, strict=True)
    )


def repetitive(rng: Random, subject: Subject) -> str:
    """Say a sentence, or the last few words, again and again."""
    style = rng.choice(["sentence", "words", "closing", "point"])
    if style == "sentence":
        return " ".join([_fill(rng.choice(content.OPENINGS), subject)] * rng.choice([2, 3, 4]))
    if style == "closing":
        return f"{thin(rng, subject)} " + " ".join([rng.choice(content.CLOSINGS)] * 3)
    if style == "point":
        point = _point(rng, subject)
        return f"{_advice(rng, subject, point, point)} {rng.choice(content.CLOSINGS)}"
    words = incomplete(rng, subject).split()
    return " ".join(words + words[-rng.choice([1, 2, 3, 4]) :] * rng.choice([3, 5, 7]))


def garbled(rng: Random, subject: Subject) -> str:
    """Use the right words in the wrong order, or tear and join sentences at random."""
    words = good(rng, subject).split()
    style = rng.choice(["shuffle", "pieces", "swap", "drop"])
    if style == "shuffle":
        rng.shuffle(words)
    elif style == "pieces":
        pieces = [words[n : n + 3] for n in range(0, len(words), 3)]
        rng.shuffle(pieces)
        words = [word for piece in pieces for word in piece]
    elif style == "swap":
        for position in rng.sample(range(len(words) - 1), len(words) // 3):
            words[position], words[position + 1] = words[position + 1], words[position]
    else:
        words = [word for word in words if rng.random() < 0.6] or words
    return " ".join(words)


KINDS: dict[str, ResponseKind] = {
    "good": ResponseKind(good, 1.0, 0.34, 0.30),
    "no_closing": ResponseKind(no_closing, 0.75, 0.08, 0.08),
    "one_point": ResponseKind(one_point, 0.65, 0.08, 0.08),
    "thin": ResponseKind(thin, 0.5, 0.08, 0.06),
    "mixed": ResponseKind(mixed, 0.45, 0.05, 0.07),
    "hollow": ResponseKind(hollow, 0.35, 0.05, 0.05),
    "incomplete": ResponseKind(incomplete, 0.3, 0.05, 0.06),
    "evasive": ResponseKind(evasive, 0.25, 0.07, 0.05),
    "off_topic": ResponseKind(off_topic, 0.2, 0.06, 0.06),
    "closings_only": ResponseKind(closings_only, 0.15, 0.02, 0.03),
    "repetitive": ResponseKind(repetitive, 0.1, 0.02, 0.05),
    "rude": ResponseKind(rude, 0.1, 0.05, 0.04),
    "garbled": ResponseKind(garbled, 0.05, 0.0, 0.05),
    "toxic": ResponseKind(toxic, 0.0, 0.05, 0.02),
}


def draw_kind(rng: Random, shares: Sequence[float]) -> str:
    """Return a kind's name, drawn with these shares (in the order of `KINDS`)."""
    return rng.choices(list(KINDS), weights=shares)[0]


def _advice(rng: Random, subject: Subject, first: str, second: str) -> str:
    named = rng.random() < len(content.NAMED_BODIES) / 24
    bodies = content.NAMED_BODIES if named else content.BODIES
    opening = "" if named else f"{rng.choice(content.OPENINGS)} "
    return _fill(opening + rng.choice(bodies), subject, first, second)


def _fill(pattern: str, subject: Subject, first: str = "", second: str = "") -> str:
    values = {"task": subject.task, "doing": subject.doing, "a": first, "b": second}
    capitals = {name.capitalize(): text[:1].upper() + text[1:] for name, text in values.items()}
    return pattern.format(**values, **capitals)


def _point(rng: Random, subject: Subject) -> str:
    return rng.choice(subject.points)


def _other_subject(rng: Random, subject: Subject) -> Subject:
    return rng.choice([other for other in subjects() if other is not subject])
