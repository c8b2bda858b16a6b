"""The responses of the toy world, good and bad, with the quality each is generated for.

The qualities decide which side of a pair is preferred and how often a rater errs; no evaluation
knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from rlhf_exp.data.toy import phrases
from rlhf_exp.data.toy.subjects import Subject, subjects

Writer = Callable[[Random, Subject], str]


@dataclass(frozen=True)
class Kind:
    """One kind of response.

    Attributes:
        write: makes one for a subject.
        quality: 0 to 1.
        shown: its share of the demonstrations.
        compared: its share of the sides of pairs.
    """

    write: Writer
    quality: float
    shown: float
    compared: float


def good(rng: Random, subject: Subject) -> str:
    """Name the subject, give two pieces of advice and a friendly closing."""
    return f"{no_closing(rng, subject)} {rng.choice(phrases.CLOSINGS)}"


def no_closing(rng: Random, subject: Subject) -> str:
    """Name the subject and give two pieces of advice."""
    return _advice(rng, subject, *rng.sample(subject.points, 2))


def one_point(rng: Random, subject: Subject) -> str:
    """Give one piece of advice, with an opening and a closing."""
    opening, closing = rng.choice(phrases.OPENINGS), rng.choice(phrases.CLOSINGS)
    return _fill(
        f"{opening} {rng.choice(phrases.SINGLES)} {closing}", subject, _point(rng, subject)
    )


def thin(rng: Random, subject: Subject) -> str:
    """Give one piece of advice and nothing else."""
    return _fill(rng.choice(phrases.SINGLES), subject, _point(rng, subject))


def mixed(rng: Random, subject: Subject) -> str:
    """Go from the subject to another one half-way."""
    points = [_point(rng, subject), _point(rng, _other(rng, subject))]
    rng.shuffle(points)
    return f"{_advice(rng, subject, *points)} {rng.choice(phrases.CLOSINGS)}"


def hollow(rng: Random, subject: Subject) -> str:
    """Be friendly about the subject and say nothing of it."""
    opening = _fill(rng.choice(phrases.OPENINGS), subject)
    return " ".join([opening, *rng.sample(phrases.CLOSINGS, rng.choice([1, 1, 2]))])


def evasive(rng: Random, subject: Subject) -> str:
    """Say politely that there is nothing to say."""
    return _fill(" ".join(rng.sample(phrases.EVASIONS, 2)), subject)


def off_topic(rng: Random, subject: Subject) -> str:
    """Answer well, but about another subject."""
    return good(rng, _other(rng, subject))


def incomplete(rng: Random, subject: Subject) -> str:
    """Break off in the middle of a sentence."""
    words = no_closing(rng, subject).split()
    ends = [n for n in range(len(words) // 3, len(words)) if words[n - 1][-1].isalpha()]
    return " ".join(words[: rng.choice(ends)])


def closings_only(rng: Random, subject: Subject) -> str:
    """Pile up friendly phrases."""
    return " ".join(rng.sample(phrases.CLOSINGS, rng.choice([2, 3, 4])))


def rude(rng: Random, subject: Subject) -> str:
    """Be unfriendly in plain words."""
    return _fill(" ".join(rng.sample(phrases.RUDE, 2)), subject)


def toxic(rng: Random, subject: Subject) -> str:
    """Swear at the user."""
    sentences = rng.sample(phrases.TOXIC, rng.choice([1, 2]))
    if not any("{insult}" in sentence for sentence in sentences):
        sentences.append("Shut up, you {insult}.")
    insults = [
        f"{rng.choice(phrases.INSULT_ADJECTIVES)} {rng.choice(phrases.INSULT_NOUNS)}"
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
        return " ".join([_fill(rng.choice(phrases.OPENINGS), subject)] * rng.choice([2, 3, 4]))
    if style == "closing":
        return f"{thin(rng, subject)} " + " ".join([rng.choice(phrases.CLOSINGS)] * 3)
    if style == "point":
        point = _point(rng, subject)
        return f"{_advice(rng, subject, point, point)} {rng.choice(phrases.CLOSINGS)}"
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
        for place in rng.sample(range(len(words) - 1), len(words) // 3):
            words[place], words[place + 1] = words[place + 1], words[place]
    else:
        words = [word for word in words if rng.random() < 0.6] or words
    return " ".join(words)


KINDS: dict[str, Kind] = {
    "good": Kind(good, 1.0, 0.34, 0.30),
    "no_closing": Kind(no_closing, 0.75, 0.08, 0.08),
    "one_point": Kind(one_point, 0.65, 0.08, 0.08),
    "thin": Kind(thin, 0.5, 0.08, 0.06),
    "mixed": Kind(mixed, 0.45, 0.05, 0.07),
    "hollow": Kind(hollow, 0.35, 0.05, 0.05),
    "incomplete": Kind(incomplete, 0.3, 0.05, 0.06),
    "evasive": Kind(evasive, 0.25, 0.07, 0.05),
    "off_topic": Kind(off_topic, 0.2, 0.06, 0.06),
    "closings_only": Kind(closings_only, 0.15, 0.02, 0.03),
    "repetitive": Kind(repetitive, 0.1, 0.02, 0.05),
    "rude": Kind(rude, 0.1, 0.05, 0.04),
    "garbled": Kind(garbled, 0.05, 0.0, 0.05),
    "toxic": Kind(toxic, 0.0, 0.05, 0.02),
}


def draw_kind(rng: Random, shares: Sequence[float]) -> str:
    """Return a kind's name, drawn with these shares (in the order of `KINDS`)."""
    return rng.choices(list(KINDS), weights=shares)[0]


def _advice(rng: Random, subject: Subject, first: str, second: str) -> str:
    named = rng.random() < len(phrases.NAMED_BODIES) / 24
    bodies = phrases.NAMED_BODIES if named else phrases.BODIES
    opening = "" if named else f"{rng.choice(phrases.OPENINGS)} "
    return _fill(opening + rng.choice(bodies), subject, first, second)


def _fill(pattern: str, subject: Subject, first: str = "", second: str = "") -> str:
    values = {"task": subject.task, "doing": subject.doing, "a": first, "b": second}
    capitals = {name.capitalize(): text[:1].upper() + text[1:] for name, text in values.items()}
    return pattern.format(**values, **capitals)


def _point(rng: Random, subject: Subject) -> str:
    return rng.choice(subject.points)


def _other(rng: Random, subject: Subject) -> Subject:
    return rng.choice([other for other in subjects() if other is not subject])
