"""Layouts: the fields of a file's records that hold prompt and responses, and the rows they give.

`LAYOUTS` lists those that are known by the names of their fields; `Columns` names the fields of any
other file. One file has one layout, told by its first record; rows in another are refused, except
that some (`mixes`) may share a file, since each of their rows says what it is. Of several that fit,
one with pairs comes before one with demonstrations, and that before bare prompts; then one that
knows the fields of the others (a `text` beside Alpaca's fields). Two that still fit are an error.

A text may be a marked dialogue (see `parsing`). Ratings and labels become pairs at the end of the
file (see `rated_responses`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial

from rlhf_exp.data.jsonl import UnreadableLine
from rlhf_exp.data.parsing import (
    REPEATED_PROMPT,
    DialogueReader,
    continuation,
    names_a_turn,
    require_difference,
    require_human_turn,
    split_dialogue,
    split_pair,
    split_turn_pair,
)
from rlhf_exp.data.rated_responses import (
    Pairing,
    RatedResponse,
    best_against_worst,
    true_against_false,
)
from rlhf_exp.data.record_fields import (
    Record,
    finite_number,
    holds_messages,
    label_in,
    list_in,
    listed,
    rating_in,
    text_in,
    turns_in,
)
from rlhf_exp.data.rows import (
    Demonstration,
    History,
    Preference,
    Prompt,
    Role,
    Row,
    Turn,
    UnusableRow,
)
from rlhf_exp.errors import UserError

Columns = Mapping[str, str]
"""The file's column for each of `TARGETS`."""

SYSTEM_IGNORED = (
    "rows with a field `system`, which is not read; data.columns.system=system makes it a "
    "system turn"
)

# NVIDIA's mark of a turn in HelpSteer2's prompts, alone in its line with the speaker.
_HELPSTEER_TURNS = {"<extra_id_1>Assistant": "assistant", "<extra_id_1>User": "human"}
Read = Callable[[Record, str, DialogueReader], "Row | list[RatedResponse]"]


@dataclass(frozen=True)
class Layout:
    """One way to write a record.

    Attributes:
        name: As messages and documentation call it.
        required: The fields that tell it.
        read: Makes a row of a record, or rated responses.
        gives: The kind of row.
        optional: Fields that are read where they are there.
        known: Fields that often stand beside these and say the same; they are not read.
        pairing: Makes rows of the rated responses.
        mixes: Whether rows of other layouts that mix may stand in the same file.
    """

    name: str
    required: tuple[str, ...]
    read: Read
    gives: type[Row]
    optional: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    pairing: Pairing | None = None
    mixes: bool = False

    def __str__(self) -> str:
        names = [*self.required, *(f"{name}?" for name in self.optional)]
        return f"{self.name} ({', '.join(names)})"

    @property
    def reads(self) -> frozenset[str]:
        """The fields that it reads."""
        return frozenset((*self.required, *self.optional))


@dataclass
class ParsedRows:
    """The rows of one file.

    Attributes:
        rows: Each with what was normalised in it.
        unusable: Records that are no rows, with reasons.
        counts: Numbers of responses that are in no row, by the reason.
        layouts: Numbers of records by layout.
        kept: Names of the fields that are kept beside prompt and responses.
        read: Number of records.
        gives: The kind of row that the file's layout gives.
    """

    rows: list[tuple[Row, set[str]]] = field(default_factory=list)
    unusable: list[UnusableRow] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, None] = field(default_factory=dict)
    read: int = 0
    gives: type[Row] | None = None


def read_rows(
    records: Iterable[tuple[str, object]],
    source: str,
    kind: type[Row] | None = None,
    columns: Columns | None = None,
) -> ParsedRows:
    """Return the rows of a file's records.

    Args:
        records: Pairs of an origin ("file:line") and a record.
        source: The file's name, for errors.
        kind: What the rows are to serve as; None: whatever they are.
        columns: The columns to read; by default those of the layout that the names tell.

    Raises:
        UserError: The records fit two layouts or none, or lack a column of `columns`.
    """
    return _FileReader(source, kind, columns or {}).read(records)


def parse_row(record: object, origin: str, notes: set[str] | None = None) -> Row:
    """Return the row in a record that holds one.

    Args:
        record: a JSON object.
        origin: where it stands.
        notes: takes what was normalised.

    Raises:
        ValueError: the record cannot be used; the message says why.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object was expected, found {type(record).__name__}")
    layout = _layout_of(record)
    row = layout.read(record, origin, DialogueReader(notes))
    if isinstance(row, list):
        raise ValueError(f"a row of the layout {layout} is a pair together with others only")
    return replace(row, fields=_others(record, layout.reads))


class _FileReader:
    """Reads the records of one file."""

    def __init__(self, source: str, kind: type[Row] | None, columns: Columns) -> None:
        self._source, self._kind, self._columns = source, kind, columns
        self._parsed = ParsedRows()
        self._layout: Layout | None = None
        self._since = ""
        self._names: dict[str, None] = {}
        self._rated: list[RatedResponse] = []

    def read(self, records: Iterable[tuple[str, object]]) -> ParsedRows:
        parsed = self._parsed
        for origin, record in records:
            parsed.read += 1
            try:
                if isinstance(record, UnreadableLine):
                    raise ValueError(record.reason)
                if not isinstance(record, Mapping):
                    raise ValueError(f"a JSON object was expected, found {type(record).__name__}")
                self._add(record, origin)
            except UserError:  # of the file, not of the record
                raise
            except ValueError as error:
                parsed.unusable.append(UnusableRow(origin, str(error)))
        self._check_names()
        if self._layout is not None and self._layout.pairing is not None:
            rows = self._layout.pairing(self._rated, self._kind, parsed.counts)
            parsed.rows += [(row, set()) for row in rows]
        return parsed

    def _add(self, record: Record, origin: str) -> None:
        """Read one record.

        Raises:
            ValueError: It is not a row.
        """
        self._names |= dict.fromkeys(str(name) for name in record)
        mapped = self._mapped(record)
        layout = self._layout_for(mapped, origin)
        self._parsed.layouts[layout.name] += 1
        notes: set[str] = set()
        row = layout.read(mapped, origin, DialogueReader(notes))
        read = self._columns.values() if self._columns else layout.reads
        others = _others(record, read)
        self._parsed.kept |= dict.fromkeys(others)
        system = ""
        if not self._columns:
            self._parsed.counts[SYSTEM_IGNORED] += bool(others.get("system"))
        elif mapped.get("system") is not None:
            system = text_in(mapped, "system").strip()
        if isinstance(row, list):
            self._rated += [
                replace(item, fields=others, history=_with_system(item.history, system))
                for item in row
            ]
            self._parsed.counts.update(notes)
            return
        if layout.gives is Demonstration and isinstance(row, Prompt) and self._kind is not Prompt:
            raise ValueError("the dialogue does not end with an assistant turn")
        row = replace(row, fields=others, history=_with_system(row.history, system))
        self._parsed.rows.append((row, notes))

    def _mapped(self, record: Record) -> Record:
        """Return a record with the columns of the mapping alone, by what they hold.

        Raises:
            ValueError: It lacks one.
        """
        if not self._columns:
            return record
        missing = [column for column in self._needed() if column not in record]
        if missing:
            raise ValueError(f"no field {missing[0]!r}, which data.columns names")
        return {
            target: record[column] for target, column in self._columns.items() if column in record
        }

    def _needed(self) -> list[str]:
        """Return the columns that each record has to have; those of the prompt, for prompts."""
        asked = [self._columns[name] for name in _OF_PROMPT if name in self._columns]
        return asked if self._kind is Prompt and asked else list(self._columns.values())

    def _layout_for(self, record: Record, origin: str) -> Layout:
        """Return the layout of a record, which the first one decides.

        Raises:
            ValueError: It has none, or another one than the file.
            UserError: The first record fits two.
        """
        layouts = MAPPED_LAYOUTS if self._columns else LAYOUTS
        try:
            layout = _layout_of(record, layouts)
        except _SeveralLayoutsError as error:
            if self._layout is None:
                raise UserError(f"{origin}: {error}") from error
            raise
        except ValueError as error:
            expected = "" if self._layout is None else f"; the file's is {self._layout}"
            raise ValueError(f"{error}{expected}") from error
        if self._layout is None:
            self._layout, self._since = layout, origin
            self._parsed.gives = layout.gives
        if layout is not self._layout and not (layout.mixes and self._layout.mixes):
            raise ValueError(
                f"its fields are those of the layout {layout}, the file's first row "
                f"({self._since}) has the layout {self._layout}; one file has one layout"
            )
        return layout

    def _check_names(self) -> None:
        """Raise if no record had a column of the mapping, or a known layout."""
        found = listed(self._names)
        for target, column in self._columns.items():
            if column in self._needed() and self._names and column not in self._names:
                near = get_close_matches(column, list(self._names), n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"data.columns.{target}={column}: {self._source} has no such column; it has "
                    f"{found}{meant}"
                )
        if self._layout is not None or not self._names:
            return
        if self._columns:
            enough = " or ".join(", ".join(layout.required) for layout in MAPPED_LAYOUTS)
            raise UserError(
                f"data.columns: {', '.join(self._columns)} are not enough for a row; give {enough}"
            )
        raise UserError(
            f"{self._source}: no usable row: its fields fit no layout; fields found: {found}; "
            f"known layouts: {KNOWN}. Say what they hold with data.columns, such as "
            f"{_example(self._names)}"
        )


class _SeveralLayoutsError(ValueError):
    """A record whose fields fit two layouts."""


def _layout_of(record: Record, layouts: Sequence[Layout] | None = None) -> Layout:
    """Return the layout that a record's fields tell.

    Raises:
        ValueError: They tell none, or two.
    """
    names = frozenset(str(name) for name in record)
    fitting = [layout for layout in layouts or LAYOUTS if names.issuperset(layout.required)]
    if not fitting:
        raise ValueError(f"fields found: {listed(record)}; they are those of no layout")
    first = min(_PRECEDENCE.index(layout.gives) for layout in fitting)
    fitting = [layout for layout in fitting if _PRECEDENCE.index(layout.gives) == first]
    best = [
        layout
        for layout in fitting
        if all(layout is other or _covers(layout, other) for other in fitting)
    ]
    if len(best) != 1:
        raise _SeveralLayoutsError(
            f"the fields fit several layouts: {' and '.join(map(str, fitting))}; fields found: "
            f"{listed(record)}. Say which to read with data.columns, such as {_example(names)}"
        )
    return best[0]


def _covers(layout: Layout, other: Layout) -> bool:
    """Return whether a layout knows the fields that tell another, which does not know its own."""
    known = layout.reads.union(layout.known)
    return known.issuperset(other.required) and not other.reads.union(other.known).issuperset(
        layout.required
    )


def _example(names: Collection[str]) -> str:
    """Return a mapping of a file's columns as an example of the option."""
    prompt, chosen, rejected = [*list(names)[:3], "COLUMN", "COLUMN", "COLUMN"][:3]
    return f"'data.columns={{prompt: {prompt}, chosen: {chosen}, rejected: {rejected}}}'"


def _others(record: Record, read: Iterable[str]) -> dict[str, object]:
    """Return the fields that are not read, as JSON values."""
    taken = frozenset(read)
    return {str(name): _plain(value) for name, value in record.items() if str(name) not in taken}


def _plain(value: object) -> object:
    """Return a value of a file as JSON has it: dates and the like as text, no number as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)


def _with_system(history: History, text: str) -> History:
    """Return a history that begins with a system turn of this text, if there is any.

    Raises:
        ValueError: It begins with one already.
    """
    if not text:
        return history
    if history[0].role == "system":
        raise ValueError("the column of system turns has a text, and the dialogue its own")
    if names_a_turn(text):
        raise ValueError("the system turn has a line that begins as a turn does (`Human:`)")
    return (Turn("system", text), *history)


def _history(record: Record, name: str, reading: DialogueReader) -> History:
    """Return the prompt in a field: text, or messages that end with the human's."""
    if holds_messages(record, name):
        return require_human_turn(turns_in(record, name))
    return reading.prompt(text_in(record, name))


def _response(
    record: Record, name: str, history: History, prompt: object, reading: DialogueReader
) -> str:
    """Return the response in a field, text or messages, without a prompt that it repeats."""
    if not holds_messages(record, name):
        asked = prompt if isinstance(prompt, str) else ""
        return reading.response(history, asked, text_in(record, name), name)
    turns = turns_in(record, name)
    for first in range(len(history)):
        repeated = len(history) - first
        if turns[:repeated] == history[first:]:
            reading.notes.add(REPEATED_PROMPT)
            return reading.without_cue(continuation(turns[repeated:]))
    if turns[0].role != "assistant":
        raise ValueError(f"`{name}` begins neither with the prompt nor with its answer")
    return reading.without_cue(continuation(turns))


# Readers of records.


def _preference(record: Record, origin: str, reading: DialogueReader) -> Row:
    sides = ("chosen", "rejected")
    lists = [holds_messages(record, name) for name in sides]
    if lists[0] != lists[1]:
        raise ValueError("one of `chosen` and `rejected` is a list of messages, the other is not")
    if "prompt" not in record:
        if lists[0]:
            shared = split_turn_pair(
                turns_in(record, "chosen"), turns_in(record, "rejected"), reading
            )
            return Preference(*shared, origin)
        texts = [text_in(record, name) for name in sides]
        return Preference(*split_pair(texts[0], texts[1], reading.notes), origin)
    prompt = _prompt_value(record, "prompt")
    history = _history(record, "prompt", reading)
    if lists[0] and history[0].role != "system":
        # A prompt's text beside whole dialogues says nothing of their system turn.
        first = {turns_in(record, name)[0] for name in sides}
        if len(first) == 1 and (opening := first.pop()).role == "system":
            history = (opening, *history)
    chosen, rejected = (_response(record, name, history, prompt, reading) for name in sides)
    require_difference(chosen, rejected)
    return Preference(history, chosen, rejected, origin)


def _prompt_value(record: Record, name: str) -> object:
    """Return a prompt's own text, if it is text."""
    return list_in(record, name) if holds_messages(record, name) else text_in(record, name)


def _prompt_and(response: str) -> Read:
    """Return the reader of demonstrations whose response has this name."""

    def read(record: Record, origin: str, reading: DialogueReader) -> Row:
        prompt = _prompt_value(record, "prompt")
        history = _history(record, "prompt", reading)
        text = _response(record, response, history, prompt, reading)
        return _demonstration(history, text, origin)

    return read


def _demonstration(history: History, response: str, origin: str) -> Demonstration:
    if not response:
        raise ValueError("the response is empty")
    return Demonstration(history, response, origin)


def _dialogue_in(name: str) -> Read:
    """Return the reader of marked dialogues in a field."""

    def read(record: Record, origin: str, reading: DialogueReader) -> Row:
        history, response = split_dialogue(reading.dialogue(text_in(record, name)))
        return _demonstration(history, reading.without_cue(response), origin)

    return read


def _prompt(record: Record, origin: str, reading: DialogueReader) -> Row:
    return Prompt(_history(record, "prompt", reading), None, origin)


def _messages_in(name: str) -> Read:
    """Return the reader of a dialogue in a list of messages."""

    def read(record: Record, origin: str, reading: DialogueReader) -> Row:
        turns = turns_in(record, name)
        if turns[-1].role == "human":
            return Prompt(require_human_turn(turns), None, origin)
        history, response = split_dialogue(turns)
        return _demonstration(history, reading.without_cue(response), origin)

    return read


def _alpaca(record: Record, origin: str, reading: DialogueReader) -> Row:
    asked = text_in(record, "instruction").strip()
    # A column without a value in this row.
    given = text_in(record, "input").strip() if record.get("input") is not None else ""
    prompt = f"{asked}\n\n{given}" if given else asked
    history = reading.prompt(prompt)
    output = reading.response(history, prompt, text_in(record, "output"), "output")
    return _demonstration(history, output, origin)


def _stack_exchange(record: Record, origin: str, reading: DialogueReader) -> Row:
    names = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    return _preference({to: record[name] for to, name in names.items()}, origin, reading)


def _rated_response(response: str, rate: Callable[[Record], float], turns: bool = False) -> Read:
    """Return the reader of a prompt with one rated response.

    Args:
        response: The response's field.
        rate: Returns the rating of a record.
        turns: Whether HelpSteer's marks of turns may be in the prompt.
    """

    def read(record: Record, origin: str, reading: DialogueReader) -> list[RatedResponse]:
        prompt = _prompt_value(record, "prompt")
        history = _helpsteer_turns(prompt) if turns and isinstance(prompt, str) else None
        history = history or _history(record, "prompt", reading)
        text = _response(record, response, history, prompt, reading)
        return [RatedResponse(history, text, rate(record), origin)]

    return read


def _helpsteer_turns(text: str) -> History | None:
    """Return the turns of a prompt with HelpSteer's marks; `None` if it has none."""
    role: Role = "human"
    turns, lines = [], list[str]()
    for line in text.split("\n"):
        if line.strip() not in _HELPSTEER_TURNS:
            lines.append(line)
            continue
        turns.append(Turn(role, "\n".join(lines).strip()))
        role, lines = "human" if line.strip().endswith("User") else "assistant", []
    if not turns:
        return None
    return require_human_turn((*turns, Turn(role, "\n".join(lines).strip())))


def _completions(prompt_name: str) -> Read:
    """Return the reader of a prompt with several rated responses, UltraFeedback's layout."""

    def read(record: Record, origin: str, reading: DialogueReader) -> list[RatedResponse]:
        prompt = _prompt_value(record, prompt_name)
        history = _history(record, prompt_name, reading)
        items = list_in(record, "completions")
        texts = [_completion_text(item, number) for number, item in enumerate(items, 1)]
        ratings = _ratings_of(record, items)
        return [
            RatedResponse(
                history,
                _response({"response": text}, "response", history, prompt, reading),
                rating,
                origin,
            )
            for text, rating in zip(texts, ratings, strict=True)
        ]

    return read


def _completion_text(item: object, number: int) -> str:
    if isinstance(item, Mapping):
        for name in ("response", "completion", "text", "content"):
            if name in item:
                return text_in(item, name)
        raise ValueError(f"`completions`, number {number} has no `response`: {listed(item)}")
    if not isinstance(item, str):
        raise ValueError(f"`completions`, number {number} is {type(item).__name__}")
    return item


def _ratings_of(record: Record, items: Sequence[object]) -> list[float]:
    """Return the completions' ratings, by the first measure that all of them have.

    The mean of the `annotations`' ratings comes first: UltraFeedback's `overall_score` is known to
    be wrong where it is 10.
    """
    for name in ("ratings", "scores"):
        values = record.get(name)
        if isinstance(values, list | tuple):
            numbers = [finite_number(value) for value in values]
            if len(numbers) != len(items) or None in numbers:
                raise ValueError(f"`{name}` are not one number for each of `completions`")
            return [number for number in numbers if number is not None]
    mappings = [item for item in items if isinstance(item, Mapping)]
    measures: list[Callable[[Record], float | None]] = [_mean_annotation]
    measures += [partial(_number_in, name) for name in ("overall_score", "rating", "score")]
    for measure in measures:
        numbers = [measure(item) for item in mappings]
        if len(numbers) == len(items) and None not in numbers:
            return [number for number in numbers if number is not None]
    raise ValueError(
        "`completions` have no rating that all of them have: `annotations` with `Rating`s, "
        "`overall_score`, `rating` or `score`, or a list `ratings` beside them"
    )


def _number_in(name: str, item: Record) -> float | None:
    return finite_number(item.get(name))


def _mean_annotation(item: Record) -> float | None:
    aspects = item.get("annotations")
    if not isinstance(aspects, Mapping) or not aspects:
        return None
    ratings = [
        finite_number(aspect.get("Rating")) if isinstance(aspect, Mapping) else None
        for aspect in aspects.values()
    ]
    numbers = [rating for rating in ratings if rating is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(ratings) else None


LAYOUTS = (
    Layout(
        "pairs",
        ("chosen", "rejected"),
        _preference,
        Preference,
        optional=("prompt",),
        known=("response", "completion", "messages"),
        mixes=True,
    ),
    Layout(
        "StackExchange pairs", ("question", "response_j", "response_k"), _stack_exchange, Preference
    ),
    *(
        Layout(
            "UltraFeedback",
            (prompt, "completions"),
            _completions(prompt),
            Preference,
            optional=("ratings", "scores"),
            pairing=best_against_worst,
        )
        for prompt in ("instruction", "prompt")
    ),
    Layout(
        "HelpSteer",
        ("prompt", "response", "helpfulness"),
        _rated_response("response", partial(rating_in, name="helpfulness"), turns=True),
        Preference,
        pairing=best_against_worst,
    ),
    Layout(
        "KTO",
        ("prompt", "completion", "label"),
        _rated_response("completion", partial(label_in, name="label")),
        Preference,
        pairing=true_against_false,
    ),
    Layout(
        "messages", ("messages",), _messages_in("messages"), Demonstration, known=("prompt", "text")
    ),
    Layout(
        "ShareGPT",
        ("conversations",),
        _messages_in("conversations"),
        Demonstration,
        known=("prompt", "text"),
    ),
    Layout(
        "Alpaca",
        ("instruction", "output"),
        _alpaca,
        Demonstration,
        optional=("input",),
        known=("text",),
    ),
    *(
        Layout(
            "demonstrations",
            ("prompt", response),
            _prompt_and(response),
            Demonstration,
            known=("dialogue", "text"),
            mixes=True,
        )
        for response in ("response", "completion")
    ),
    Layout(
        "dialogues",
        ("dialogue",),
        _dialogue_in("dialogue"),
        Demonstration,
        known=("text",),
        mixes=True,
    ),
    Layout("texts", ("text",), _dialogue_in("text"), Demonstration, mixes=True),
    Layout("prompts", ("prompt",), _prompt, Prompt, mixes=True),
)
"""Those that are known by the names of their fields."""

MAPPED_LAYOUTS = (
    Layout("pairs", ("chosen", "rejected"), _preference, Preference, optional=("prompt",)),
    Layout(
        "rated responses",
        ("prompt", "response", "rating"),
        _rated_response("response", partial(rating_in, name="rating")),
        Preference,
        pairing=best_against_worst,
    ),
    Layout(
        "labelled responses",
        ("prompt", "response", "label"),
        _rated_response("response", partial(label_in, name="label")),
        Preference,
        pairing=true_against_false,
    ),
    Layout("messages", ("messages",), _messages_in("messages"), Demonstration),
    Layout("demonstrations", ("prompt", "response"), _prompt_and("response"), Demonstration),
    Layout("texts", ("text",), _dialogue_in("text"), Demonstration),
    Layout("prompts", ("prompt",), _prompt, Prompt),
)
"""Those that `Columns` can name, each field being one of its targets."""

TARGETS = (
    *dict.fromkeys(
        name for layout in MAPPED_LAYOUTS for name in (*layout.optional, *layout.required)
    ),
    "system",
)
_OF_PROMPT = ("prompt", "messages", "text", "system")
_PRECEDENCE = (Preference, Demonstration, Prompt)
KNOWN = "; ".join(dict.fromkeys(map(str, LAYOUTS)))
"""The known layouts, as messages list them."""
