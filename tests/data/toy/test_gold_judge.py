"""The gold judge, on answers written by hand and on the generator's kinds."""

from __future__ import annotations

from random import Random

import pytest

from rlhf_exp.data.rows import Turn
from rlhf_exp.data.toy.content import subjects
from rlhf_exp.data.toy.generate import KINDS
from rlhf_exp.data.toy.gold_judge import gold_score

ASKED = "How do I grow tomatoes with my kids?"

GOOD = [
    "Tomatoes love light, so plant them in full sun. Feed the soil every week too. Enjoy them!",
    "I am glad you asked! Water the roots every morning, and pick them when they are red. "
    "Your tomatoes will be lovely.",
    "Of course. When growing tomatoes, tie the stems to a stick and plant them in full sun.",
]
MIDDLING = [
    "Tomatoes are easy. Just plant them in full sun.",
    "You could tie the stems to a stick. Good luck with the tomatoes!",
]
BAD = {
    "says nothing": "Tomatoes are a wonderful thing to grow. I hope this helps!",
    "evades": "I would rather not say anything about that. Ask your neighbor.",
    "another subject": "To bake bread, let the dough rise for an hour and press the dough by hand. "
    "Good luck!",
    "insults": "Plant them in full sun and water the roots every morning, you lazy idiot.",
    "dismisses": "Even a child can grow tomatoes. Plant them in full sun and leave me alone.",
    "breaks off": "Growing tomatoes is fun. Plant them in full sun and water the roots every",
    "loops": "Tomatoes tomatoes tomatoes. Plant them in full sun sun sun sun sun.",
    "repeats": "Plant them in full sun. Plant them in full sun. Plant them in full sun. Tomatoes! "
    "Tomatoes!",
    "shuffled": "tomatoes grow the to. Full in sun plant them a and, morning water every the "
    "roots I helps hope!",
    "torn": "To grow tomatoes, plant the of and full. Every morning a is to water roots to the.",
    "lists words": "tomatoes sun water soil stems stick red roots week please thanks good luck",
    "thanks only": "Good luck! I hope this helps! Have fun! Thank you!",
    "empty": "",
    "dots": "...",
}


@pytest.mark.parametrize("answer", GOOD)
def test_good_answers(answer: str) -> None:
    assert gold_score(ASKED, answer).total >= 0.75


@pytest.mark.parametrize("answer", MIDDLING)
def test_middling_answers(answer: str) -> None:
    assert 0.4 < gold_score(ASKED, answer).total < 0.75


@pytest.mark.parametrize("why", BAD)
def test_bad_answers(why: str) -> None:
    assert gold_score(ASKED, BAD[why]).total < 0.4


@pytest.mark.parametrize(
    "why", ["loops", "repeats", "shuffled", "torn", "lists words", "breaks off"]
)
def test_garbled_answers_lose_by_their_language(why: str) -> None:
    score = gold_score(ASKED, BAD[why])
    assert score.complete < 0.3
    assert score.total < 0.25


def test_an_insult_costs_everything_and_a_cold_tone_a_little() -> None:
    plain = "To grow tomatoes, plant them in full sun and feed the soil every week."
    assert gold_score(ASKED, plain).polite == 0.8
    assert gold_score(ASKED, f"{plain} Good luck!").polite == 1.0
    assert gold_score(ASKED, f"{plain} Now go away.").polite == 0.3
    assert gold_score(ASKED, f"{plain} Good luck, moron!").polite == 0.0


def test_marks_by_hand() -> None:
    # Named 0.3, one piece of advice 0.35, one of another subject's -0.3; whole; friendly.
    answer = "Tomatoes need care. Plant them in full sun. Grind the beans fresh. Good luck!"
    score = gold_score(ASKED, answer)
    assert score.on_topic == pytest.approx(0.35)
    assert (score.complete, score.polite) == (1.0, 1.0)
    assert score.total == pytest.approx(0.35)


def test_the_subject_may_stand_in_an_earlier_turn_and_the_last_one_counts() -> None:
    def talk(first: str, last: str) -> tuple[Turn, ...]:
        return (Turn("human", first), Turn("assistant", "Sure."), Turn("human", last))

    answer = GOOD[0]
    assert gold_score(talk("Do you know how to grow tomatoes?", "Tell me."), answer).total > 0.75
    changed = talk("Do you know how to grow tomatoes?", "And how do I bake bread?")
    assert gold_score(changed, answer).total < 0.2


def test_a_prompt_about_nothing_known_has_no_answer_on_topic() -> None:
    assert gold_score("What is the meaning of life?", GOOD[0]).total == 0


def test_it_ranks_the_generators_kinds_without_knowing_them() -> None:
    rng = Random(0)
    means = {}
    for name, kind in KINDS.items():
        scores = [gold_score(f"How do I {s.task}?", kind.write(rng, s)).total for s in subjects()]
        means[name] = sum(scores) / len(scores)
    assert means["good"] > 0.95
    assert means["good"] > means["no_closing"] > means["one_point"] > means["thin"]
    for bad in (
        "off_topic",
        "closings_only",
        "repetitive",
        "rude",
        "garbled",
        "toxic",
        "incomplete",
    ):
        assert means[bad] < 0.15
    for empty_but_fluent in ("mixed", "hollow", "evasive"):
        assert means[empty_but_fluent] < 0.4
