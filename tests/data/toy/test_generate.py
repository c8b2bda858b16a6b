"""The bundled data: deterministic, varied, graded and honestly noisy.

The kinds of responses are what they are called.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from itertools import chain
from random import Random

import numpy as np
import pytest

from rlhf_exp.data.rows import Preference, prompt_key, rows_digest
from rlhf_exp.data.toy.content import DETAILS, WORDINGS, subjects
from rlhf_exp.data.toy.generate import KINDS, ToyRows, ToySizes, corpus_rows
from rlhf_exp.data.toy.gold_judge import gold_score
from rlhf_exp.errors import UserError


@pytest.fixture(scope="module")
def rows() -> ToyRows:
    return corpus_rows(0)


def test_default_sizes(rows: ToyRows) -> None:
    demonstrations, preferences, prompts = ([len(part) for _, part in kind.all()] for kind in rows)
    assert demonstrations == [4000, 200, 200]
    assert preferences == [4000, 200, 200]
    assert prompts == [3200, 200, 200]


def test_equal_seeds_give_equal_rows_and_others_do_not(rows: ToyRows) -> None:
    def digest(found: ToyRows) -> list[str]:
        return [rows_digest(part) for kind in found for _, part in kind.all()]

    assert digest(corpus_rows(0)) == digest(rows)
    assert not set(digest(corpus_rows(1))) & set(digest(rows))


def test_it_takes_well_under_two_seconds() -> None:
    start = time.process_time()
    corpus_rows(7)
    assert time.process_time() - start < 2


def test_prompts_are_distinct(rows: ToyRows) -> None:
    demonstrations, _, prompts = rows
    for kind in (demonstrations, prompts):
        everything = [prompt_key(row.history) for _, part in kind.all() for row in part]
        assert len(set(everything)) == len(everything)


def test_every_prompts_original_is_its_demonstration(rows: ToyRows) -> None:
    demonstrations, _, prompts = rows
    for (_, shown), (_, prompt_rows) in zip(demonstrations.all(), prompts.all(), strict=True):
        answers = {row.history: row.response for row in shown}
        assert all(row.original == answers[row.history] for row in prompt_rows)


def test_whole_combinations_of_subject_and_wording_are_held_out(rows: ToyRows) -> None:
    def combinations(part: str) -> set[tuple[str, ...]]:
        # A prompt without its detail is the combination; details never begin a sentence.
        details = "|".join(sorted(filter(None, DETAILS), key=len, reverse=True))
        return {
            tuple(re.sub(details, "", turn.text) for turn in row.history)
            for kind in rows
            for row in getattr(kind, part)
        }

    train, validation, test = (combinations(part) for part in ("train", "validation", "test"))
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert len(test) > 80  # of 154
    assert len(train) > 1500  # of 1612


def test_prompts_are_of_one_and_two_exchanges(rows: ToyRows) -> None:
    lengths = Counter(len(row.history) for row in rows[2].train)
    assert set(lengths) == {1, 3}
    # 6 of the 30 wordings begin with an exchange.
    assert 0.15 < lengths[3] / len(rows[2].train) < 0.25


def test_the_world_is_small_but_varied(rows: ToyRows) -> None:
    demonstrations, preferences, _ = rows
    responses = [row.response for row in demonstrations.train]
    sides = chain.from_iterable((row.chosen, row.rejected) for row in preferences.train)
    turns = (turn.text for row in demonstrations.train for turn in row.history)
    vocabulary = {word for text in chain(responses, sides, turns) for word in _words(text)}
    assert 700 <= len(vocabulary) <= 1000
    assert len(set(responses)) > 0.9 * len(responses)
    assert len(subjects()) * len(WORDINGS) * len(DETAILS) > 20_000


def test_subjects_can_be_told_apart() -> None:
    assert len({subject.keyword for subject in subjects()}) == len(subjects())
    points = [point for subject in subjects() for point in subject.points]
    assert len(set(points)) == len(points) == 5 * len(subjects())
    said = " ".join(chain.from_iterable(WORDINGS)) + " ".join(DETAILS)
    assert {subject.keyword for subject in subjects()} & set(_words(said)) == set()


@pytest.mark.parametrize("noise", [0.12, 0.3])
def test_sides_are_exchanged_as_often_as_asked_and_more_where_they_are_close(noise: float) -> None:
    sizes = ToySizes(demonstrations=1, prompts=1)
    clean = corpus_rows(5, sizes, 0.0)[1].train
    noisy = corpus_rows(5, sizes, noise)[1].train
    flipped = np.array(
        [
            (one.chosen, one.rejected) != (two.chosen, two.rejected)
            for one, two in zip(clean, noisy, strict=True)
        ]
    )
    for one, two, changed in zip(clean, noisy, flipped, strict=True):
        if changed:
            assert (one.chosen, one.rejected) == (two.rejected, two.chosen)
    # 4000 draws: standard deviation of the share at most sqrt(0.3 * 0.7 / 4000) = 0.007.
    assert abs(flipped.mean() - noise) < 0.025
    margins = np.array([_gold_margin(row) for row in clean[:900]])
    close, far = (flipped[:900][chosen].mean() for chosen in (margins < 0.3, margins > 0.8))
    assert far < 0.8 * close


def test_too_much_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.toy\.test: 99999 rows"):
        corpus_rows(0, ToySizes(test=99999))
    with pytest.raises(UserError, match="demonstrations and"):
        corpus_rows(0, ToySizes(demonstrations=99999))
    with pytest.raises(UserError, match="label_noise"):
        corpus_rows(0, label_noise=0.5)


def _gold_margin(row: Preference) -> float:
    better, worse = (gold_score(row.history, side).total for side in (row.chosen, row.rejected))
    return better - worse


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def written(kind: str, times: int = 4) -> list[str]:
    rng = Random(3)
    return [KINDS[kind].write(rng, subject) for subject in subjects() for _ in range(times)]


def test_shares_sum_to_one_and_leave_something_to_improve() -> None:
    assert sum(kind.demonstration_share for kind in KINDS.values()) == pytest.approx(1)
    assert sum(kind.pair_share for kind in KINDS.values()) == pytest.approx(1)
    good = sum(kind.demonstration_share for kind in KINDS.values() if kind.quality == 1)
    bad = sum(kind.demonstration_share for kind in KINDS.values() if kind.quality < 0.45)
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
