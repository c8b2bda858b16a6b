"""Rules of thumb for sound English sentences: enough to tell them from word salad."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

from rlhf_exp.data.toy.subjects import subjects


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
