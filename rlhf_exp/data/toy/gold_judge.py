"""A rule-based judge of answers to the toy data, for evaluation only: nothing is trained on it.

It knows the toy world's facts, and its own rules for language and manners; it knows neither the
sentences that responses are made of, nor the kinds and qualities they were generated with.

Rules of thumb for sound English sentences: enough to tell them from word salad.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from rlhf_exp.data.rows import History
from rlhf_exp.data.toy.content import Subject, subjects


def words(text: str) -> list[str]:
    """Return the words in lower case."""
    return re.findall(r"[a-z0-9']+", text.lower())


def sentences(text: str) -> list[str]:
    """Return the sentences, the last one even if it is not ended."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words(part)]


def vocabulary(text: str) -> frozenset[str]:
    """Return the words of `text` as a set."""
    return frozenset(words(text))


def phrases(text: str) -> tuple[str, ...]:
    """Return the phrases of `text`, which a slash parts."""
    return tuple(" ".join(words(phrase)) for phrase in text.split("/"))


_ARTICLES = vocabulary("a an the every")
_PREPOSITIONS = vocabulary("of at for with from by into to about")
_JOINERS = vocabulary("and or but")
_HELPERS = vocabulary("is are was can could should would will")
_PRONOUNS = vocabulary("i you we they he she")
_SMALL = _ARTICLES | _PREPOSITIONS | _JOINERS | _HELPERS | _PRONOUNS
_LIGHT = _SMALL | vocabulary("it its in on them your this that be do so")
# No English clause goes on like this.
_BREAKS = (
    (_ARTICLES, _SMALL),
    (_PREPOSITIONS, _JOINERS | _HELPERS | _PREPOSITIONS),
    (_JOINERS, _JOINERS),
    (_HELPERS, _HELPERS | vocabulary("from by into")),
    (_PRONOUNS, _ARTICLES),
)
_NO_LAST_WORD = _ARTICLES | _JOINERS | vocabulary("of to your my than very")
_LONGEST = 30  # words of a sentence


def broken_joints(sentence: str) -> int:
    """Return how many places of a sentence no careful writer would have left so."""
    written = re.findall(r"[A-Za-z0-9']+", sentence)
    said = [word.lower() for word in written]
    broken = sum(
        any(left in first and right in second for first, second in _BREAKS)
        for left, right in pairwise(said)
    )
    broken += not written[0][0].isupper() and not written[0][0].isdigit()
    broken += sum(word[0].isupper() and word.lower() in _common() for word in written[1:])
    broken += said[-1] in _NO_LAST_WORD
    broken += len(re.findall(r"[,;:.]\s*[,;:.]|\s[,;.!?]|[,;:]$", sentence.strip()))
    return broken + (len(said) > _LONGEST)


def echoes(text: str) -> int:
    """Return how often the text repeats itself: a word at once, a phrase or a sentence."""
    said = words(text)
    stutters = sum(left == right for left, right in pairwise(said))
    runs = [said[start : start + size] for size in (3, 4) for start in range(len(said) - size + 1)]
    heavy = [" ".join(run) for run in runs if sum(word not in _LIGHT for word in run) > 1]
    parts = [" ".join(words(sentence)) for sentence in sentences(text)]
    return stutters + len(heavy) - len(set(heavy)) + len(parts) - len(set(parts))


@cache
def _common() -> frozenset[str]:
    """Return words that are never names; "I" is always written so."""
    known = {word for subject in subjects() for point in subject.points for word in words(point)}
    capital = {
        word.lower() for subject in subjects() for word in subject.task.split() if word[0].isupper()
    }
    return frozenset((known | _SMALL) - {"i"} - capital)


NAMED, ADVICE, FOREIGN = 0.3, 0.35, 0.3  # what naming, one piece of advice, a stray one count for
_FUNCTION_WORDS = vocabulary("a an the and or of to in on at for with it its them is are you your")

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
    wanted = set(words(point)) - _FUNCTION_WORDS
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
    return frozenset(parts) - _FUNCTION_WORDS, tuple(pairwise(parts))


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
