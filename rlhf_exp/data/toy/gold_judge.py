"""A rule-based judge of answers to the toy data, for evaluation only: nothing is trained on it.

It knows the toy world's facts, and has its own rules for language and manners; it knows neither the
sentences that responses are made of, nor the kinds and qualities they were generated with. The
rules for language tell plain English sentences from word salad, no more.
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


def word_set(text: str) -> frozenset[str]:
    """Return the words of `text` as a set."""
    return frozenset(words(text))


def phrase_list(text: str) -> tuple[str, ...]:
    """Return the phrases of `text`, separated by slashes."""
    return tuple(" ".join(words(phrase)) for phrase in text.split("/"))


_ARTICLES = word_set("a an the every")
_PREPOSITIONS = word_set("of at for with from by into to about")
_CONJUNCTIONS = word_set("and or but")
_AUXILIARIES = word_set("is are was can could should would will")
_PRONOUNS = word_set("i you we they he she")
_CLOSED_CLASS_WORDS = _ARTICLES | _PREPOSITIONS | _CONJUNCTIONS | _AUXILIARIES | _PRONOUNS
_UNCOUNTED_WORDS = _CLOSED_CLASS_WORDS | word_set("it its in on them your this that be do so")
# Pairs of neighbouring words that no English clause has.
_IMPOSSIBLE_PAIRS = (
    (_ARTICLES, _CLOSED_CLASS_WORDS),
    (_PREPOSITIONS, _CONJUNCTIONS | _AUXILIARIES | _PREPOSITIONS),
    (_CONJUNCTIONS, _CONJUNCTIONS),
    (_AUXILIARIES, _AUXILIARIES | word_set("from by into")),
    (_PRONOUNS, _ARTICLES),
)
_NEVER_LAST = _ARTICLES | _CONJUNCTIONS | word_set("of to your my than very")
_MAX_SENTENCE_WORDS = 30
# Marks for naming the subject, for each of two pieces of advice, and off for a foreign one.
SUBJECT_MARK, ADVICE_MARK, FOREIGN_MARK = 0.3, 0.35, 0.3
_FUNCTION_WORDS = word_set("a an the and or of to in on at for with it its them is are you your")
_INSULTS = word_set(
    """stupid idiot idiots moron morons dumb dummy fool fools loser losers jerk pathetic worthless
    ass asshole bastard bitch crap damn damned fuck fucking hell shit shut suck sucks ugly trash
    imbecile clown scum"""
)
_DISMISSALS = phrase_list(
    """go away / leave me alone / get lost / who cares / do not care / nobody / my time / even a /
    stop asking / too lazy / yourself / silly question / you will never / know nothing /
    not my problem / why would you / bother me / none of your"""
)
_COURTESIES = phrase_list(
    """please / thank / hope / good luck / glad / happy to / welcome / enjoy / have fun /
    let me know / feel free / wish you / all the best / take care / you will do / i am sure you /
    of course / do not worry"""
)


@dataclass(frozen=True)
class GoldScore:
    """Marks from 0 to 1.

    Attributes:
        on_topic: names what was asked about and gives advice on it.
        complete: whole sentences, in order, without repetition.
        polite: friendly 1, plain 0.8, dismissive 0.3, insulting 0.
        total: the product of the three, since no mark makes up for the lack of another.
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
            positions = [(_last_position(text, names(subject)), subject) for subject in subjects()]
            position, subject = max(positions, key=lambda pair: pair[0])
            if position >= 0:
                return subject
    return None


def _full_names(subject: Subject) -> tuple[str, ...]:
    return subject.task.lower(), subject.doing.lower()


def _keyword(subject: Subject) -> tuple[str, ...]:
    return (subject.keyword,)


def _last_position(text: str, names: Sequence[str]) -> int:
    text_words = f" {' '.join(words(text))} "
    return max(text_words.rfind(f" {name} ") for name in names)


def _on_topic(subject: Subject | None, response: str) -> float:
    if subject is None:
        return 0.0
    response_words = words(response)
    mark = SUBJECT_MARK * (subject.keyword in response_words)
    mark += ADVICE_MARK * min(2, sum(_gives_advice(response, point) for point in subject.points))
    text = f" {' '.join(response_words)} "
    for other in subjects():
        if other is subject:
            continue
        subject_named = any(f" {name} " in text for name in _full_names(other))
        advice_given = sum(_share_in_order(response_words, point) == 1.0 for point in other.points)
        mark -= FOREIGN_MARK * (subject_named + advice_given)
    return max(0.0, mark)


def _gives_advice(response: str, point: str) -> bool:
    """Return whether the response gives this advice: word for word, or in a correct sentence."""
    order = _share_in_order(words(response), point)
    if order >= 0.75 or order < 0.4:
        return order >= 0.75
    content_words = set(words(point)) - _FUNCTION_WORDS
    return any(
        content_words <= set(words(sentence)) and not language_errors(sentence)
        for sentence in sentences(response)
    )


def _share_in_order(response_words: Sequence[str], point: str) -> float:
    """Return the share of the point's pairs of neighbouring words that the response has."""
    content_words, point_pairs = _content_words_and_pairs(point)
    if not content_words & set(response_words):
        return 0.0
    response_pairs = set(pairwise(response_words))
    return sum(pair in response_pairs for pair in point_pairs) / len(point_pairs)


@cache
def _content_words_and_pairs(point: str) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    point_words = words(point)
    return frozenset(point_words) - _FUNCTION_WORDS, tuple(pairwise(point_words))


def _complete(response: str) -> float:
    response_sentences = sentences(response)
    if not response_sentences:
        return 0.0
    mark = 1.0 if re.search(r"[.!?][\"')]*$", response.strip()) else 0.2
    mark *= 0.5 ** sum(language_errors(sentence) for sentence in response_sentences)
    mark *= 0.4 ** repetitions(response)
    length = len(words(response))
    if length < 4 or length > 60:
        mark *= 0.5
    return mark


def language_errors(sentence: str) -> int:
    """Return the number of errors of grammar, capitals and punctuation in a sentence."""
    sentence_words = re.findall(r"[A-Za-z0-9']+", sentence)
    lower = [word.lower() for word in sentence_words]
    errors = sum(
        any(left in first and right in second for first, second in _IMPOSSIBLE_PAIRS)
        for left, right in pairwise(lower)
    )
    errors += not sentence_words[0][0].isupper() and not sentence_words[0][0].isdigit()
    errors += sum(
        word[0].isupper() and word.lower() in _never_names() for word in sentence_words[1:]
    )
    errors += lower[-1] in _NEVER_LAST
    errors += len(re.findall(r"[,;:.]\s*[,;:.]|\s[,;.!?]|[,;:]$", sentence.strip()))
    return errors + (len(lower) > _MAX_SENTENCE_WORDS)


@cache
def _never_names() -> frozenset[str]:
    """Return words that have no capital inside a sentence ("I" always has one)."""
    advice_words = {
        word for subject in subjects() for point in subject.points for word in words(point)
    }
    capitalised = {
        word.lower() for subject in subjects() for word in subject.task.split() if word[0].isupper()
    }
    return frozenset((advice_words | _CLOSED_CLASS_WORDS) - {"i"} - capitalised)


def repetitions(text: str) -> int:
    """Return the number of repetitions: doubled words, repeated phrases and sentences."""
    text_words = words(text)
    stutters = sum(left == right for left, right in pairwise(text_words))
    ngrams = [
        text_words[start : start + size]
        for size in (3, 4)
        for start in range(len(text_words) - size + 1)
    ]
    counted = [
        " ".join(run) for run in ngrams if sum(word not in _UNCOUNTED_WORDS for word in run) > 1
    ]
    normalised = [" ".join(words(sentence)) for sentence in sentences(text)]
    return stutters + len(counted) - len(set(counted)) + len(normalised) - len(set(normalised))


def _polite(response: str) -> float:
    response_words = words(response)
    text = " ".join(response_words)
    if _INSULTS & set(response_words):
        return 0.0
    if any(phrase in text for phrase in _DISMISSALS):
        return 0.3
    return 1.0 if any(phrase in text for phrase in _COURTESIES) else 0.8
