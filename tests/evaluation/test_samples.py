"""The rule that picks the samples shown."""

from __future__ import annotations

import numpy as np

from rlhf_exp.evaluation.samples import GAIN, LOSS, RANDOM, Pick, pick_samples, sample_rule


def test_largest_gains_then_largest_losses_then_random_ones() -> None:
    #        row: 0    1     2    3     4    5    6    7
    gains = [0.1, -2.0, 3.0, -0.5, 0.0, 3.0, 1.0, -3.0]
    picks = pick_samples(gains, seed=0, each=2)
    assert picks[:4] == [Pick(GAIN, 2), Pick(GAIN, 5), Pick(LOSS, 7), Pick(LOSS, 1)]
    assert [pick.rule for pick in picks[4:]] == [RANDOM, RANDOM]
    rest = [pick.row for pick in picks[4:]]
    assert set(rest) < {0, 3, 4, 6}
    assert rest == sorted(rest)


def test_no_row_is_shown_twice_and_a_gain_is_never_called_a_loss() -> None:
    picks = pick_samples([1.0, 2.0, 0.5], seed=0, each=3)
    assert picks == [Pick(GAIN, 1), Pick(GAIN, 0), Pick(GAIN, 2)]
    assert [pick.rule for pick in pick_samples([0.0, 0.0], seed=0)] == [RANDOM, RANDOM]
    assert pick_samples([], seed=0) == []


def test_the_random_ones_go_by_the_seed() -> None:
    gains = np.linspace(-1, 1, 50)
    drawn = {seed: tuple(p.row for p in pick_samples(gains, seed)[6:]) for seed in range(6)}
    assert pick_samples(gains, 3) == pick_samples(gains, 3)
    assert len(set(drawn.values())) > 1


def test_the_rule_in_words_names_its_numbers() -> None:
    assert "the 4 largest gains" in sample_rule(4, seed=17)
    assert "seed 17" in sample_rule(4, seed=17)
