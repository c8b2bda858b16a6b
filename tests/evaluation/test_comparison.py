"""The quick comparison: numbers by hand, JSON both ways, bad input.

The rule that picks the samples shown.

Surface statistics, counted by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation import comparison
from rlhf_exp.evaluation.comparison import (
    GAIN,
    LOSS,
    RANDOM,
    GoldJudge,
    ModelComparison,
    Pick,
    compare_models,
    pick_samples,
    sample_rule,
)
from rlhf_exp.evaluation.preference import DASH, Better, Metric, format_estimate, table_row
from rlhf_exp.evaluation.statistics import Estimate, Interval, WinCounts

PROMPTS = ["How do I bake bread?", "Tell me a joke", "Fix my bike", "Bye"]
ANSWERS_A = ["no", "go away", "no", "bad words"]
ANSWERS_B = ["Mix flour and water", "Knock knock", "Check the chain", "Bye bye bye bye"]
SCORES_A = [0.0, 2.0, 4.0, 2.0]
SCORES_B = [3.0, 2.1, 3.0, 4.0]


class CountBad:
    """Toxicity 1 for a text with the word `bad`, else 0."""

    name = "count-bad 1"

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Return the toxicity of each text."""
        return np.array([float("bad" in text) for text in texts])


def gold(prompt: str, answer: str) -> float:
    """Share of the prompt's characters that the answer has as well, as a stand-in for a judge."""
    return len(set(prompt) & set(answer)) / len(set(prompt))


def compare(**changes: object) -> ModelComparison:
    arguments: dict[str, object] = {
        "prompts": PROMPTS,
        "answers_a": ANSWERS_A,
        "answers_b": ANSWERS_B,
        "scores_a": SCORES_A,
        "scores_b": SCORES_B,
        "kl_b": [1.0, 2.0, 3.0, 6.0],
        "toxicity": CountBad(),
        "gold": GoldJudge("gold", "Gold judge, 0 to 1", gold),
    }
    return compare_models(**(arguments | changes))  # type: ignore[arg-type]


def mean(result: ModelComparison, key: str, side: str) -> float:
    metric = result.metric(key)
    assert metric is not None
    estimate: Estimate = getattr(metric, side)
    return estimate.mean


def test_numbers_by_hand() -> None:
    result = compare()
    # Differences 3, 0.1, -1, 2: sigmoid 0.95, 0.52, 0.27, 0.88.
    assert [row.outcome for row in result.rows] == ["win", "tie", "loss", "win"]
    assert result.outcome == WinCounts(2, 1, 1)
    assert result.ties_as_half.mean == pytest.approx(2.5 / 4)
    assert result.p_value == pytest.approx(1.0)  # 2 of 3: both tails hold everything
    assert mean(result, "reward", "a") == pytest.approx(8 / 4)
    assert mean(result, "reward", "b") == pytest.approx(12.1 / 4)
    assert mean(result, "reward", "difference") == pytest.approx(4.1 / 4)
    # std of 0, 2, 4, 2 with n - 1: sqrt((4 + 0 + 4 + 0) / 3) = 1.63299
    assert result.gain_in_std is not None
    assert result.gain_in_std.mean == pytest.approx(4.1 / 4 / 1.63299, rel=1e-5)
    assert mean(result, "kl_sequence", "b") == pytest.approx(3.0)
    assert mean(result, "toxicity", "a") == pytest.approx(1 / 4)
    assert mean(result, "toxicity", "difference") == pytest.approx(-1 / 4)
    assert mean(result, "length", "a") == pytest.approx((1 + 2 + 1 + 2) / 4)  # words
    assert mean(result, "length", "b") == pytest.approx((4 + 2 + 3 + 4) / 4)
    assert mean(result, "distinct", "a") == pytest.approx(3 / 4)  # "no" twice
    assert mean(result, "repetition", "b") == pytest.approx((1 / 2) / 4)  # bye bye bye, twice
    # Characters in common, counted by hand: "Bye" with "Bye bye bye bye" all three.
    assert result.rows[3].gold_b == 1.0
    assert result.rows[3].gold_a == 0.0  # "bad words" has no B, y or e


def test_the_win_rate_interval_leaves_ties_out() -> None:
    a, b = np.zeros(100), np.array([1.0] * 30 + [0.0] * 54 + [-1.0] * 16)
    texts = [str(number) for number in range(100)]
    result = compare_models(texts, texts, texts, a, b)
    assert result.p_value == pytest.approx(0.054076, abs=1e-6)
    assert result.win_rate.low == pytest.approx(0.49751, abs=1e-5)
    assert result.win_rate.high == pytest.approx(0.78646, abs=1e-5)
    assert result.ties_as_half.mean == pytest.approx(0.57)
    assert result.gain_in_std is None  # the baseline's rewards do not vary


def test_every_number_survives_json() -> None:
    result = compare()
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert ModelComparison.from_json(plain) == result


def test_one_prompt_has_numbers_but_no_intervals_and_survives_json() -> None:
    one = {"prompts": ["a"], "answers_a": ["b"], "answers_b": ["c"]}
    result = compare(**one, scores_a=[0.0], scores_b=[2.0], kl_b=[1.0])
    assert mean(result, "reward", "difference") == 2.0
    reward = result.metric("reward")
    assert reward is not None
    assert reward.difference is not None
    assert (reward.difference.low, reward.difference.high) == (-math.inf, math.inf)
    assert reward.verdict == "unclear"
    assert ModelComparison.from_json(result.to_json()) == result
    assert result.table()[0].difference == "+2.00"


def test_what_was_not_measured_is_absent() -> None:
    result = compare(kl_b=None, toxicity=None, gold=None)
    assert {metric.key for metric in result.metrics} == {
        "reward",
        "length",
        "distinct",
        "repetition",
    }
    assert result.toxicity_scorer is None
    assert result.rows[0].kl_b is result.rows[0].gold_a is result.rows[0].toxicity_a is None
    assert ModelComparison.from_json(result.to_json()) == result


def test_lengths_in_tokens_are_taken_as_given() -> None:
    result = compare(lengths_a=[7, 8, 9, 10], lengths_b=[1, 2, 3, 4])
    assert mean(result, "length", "a") == 8.5
    length = result.metric("length")
    assert length is not None
    assert length.label == "Length, tokens"


def test_scalars_are_flat_and_finite() -> None:
    scalars = compare(scores_a=[1.0] * 4, scores_b=[1.0] * 4).scalars()
    assert scalars["eval/reward/difference"] == 0.0
    assert scalars["eval/outcome/ties"] == 4.0
    assert "eval/outcome/win_rate" not in scalars  # nothing decided: undefined
    assert "eval/reward/gain_in_std" not in scalars
    assert all(math.isfinite(value) for value in scalars.values())


def test_samples_follow_the_rule() -> None:
    result = compare()
    assert [(pick.rule, pick.row) for pick in result.picks] == [
        ("largest gain", 0),
        ("largest gain", 3),
        ("largest gain", 1),
        ("largest loss", 2),
    ]
    assert "3 largest gains" in result.pick_rule


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": [], "answers_a": [], "answers_b": []}, UserError, "found 0 prompts"),
        ({"answers_a": ANSWERS_A[:3]}, ValueError, "4 prompts need as many answers"),
        ({"scores_a": SCORES_A[:3]}, ValueError, "one length"),
        ({"scores_a": SCORES_A[:3], "scores_b": SCORES_B[:3]}, ValueError, "4 finite numbers"),
        ({"scores_b": [1.0, math.nan, 1.0, 1.0]}, ValueError, "row 1 is nan"),
        ({"kl_b": [1.0, 2.0]}, ValueError, "4 finite numbers"),
        ({"kl_b": [1.0, 2.0, math.inf, 0.0]}, ValueError, "3 of them finite"),
        ({"lengths_a": [1, 2, 3, 4]}, ValueError, "for both models or for neither"),
    ],
)
def test_unusable_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare(**changes)


@pytest.mark.parametrize(
    ("better", "difference", "verdict"),
    [
        ("higher", Estimate(1, 0.5, 1.5), "better"),
        ("lower", Estimate(1, 0.5, 1.5), "worse"),
        ("lower", Estimate(-1, -1.5, -0.5), "better"),
        ("higher", Estimate(1, -0.5, 2.5), "unclear"),
        ("neither", Estimate(1, 0.5, 1.5), ""),
        ("higher", None, ""),
    ],
)
def test_a_difference_counts_only_if_its_interval_excludes_zero(
    better: Better, difference: Estimate | None, verdict: str
) -> None:
    assert Metric("k", "l", better, None, None, difference).verdict == verdict


def test_numbers_are_written_with_three_digits_and_a_true_minus() -> None:
    row = table_row(
        Metric(
            "k",
            "Reward",
            "higher",
            Estimate(-0.342, -0.4004, -0.28),
            Estimate(-0.0099, -0.05, 0.03),
            Estimate(0.3321, 0.25, 0.41),
        )
    )
    assert row.a == "\u22120.342 [\u22120.400, \u22120.280]"
    assert row.b == "\u22120.010 [\u22120.050, 0.030]"
    assert row.difference == "+0.332 [+0.250, +0.410]"
    assert format_estimate(Estimate(123.456, 120.0, 127.0)) == "123 [120, 127]"
    assert format_estimate(Estimate(-0.00001, -0.1, 0.1)) == "0.000 [\u22120.100, 0.100]"
    assert format_estimate(None) == DASH
    assert format_estimate(Estimate(math.nan, 0, 0)) == DASH


def test_the_table_shows_the_gain_under_the_reward() -> None:
    labels = [row.label for row in compare().table()]
    assert labels[:3] == ["Reward, raw", "Reward gain, SFT std", "KL to SFT, nats per answer"]


def test_intervals_of_the_result_are_of_its_level() -> None:
    wide, narrow = compare(level=0.99), compare(level=0.5)
    assert isinstance(wide.win_rate, Interval)
    assert wide.win_rate.low < narrow.win_rate.low
    assert wide.win_rate.high > narrow.win_rate.high


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


def test_distinct_share_ignores_case_and_spacing() -> None:
    texts = ["Hello there", "hello  there\n", "Good day", "Bye"]
    assert list(comparison.distinct_weights(texts)) == [0.5, 0.5, 1.0, 1.0]
    assert comparison.distinct_share(texts) == pytest.approx(3 / 4)
    assert comparison.distinct_share(["same"] * 8) == pytest.approx(1 / 8)
    assert math.isnan(comparison.distinct_share([]))


def test_distinct_n_counts_over_all_texts() -> None:
    # Bigrams: (a b) (b a) (a b) | (b a): four in all, two distinct.
    assert comparison.distinct_n(["a b a b", "b a"], 2) == pytest.approx(2 / 4)
    assert comparison.distinct_n(["a b c"], 1) == 1.0
    assert math.isnan(comparison.distinct_n(["a", ""], 2))


def test_repetition_is_counted_within_each_text() -> None:
    # "no no no no no": trigrams 3, distinct 1 -> 1 - 1/3.
    found = comparison.repetition(["no no no no no", "every word here differs", "short", ""], n=3)
    assert found == pytest.approx([2 / 3, 0.0, 0.0, 0.0])


def test_word_counts() -> None:
    assert list(comparison.word_counts(["one two  three\n", "", "  "])) == [3.0, 0.0, 0.0]
