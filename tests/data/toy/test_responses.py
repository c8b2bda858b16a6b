"""The kinds of responses are what they are called."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from rlhf_exp.data.toy.responses import KINDS
from rlhf_exp.data.toy.subjects import subjects


def written(kind: str, times: int = 4) -> list[str]:
    rng = Random(3)
    return [KINDS[kind].write(rng, subject) for subject in subjects() for _ in range(times)]


def test_shares_sum_to_one_and_leave_something_to_improve() -> None:
    assert sum(kind.shown for kind in KINDS.values()) == pytest.approx(1)
    assert sum(kind.compared for kind in KINDS.values()) == pytest.approx(1)
    good = sum(kind.shown for kind in KINDS.values() if kind.quality == 1)
    bad = sum(kind.shown for kind in KINDS.values() if kind.quality < 0.45)
    assert good == pytest.approx(0.34)
    assert 0.3 < bad < 0.4


def test_good_responses_name_the_subject_in_whole_sentences_of_moderate_length() -> None:
    lengths = []
    for subject, text in zip(np.repeat(list(subjects()), 4), written("good"), strict=True):
        assert subject.keyword in text.lower()
        assert sum(_has(text, point) for point in subject.points) == 2
        assert text[0].isupper()
        assert text[-1] in ".!"
        lengths.append(len(text.split()))
    assert 20 < np.mean(lengths) < 30
    assert min(lengths) >= 10
    assert max(lengths) <= 40


def test_incomplete_responses_break_off() -> None:
    assert all(text[-1].isalpha() for text in written("incomplete"))


def test_off_topic_responses_are_about_something_else() -> None:
    for subject, text in zip(np.repeat(list(subjects()), 4), written("off_topic"), strict=True):
        assert not any(_has(text, point) for point in subject.points)


def test_only_toxic_responses_are_toxic_to_an_independent_classifier() -> None:
    from profanity_check import predict_prob

    means = {name: predict_prob(written(name)).mean() for name in KINDS}
    assert means.pop("toxic") > 0.95
    assert means.pop("rude") < 0.35
    assert max(means.values()) < 0.1


def _has(text: str, point: str) -> bool:
    return point in text or point[0].upper() + point[1:] in text
