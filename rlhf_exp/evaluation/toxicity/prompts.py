"""RealToxicityPrompts (Gehman et al., 2020): beginnings of sentences with their toxicity.

A row is `{"prompt": {"text", "toxicity", ...}, "continuation": {"text", "toxicity", ...}}`. The
scores are the data set's own, from 0 to 1, and may be missing or null. A file of prompts alone will
do: `{"prompt": "text"}`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.data.jsonl import UnreadableLine, read_jsonl, unpaired_surrogate
from rlhf_exp.errors import UserError

KEY = "eval.toxicity.data"
HUB_ID = "allenai/real-toxicity-prompts"
SHOWN_ERRORS = 5  # unusable rows shown in an error
_EXPECTED = 'expected {"prompt": {"text": ..., "toxicity": ...}}'


@dataclass(frozen=True)
class ScoredText:
    """A text with the data set's own toxicity, 0 to 1; `None` where it has none."""

    text: str
    toxicity: float | None


@dataclass(frozen=True)
class ToxicityPrompt:
    """A row: a beginning to be continued, and the data set's own continuation, if it has one."""

    prompt: ScoredText
    continuation: ScoredText | None


def load_prompts(data: str, revision: str | None = None) -> list[ToxicityPrompt]:
    """Read a file, or a data set of the hub (or a folder in its layout).

    Args:
        data: `.jsonl` or `.jsonl.gz`, a folder, or a hub id.
        revision: revision of a hub id.

    Raises:
        UserError: The data do not exist, or have unusable rows; the message names them.
    """
    path = Path(data).expanduser()
    records = read_jsonl(path, KEY) if path.is_file() else _hub_rows(data, revision)
    prompts, unusable = [], []
    for origin, record in records:
        try:
            prompts.append(parse_prompt(record))
        except ValueError as error:
            unusable.append(f"\n  {origin}: {error}")
    if unusable:
        more = (
            f"\n  and {len(unusable) - SHOWN_ERRORS} more" if len(unusable) > SHOWN_ERRORS else ""
        )
        raise UserError(
            f"{KEY}={data}: {len(unusable)} of {len(unusable) + len(prompts)} rows are unusable; "
            f"mend them{''.join(unusable[:SHOWN_ERRORS])}{more}"
        )
    if not prompts:
        raise UserError(f"{KEY}={data}: holds no rows; {_EXPECTED} in each line")
    return prompts


def parse_prompt(record: object) -> ToxicityPrompt:
    """Return the row in a record.

    Raises:
        ValueError: The record is unusable; the message says what was found and expected.
    """
    if isinstance(record, UnreadableLine):
        raise ValueError(record.reason)
    if not isinstance(record, Mapping) or "prompt" not in record:
        actual = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)[:80]
        raise ValueError(f"found {actual or 'an empty row'}; {_EXPECTED}")
    prompt = _scored_text("prompt", record["prompt"])
    if not prompt.text.strip():
        raise ValueError("the prompt is empty, so there is nothing to continue")
    after = record.get("continuation")
    return ToxicityPrompt(prompt, None if after is None else _scored_text("continuation", after))


def sample_prompts(rows: Sequence[ToxicityPrompt], count: int, seed: int) -> list[ToxicityPrompt]:
    """Return `count` rows drawn without replacement; all of them, if there are fewer.

    The rows with the lowest sha256 of seed and prompt are drawn, lowest first. So the sample does
    not depend on the order of the rows, and a smaller sample is the beginning of a larger one. Of
    rows with the same prompt the first counts.
    """
    first_rows: dict[str, ToxicityPrompt] = {}
    for row in rows:
        first_rows.setdefault(row.prompt.text, row)
    drawn = sorted(first_rows, key=lambda text: _draw_key(text, seed))
    return [first_rows[text] for text in drawn[:count]]


def _draw_key(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()


def _scored_text(name: str, value: object) -> ScoredText:
    text = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise ValueError(f"{name} is {str(value)[:80]}, without a text; {_EXPECTED}")
    if half := unpaired_surrogate(text):
        raise ValueError(f"{name} holds half of a character ({half}), which cannot be encoded")
    if not isinstance(value, Mapping):
        return ScoredText(text, None)
    score = value.get("toxicity")
    if score is None:
        return ScoredText(text, None)
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if not number or not 0 <= score <= 1:
        raise ValueError(f"{name}.toxicity is {score!r}; expected a number from 0 to 1, or null")
    return ScoredText(text, float(score))


def _hub_rows(data: str, revision: str | None) -> Iterator[tuple[str, object]]:
    """Yield (origin, record) of the rows of all splits."""
    for name, rows in _load_dataset(data, revision).items():
        yield from _numbered(f"{data}[{name}]", rows)


def _numbered(name: str, rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((f"{name}:{number}", row) for number, row in enumerate(rows))


def _load_dataset(data: str, revision: str | None) -> Any:  # noqa: ANN401 - a dictionary of data sets
    import datasets

    try:
        return datasets.load_dataset(data, revision=revision)
    except Exception as error:  # `datasets` raises some twenty unrelated classes
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"{KEY}={data}: cannot be loaded from the hub ({type(error).__name__}: {reason}). "
            "Without a network give a file (eval.toxicity.data=prompts.jsonl), or fetch it where "
            "there is one: rlhf-exp fetch with the same settings"
        ) from error
