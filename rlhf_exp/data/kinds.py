"""What one kind of row can stand in for: pairs as demonstrations and prompts, and so on."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Row, prompt_key


def as_kind(row: Row, kind: type[Row] | None) -> Row:
    """Return `row` as what it was given for.

    Raises:
        ValueError: it has too few fields for that.
    """
    if kind is None or isinstance(row, kind):
        return row
    if kind is Prompt:
        return _as_prompt(row)
    if kind is Demonstration and isinstance(row, Preference) and row.chosen:
        return Demonstration(row.history, row.chosen, row.origin)
    wanted = "a prompt with a response" if kind is Demonstration else "`chosen` and `rejected`"
    raise ValueError(f"{wanted} expected, found a {type(row).__name__.lower()}")


def _as_prompt(row: Row) -> Prompt:
    if isinstance(row, Prompt):
        return row
    original = row.chosen if isinstance(row, Preference) else row.response
    return Prompt(row.history, original, row.origin)


def preferences_of(rows: Sequence[Row]) -> list[Preference]:
    """Return the pairs."""
    return [row for row in rows if isinstance(row, Preference)]


def demonstrations_of(rows: Sequence[Row]) -> list[Demonstration]:
    """Return the demonstrations given, or else the pairs' chosen sides that say something."""
    given = [row for row in rows if isinstance(row, Demonstration)]
    return given or [
        Demonstration(row.history, row.chosen, row.origin)
        for row in preferences_of(rows)
        if row.chosen
    ]


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Return the prompts given, or else those of all rows; each prompt once, as it came first."""
    given = [row for row in rows if isinstance(row, Prompt)]
    first: dict[str, Prompt] = {}
    for prompt in given or map(_as_prompt, rows):
        first.setdefault(prompt_key(prompt.history), prompt)
    return list(first.values())
