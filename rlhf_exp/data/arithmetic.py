"""The bundled sums: a task with right and wrong answers, a pure function of seed and sizes.

A sum has a few numbers of one digit, added and taken away, and a wording; no subtotal is below 0 or
above `LARGEST`. Validation and test hold out whole sums. A response works the sum out step by step,
or states a number at once, or hesitates. For a small model the steps are easy and the leap is hard,
so a policy gains by taking the steps, and by taking them with care. Demonstrations are a mixture of
these, right and wrong: a model that imitates them is right about as often as they are. In a pair
the right response is preferred to a wrong one, without noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Splits, Turn
from rlhf_exp.errors import UserError

LARGEST = 20
"""Largest subtotal."""
WORDINGS = ("What is {sum}?", "How much is {sum}?", "Work out {sum}.", "{sum} = ?")
LEAPS = ("It is {number}.", "The answer is {number}.", "That makes {number}.")
DOUBTS = ("I do not know.", "I am not sure.", "That is hard to say.")
GUESSES = ("Maybe {number}?", "Could it be {number}?")
WORKED_RIGHT, WORKED_WRONG = 0.5, 0.3
"""Shares of the right and of the wrong responses that take the steps."""
HESITANT = 0.3
"""Share of the wrong responses that hesitate, half of which name no number."""


@dataclass(frozen=True)
class ArithmeticSizes:
    """Numbers of rows: three kinds to train on, and held-out prompts (with as many pairs)."""

    demonstrations: int = 6000
    preferences: int = 4000
    prompts: int = 3000
    validation: int = 200
    test: int = 500


ArithmeticRows = tuple[Splits[Demonstration], Splits[Preference], Splits[Prompt]]


def corpus_rows(
    seed: int, sizes: ArithmeticSizes | None = None, numbers: int = 4, right: float = 0.5
) -> ArithmeticRows:
    """Return demonstrations, preferences and prompts in their splits.

    Every prompt's `original` is its demonstration; the prompts to train on begin with those of the
    demonstrations.

    Args:
        seed: of all choices.
        sizes: numbers of rows.
        numbers: numbers in a sum.
        right: expected share of the demonstrations that are right.

    Raises:
        UserError: there are fewer sums than rows asked for.
    """
    sizes = sizes or ArithmeticSizes()
    sums = [Sum(terms) for terms in _all_terms(numbers)]
    trained = max(sizes.demonstrations, sizes.prompts, sizes.preferences)
    needed = trained + sizes.validation + sizes.test
    if needed > len(sums):
        raise UserError(
            f"data.arithmetic: {needed} sums asked for, {sizes.validation} of them for validation "
            f"and {sizes.test} for test; with data.arithmetic.numbers={numbers} there are "
            f"{len(sums)}: raise it, or lower the sizes"
        )
    rng = _rng(seed, "sums")
    asked = [(each, rng.choice(WORDINGS)) for each in rng.sample(sums, needed)]
    held_out = asked[: sizes.validation], asked[sizes.validation :][: sizes.test]
    train = asked[sizes.validation + sizes.test :]
    groups = (train[: max(sizes.demonstrations, sizes.prompts)], *held_out)
    demonstrations = Splits(
        *(
            [_demonstration(rng, *each, number, right) for number, each in enumerate(group)]
            for rng, group in zip(_rngs(seed, "demonstrations"), groups, strict=True)
        )
    )
    # From the other end, so that pairs and demonstrations share few sums.
    groups = (train[len(train) - sizes.preferences :], *held_out)
    preferences = Splits(
        *(
            [_preference(rng, *each, number) for number, each in enumerate(group)]
            for rng, group in zip(_rngs(seed, "pairs"), groups, strict=True)
        )
    )
    prompts = Splits(
        *(
            [Prompt(row.history, row.response, row.origin, row.fields) for row in rows]
            for _, rows in demonstrations.all()
        )
    )
    del demonstrations.train[sizes.demonstrations :], prompts.train[sizes.prompts :]
    return demonstrations, preferences, prompts


@dataclass(frozen=True)
class Sum:
    """A sum; `terms` are added, the first is at least 0."""

    terms: tuple[int, ...]

    @property
    def result(self) -> int:
        """The right result."""
        return sum(self.terms)

    def text(self) -> str:
        """Return the sum as text, such as `3 + 9 - 2`."""
        first, *others = self.terms
        return " ".join([str(first), *(_signed(term) for term in others)])

    def worked(self, slip: tuple[int, int] | None = None) -> str:
        """Return the sum step by step, such as `3 + 9 = 12, 12 - 2 = 10.`.

        Args:
            slip: number of a step, and what its result is off by; the steps after it go on from
                there.
        """
        total, steps = self.terms[0], []
        for number, term in enumerate(self.terms[1:]):
            after = total + term + (slip[1] if slip is not None and slip[0] == number else 0)
            steps.append(f"{total} {_signed(term)} = {after}")
            total = after
        return f"{', '.join(steps)}."


def _signed(term: int) -> str:
    return f"- {-term}" if term < 0 else f"+ {term}"


def _all_terms(numbers: int) -> list[tuple[int, ...]]:
    """Return the terms of all sums, whose subtotals are all from 0 to `LARGEST`."""
    found: list[tuple[int, ...]] = [(first,) for first in range(1, 10)]
    steps = [term for term in range(-9, 10) if term]
    for _ in range(numbers - 1):
        found = [(*t, term) for t in found for term in steps if 0 <= sum(t) + term <= LARGEST]
    return found


def _rng(seed: int, purpose: str) -> Random:
    return Random(f"arithmetic:{seed}:{purpose}")


def _rngs(seed: int, purpose: str) -> list[Random]:
    """Return a generator for each split, so that one split's size does not change another."""
    return [_rng(seed, f"{purpose}:{split}") for split in ("train", "validation", "test")]


def _history(each: Sum, wording: str) -> tuple[Turn, ...]:
    return (Turn("human", wording.format(sum=each.text())),)


def _answer(each: Sum) -> dict[str, str]:
    """Return what rewards see of a row: the right answer, as a reward by rule compares with it."""
    return {"answer": str(each.result)}


def _demonstration(
    rng: Random, each: Sum, wording: str, number: int, right: float
) -> Demonstration:
    write = right_response if rng.random() < right else wrong_response
    history, origin = _history(each, wording), f"arithmetic:{number}"
    return Demonstration(history, write(rng, each), origin, _answer(each))


def _preference(rng: Random, each: Sum, wording: str, number: int) -> Preference:
    sides = right_response(rng, each), wrong_response(rng, each)
    return Preference(_history(each, wording), *sides, f"arithmetic:{number}", _answer(each))


def right_response(rng: Random, each: Sum) -> str:
    """Return a response that ends with the right number, by steps or at once."""
    if rng.random() < WORKED_RIGHT:
        return each.worked()
    return _stated(rng, LEAPS, each.result)


def wrong_response(rng: Random, each: Sum) -> str:
    """Return a response with a slip in a step, with another number, or one that hesitates."""
    slip = rng.choice([size for size in (-2, -1, 1, 2) if each.result + size >= 0])
    if rng.random() < HESITANT:
        doubt = rng.choice(DOUBTS)
        if rng.random() < 0.5:
            return doubt
        return f"{doubt} {_stated(rng, GUESSES, each.result + slip)}"
    if rng.random() < WORKED_WRONG:
        steps = list(accumulate(each.terms))[1:]
        possible = [n for n in range(len(steps)) if min(steps[n:]) + slip >= 0]
        return each.worked((rng.choice(possible), slip))
    return _stated(rng, LEAPS, each.result + slip)


def _stated(rng: Random, wordings: Sequence[str], number: int) -> str:
    return rng.choice(wordings).format(number=number)
