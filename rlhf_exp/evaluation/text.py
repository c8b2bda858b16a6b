"""Surface statistics of responses: variety, repetition, length.

Words are what whitespace separates, in lower case. These numbers catch the collapse that a reward
hides: a policy that answers every prompt with one well-scored sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def words(text: str) -> list[str]:
    """Return the lower-case words of a text."""
    return text.lower().split()


def word_counts(texts: Sequence[str]) -> Floats:
    """Return the number of words of each of N texts: [N]."""
    return np.array([len(words(text)) for text in texts], dtype=np.float64)


def distinct_weights(texts: Sequence[str]) -> Floats:
    """Return 1 / (number of texts equal to this one) for each of N texts: [N].

    Texts are equal when their words are. The weights' sum is the number of distinct texts, so their
    mean is the share of distinct texts: a mean over rows, as an interval needs it. A bootstrap must
    resample these weights and not the texts, because drawing a text twice would make a copy of it.
    """
    keys = [" ".join(words(text)) for text in texts]
    copies = Counter(keys)
    return np.array([1 / copies[key] for key in keys], dtype=np.float64)


def distinct_share(texts: Sequence[str]) -> float:
    """Return the share of distinct texts among N: 1 when no two are equal; NaN without texts."""
    return float(distinct_weights(texts).mean()) if texts else float("nan")


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the word n-grams of a text, in order."""
    found = words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return distinct-n: distinct word n-grams over all n-grams of all texts (Li et al., 2016).

    It falls as texts get longer or more, so compare it only between equal numbers of similar texts.
    NaN where no text has n words.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(texts: Sequence[str], n: int = 3) -> Floats:
    """Return the share of each text's word n-grams that occurred before in the same text: [N].

    0 for a text of fewer than n words; a text that loops on one phrase comes close to 1.
    """
    shares = []
    for text in texts:
        grams = ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares, dtype=np.float64)
