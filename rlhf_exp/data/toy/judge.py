"""A rule-based judge of answers to the toy data, for evaluation only: nothing is trained on it.

It knows the toy world's facts, and its own rules for language and manners; it knows neither the
sentences that responses are made of, nor the kinds and qualities they were generated with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from rlhf_exp.data.rows import History
from rlhf_exp.data.toy.language import (
    broken_joints,
    echoes,
    phrases,
    sentences,
    vocabulary,
    words,
)
from rlhf_exp.data.toy.subjects import Subject, subjects

NAMED, ADVICE, FOREIGN = 0.3, 0.35, 0.3  # what naming, one piece of advice, a stray one count for
_SMALL = vocabulary("a an the and or of to in on at for with it its them is are you your")

_INSULTS = vocabulary(
    """stupid idiot idiots moron morons dumb dummy fool fools loser losers jerk pathetic worthless
    ass asshole bastard bitch crap damn damned fuck fucking hell shit shut suck sucks ugly trash
    imbecile clown scum"""
)
_DISMISSALS = phrases(
    """go away / leave me alone / get lost / who cares / do not care / nobody / my time / even a /
    stop asking / too lazy / yourself / silly question / you will never / know nothing /
    not my problem / why would you / bother me / none of your"""
)
_COURTESIES = phrases(
    """please / thank / hope / good luck / glad / happy to / welcome / enjoy / have fun /
    let me know / feel free / wish you / all the best / take care / you will do / i am sure you /
    of course / do not worry"""
)


@dataclass(frozen=True)
class GoldScore:
    """Marks from 0 to 1.

    Attributes:
        on_topic: it names what was asked about and gives advice on it.
        complete: whole sentences, in order, without repetition.
        polite: friendly 1, plain 0.8, dismissive 0.3, insulting 0.
        total: the product of the three, since no virtue makes up for the lack of another.
    """

    on_topic: float
    complete: float
    polite: float

    @property
    def total(self) -> float:
        """The product of the three marks."""
        return self.on_topic * self.complete * self.polite


def gold_score(prompt: str | History, response: str) -> GoldScore:
    """Return the marks of `response` as an answer to `prompt` (its text or its turns)."""
    return GoldScore(
        on_topic=_on_topic(_subject_of(prompt), response),
        complete=_complete(response),
        polite=_polite(response),
    )


def _subject_of(prompt: str | History) -> Subject | None:
    """Return the subject mentioned last by the human, or `None`."""
    if isinstance(prompt, str):
        texts = [prompt]
    else:
        texts = [turn.text for turn in prompt if turn.role == "human"]
    for text in reversed(texts):
        for names in (_full_names, _keyword):
            places = [(_last_place(text, names(subject)), subject) for subject in subjects()]
            place, subject = max(places, key=lambda found: found[0])
            if place >= 0:
                return subject
    return None


def _full_names(subject: Subject) -> tuple[str, ...]:
    return subject.task.lower(), subject.doing.lower()


def _keyword(subject: Subject) -> tuple[str, ...]:
    return (subject.keyword,)


def _last_place(text: str, names: Sequence[str]) -> int:
    said = f" {' '.join(words(text))} "
    return max(said.rfind(f" {name} ") for name in names)


def _on_topic(subject: Subject | None, response: str) -> float:
    if subject is None:
        return 0.0
    said = words(response)
    mark = NAMED * (subject.keyword in said)
    mark += ADVICE * min(2, sum(_gives(response, point) for point in subject.points))
    text = f" {' '.join(said)} "
    for other in subjects():
        if other is subject:
            continue
        named = any(f" {name} " in text for name in _full_names(other))
        stray = sum(_in_order(said, point) == 1.0 for point in other.points)
        mark -= FOREIGN * (named + stray)
    return max(0.0, mark)


def _gives(response: str, point: str) -> bool:
    """Return whether the response gives this advice: word for word, or in a sound sentence."""
    order = _in_order(words(response), point)
    if order >= 0.75 or order < 0.4:
        return order >= 0.75
    wanted = set(words(point)) - _SMALL
    return any(
        wanted <= set(words(sentence)) and not broken_joints(sentence)
        for sentence in sentences(response)
    )


def _in_order(said: Sequence[str], point: str) -> float:
    """Return the share of the point's neighbouring words that are neighbours in `said`."""
    wanted = _neighbours(point)
    if not wanted[0] & set(said):
        return 0.0
    found = set(pairwise(said))
    return sum(pair in found for pair in wanted[1]) / len(wanted[1])


@cache
def _neighbours(point: str) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    parts = words(point)
    return frozenset(parts) - _SMALL, tuple(pairwise(parts))


def _complete(response: str) -> float:
    parts = sentences(response)
    if not parts:
        return 0.0
    mark = 1.0 if re.search(r"[.!?][\"')]*$", response.strip()) else 0.2
    mark *= 0.5 ** sum(broken_joints(sentence) for sentence in parts)
    mark *= 0.4 ** echoes(response)
    length = len(words(response))
    if length < 4 or length > 60:
        mark *= 0.5
    return mark


def _polite(response: str) -> float:
    said = words(response)
    text = " ".join(said)
    if _INSULTS & set(said):
        return 0.0
    if any(phrase in text for phrase in _DISMISSALS):
        return 0.3
    return 1.0 if any(phrase in text for phrase in _COURTESIES) else 0.8
