"""Surface statistics, counted by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.evaluation import text


def test_distinct_share_ignores_case_and_spacing() -> None:
    texts = ["Hello there", "hello  there\n", "Good day", "Bye"]
    assert list(text.distinct_weights(texts)) == [0.5, 0.5, 1.0, 1.0]
    assert text.distinct_share(texts) == pytest.approx(3 / 4)
    assert text.distinct_share(["same"] * 8) == pytest.approx(1 / 8)
    assert math.isnan(text.distinct_share([]))


def test_distinct_n_counts_over_all_texts() -> None:
    # Bigrams: (a b) (b a) (a b) | (b a): four in all, two distinct.
    assert text.distinct_n(["a b a b", "b a"], 2) == pytest.approx(2 / 4)
    assert text.distinct_n(["a b c"], 1) == 1.0
    assert math.isnan(text.distinct_n(["a", ""], 2))


def test_repetition_is_counted_within_each_text() -> None:
    # "no no no no no": trigrams 3, distinct 1 -> 1 - 1/3.
    found = text.repetition(["no no no no no", "every word here differs", "short", ""], n=3)
    assert found == pytest.approx([2 / 3, 0.0, 0.0, 0.0])


def test_word_counts() -> None:
    assert list(text.word_counts(["one two  three\n", "", "  "])) == [3.0, 0.0, 0.0]
