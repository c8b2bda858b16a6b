"""From rated or labelled responses to a prompt to pairs, demonstrations and prompts.

Ratings give the best response of a prompt against its worst, labels those that are true against
those that are false. What is in no row is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_exp.data.rows import Demonstration, Fields, History, Preference, Prompt, Row

# What was not used of rated and labelled responses, as the log says it: "3 ...".
SINGLE = "prompts with one rated response: no pair"
EQUAL = "prompts whose responses are all rated alike: no pair"
BETWEEN = "responses rated between the best and the worst of their prompt: not in a pair"
ONE_LABEL = "prompts whose responses all have the same label: no pair"
LABEL_LEFT = "labelled responses without one of the other label left to pair with"
BOTH_LABELS = "responses labelled both true and false: no pair"
NOT_IMITATED = "responses labelled false: not imitated"


@dataclass(frozen=True)
class RatedResponse:
    """A response with its rating; a label is 1 or 0."""

    history: History
    response: str
    rating: float
    origin: str
    fields: Fields = field(default_factory=dict)


class Pairing(Protocol):
    """Makes rows of the rated responses of a whole file."""

    def __call__(
        self, responses: Sequence[RatedResponse], kind: type[Row] | None, counts: Counter[str]
    ) -> list[Row]:
        """Return the rows of a kind (None: of all kinds); `counts` takes what is in none."""


def _grouped(responses: Sequence[RatedResponse]) -> list[list[RatedResponse]]:
    """Return the responses of each prompt, in the order of the file."""
    groups: dict[History, list[RatedResponse]] = {}
    for response in responses:
        groups.setdefault(response.history, []).append(response)
    return list(groups.values())


def best_against_worst(
    responses: Sequence[RatedResponse], kind: type[Row] | None, counts: Counter[str]
) -> list[Row]:
    """Return a pair a prompt: its best-rated response and its worst, the first of equals."""
    rows: list[Row] = []
    for group in _grouped(responses):
        best = max(group, key=lambda item: item.rating)
        worst = min(group, key=lambda item: item.rating)
        if kind is Prompt:
            rows.append(_as_prompt(best))
        elif kind is Demonstration:
            rows += _imitated([best])
        elif len(group) == 1:
            counts[SINGLE] += 1
        elif best.rating == worst.rating or best.response == worst.response:
            counts[EQUAL] += 1
        else:
            rows.append(_as_pair(best, worst))
            counts[BETWEEN] += len(group) - 2
    return rows


def true_against_false(
    responses: Sequence[RatedResponse], kind: type[Row] | None, counts: Counter[str]
) -> list[Row]:
    """Return a prompt's responses labelled true in pairs with those labelled false.

    Each is in one pair at most, in the order of the file. Those labelled true are the
    demonstrations.
    """
    rows: list[Row] = []
    true = [item for item in responses if item.rating]
    if kind is Prompt:
        return [
            _as_prompt(max(group, key=lambda item: item.rating)) for group in _grouped(responses)
        ]
    if kind is not Demonstration:
        for group in _grouped(responses):
            good = [item for item in group if item.rating]
            bad = [item for item in group if not item.rating]
            pairs = list(zip(good, bad, strict=False))
            rows += [_as_pair(*pair) for pair in pairs if pair[0].response != pair[1].response]
            counts[BOTH_LABELS] += sum(a.response == b.response for a, b in pairs)
            counts[ONE_LABEL] += not pairs
            counts[LABEL_LEFT] += len(group) - 2 * len(pairs) if pairs else 0
    if kind is not Preference:
        rows += _imitated(true)
    if kind is Demonstration:
        counts[NOT_IMITATED] += len(responses) - len(true)
    return rows


def _as_pair(chosen: RatedResponse, rejected: RatedResponse) -> Preference:
    return Preference(
        chosen.history, chosen.response, rejected.response, chosen.origin, chosen.fields
    )


def _as_prompt(item: RatedResponse) -> Prompt:
    return Prompt(item.history, item.response, item.origin, item.fields)


def _imitated(items: Sequence[RatedResponse]) -> list[Row]:
    return [
        Demonstration(item.history, item.response, item.origin, item.fields)
        for item in items
        if item.response
    ]
