"""Files as people have them: each layout, pairs of ratings and labels, and what is refused.

The real HH pairs, written in every layout that can hold them, come out as the same rows.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.config.experiment import ColumnsConfig
from rlhf_exp.data import layouts, rated_responses
from rlhf_exp.data.layouts import TARGETS, ParsedRows, parse_row, read_rows
from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Row, Turn
from rlhf_exp.errors import UserError

Message = dict[str, Any]
HI = (Turn("human", "Hi"),)
TOLD = (Turn("system", "Be kind."), *HI)


def said(*texts: str, system: str | None = None) -> list[Message]:
    """Return messages by turns, the user's first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def parsed(
    records: Sequence[object],
    kind: type[Row] | None = None,
    columns: dict[str, str] | None = None,
) -> ParsedRows:
    return read_rows(
        [(f"f:{n}", record) for n, record in enumerate(records, 1)], "f", kind, columns
    )


def rows_of(records: Sequence[object], kind: type[Row] | None = None) -> list[Row]:
    result = parsed(records, kind)
    assert not result.unusable
    return [row for row, _ in result.rows]


# (records, rows by hand); the fields that are not read are `kept`
LAYOUTS: list[tuple[str, list[dict[str, Any]], list[Row]]] = [
    (
        "pairs of texts",
        [{"prompt": "Hi", "chosen": "Yes", "rejected": "No", "kept": 1}],
        [Preference(HI, "Yes", "No", "f:1")],
    ),
    (
        "pairs of whole dialogues",
        [
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
                "rejected": "\n\nHuman: Hi\n\nAssistant: No",
                "kept": 1,
            }
        ],
        [Preference(HI, "Yes", "No", "f:1")],
    ),
    (
        "pairs of messages with their prompt",
        [
            {
                "prompt": said("Hi", system="Be kind."),
                "chosen": [{"role": "assistant", "content": "Yes"}],
                "rejected": [{"role": "assistant", "content": "No"}],
                "kept": 1,
            }
        ],
        [Preference(TOLD, "Yes", "No", "f:1")],
    ),
    (
        "pairs of messages that share their prompt",
        [
            {
                "chosen": said("Hi", "Yes", system="Be kind."),
                "rejected": said("Hi", "No", system="Be kind."),
                "kept": 1,
            }
        ],
        [Preference(TOLD, "Yes", "No", "f:1")],
    ),
    (
        "binarized UltraFeedback: the prompt's text beside whole dialogues",
        [
            {
                "prompt": "Hi",
                "messages": said("Hi", "Yes", system="Be kind."),
                "chosen": said("Hi", "Yes", system="Be kind."),
                "rejected": said("Hi", "No", system="Be kind."),
                "kept": 1,
            }
        ],
        [Preference(TOLD, "Yes", "No", "f:1")],
    ),
    (
        "messages",
        [{"messages": said("Hi", "Yes?", "Bye", "Bye!", system="Be kind."), "kept": 1}],
        [Demonstration((*TOLD, Turn("assistant", "Yes?"), Turn("human", "Bye")), "Bye!", "f:1")],
    ),
    (
        "messages with parts of text",
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                    {"role": "assistant", "content": "Yes", "tool_calls": None},
                ],
                "kept": 1,
            }
        ],
        [Demonstration(HI, "Yes", "f:1")],
    ),
    (
        "ShareGPT",
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yes"},
                ],
                "kept": 1,
            }
        ],
        [Demonstration(TOLD, "Yes", "f:1")],
    ),
    (
        "Alpaca",
        [
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "kept": 1, "text": "Below"},
            {"instruction": "Hi", "input": "", "output": "Yes", "kept": 1, "text": "Below"},
        ],
        [
            Demonstration((Turn("human", "Add.\n\n1 and 2"),), "3", "f:1"),
            Demonstration(HI, "Yes", "f:2"),
        ],
    ),
    (
        "StackExchange pairs",
        [{"question": "Hi", "response_j": "Yes", "response_k": "No", "kept": 1}],
        [Preference(HI, "Yes", "No", "f:1")],
    ),
    (
        "UltraFeedback: the mean of the annotations' ratings, not the wrong overall score",
        [
            {
                "instruction": "Hi",
                "completions": [
                    {
                        "response": text,
                        "overall_score": score,
                        "annotations": {
                            "honesty": {"Rating": str(honesty), "Rationale": "so"},
                            "helpfulness": {"Rating": "3"},
                        },
                    }
                    for text, honesty, score in (("No", 1, 10), ("Yes", 5, 8), ("Hm", 3, 7))
                ],
                "kept": 1,
            }
        ],
        [Preference(HI, "Yes", "No", "f:1")],
    ),
    (
        "several completions with a list of ratings",
        [{"prompt": "Hi", "completions": ["No", "Yes"], "ratings": [1, 4.5], "kept": 1}],
        [Preference(HI, "Yes", "No", "f:1")],
    ),
    (
        "HelpSteer",
        [
            {"prompt": "Hi", "response": "No", "helpfulness": 1, "kept": 1},
            {"prompt": "Hi", "response": "Yes", "helpfulness": 4, "kept": 2},
        ],
        [Preference(HI, "Yes", "No", "f:2")],
    ),
    (
        "KTO",
        [
            {"prompt": "Hi", "completion": "No", "label": False, "kept": 1},
            {"prompt": "Hi", "completion": "Yes", "label": True, "kept": 1},
        ],
        [Preference(HI, "Yes", "No", "f:2"), Demonstration(HI, "Yes", "f:2")],
    ),
    (
        "prompt and completion, as messages",
        [{"prompt": said("Hi"), "completion": said("", "Yes")[1:], "kept": 1}],
        [Demonstration(HI, "Yes", "f:1")],
    ),
    (
        "prompts as messages",
        [{"prompt": said("Hi", system="Be kind."), "kept": 1}],
        [Prompt(TOLD, None, "f:1")],
    ),
]


@pytest.mark.parametrize(
    ("records", "rows"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_a_layout_is_read(records: list[dict[str, Any]], rows: list[Row]) -> None:
    assert rows_of(records) == rows
    assert all("kept" in row.fields for row in rows_of(records))


def test_fields_are_of_the_chosen_response_and_plain_values() -> None:
    records: list[dict[str, Any]] = [dict(record) for record in LAYOUTS[12][1]]
    records[1]["when"] = date(2024, 7, 26)
    (row,) = rows_of(records)
    assert row.fields == {"kept": 2, "when": "2024-07-26"}


# The real pairs in every layout that can hold them.


def roles(turns: Sequence[Turn]) -> list[Message]:
    names = {"human": "user", "assistant": "assistant"}
    return [{"role": names[turn.role], "content": turn.text} for turn in turns]


def answer(text: str) -> list[Message]:
    """Return a response as messages: turns of its own, as HH has them, are messages, too."""
    marked = layouts.DialogueReader().dialogue(f"\n\nHuman: x\n\nAssistant: {text}")
    return roles(marked[1:])


def as_text(pair: Preference) -> str:
    return "".join(f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in pair.history)


WRITTEN: dict[str, Callable[[Preference], list[dict[str, Any]]]] = {
    "explicit": lambda p: [
        {"prompt": roles(p.history), "chosen": answer(p.chosen), "rejected": answer(p.rejected)}
    ],
    "implicit": lambda p: [
        {
            "chosen": roles(p.history) + answer(p.chosen),
            "rejected": roles(p.history) + answer(p.rejected),
        }
    ],
    "texts": lambda p: [
        {"prompt": f"{as_text(p)}\n\nAssistant:", "chosen": p.chosen, "rejected": p.rejected}
    ],
    "stack": lambda p: [{"question": as_text(p), "response_j": p.chosen, "response_k": p.rejected}],
    "ultrafeedback": lambda p: [
        {
            "prompt": roles(p.history),
            "completions": [
                {"response": p.rejected, "rating": 0.25},
                {"response": p.chosen, "rating": "0.5"},
            ],
        }
    ],
    "helpsteer": lambda p: [
        {"prompt": roles(p.history), "response": p.rejected, "helpfulness": 0},
        {"prompt": roles(p.history), "response": p.chosen, "helpfulness": 3},
    ],
    "kto": lambda p: [
        {"prompt": roles(p.history), "completion": answer(p.chosen), "label": True},
        {"prompt": roles(p.history), "completion": answer(p.rejected), "label": False},
    ],
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_real_pairs_are_the_same_in_every_layout(name: str, shared_data: Path) -> None:
    with gzip.open(shared_data / "hh" / "harmless-train.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    pairs = [row for row in rows_of(records) if isinstance(row, Preference)]
    # Several pairs of one prompt would be one group of ratings; a text that begins as a cue or with
    # a marker is another text in another layout.
    first = {pair.history: pair for pair in reversed(pairs)}
    kept = [
        pair
        for pair in pairs
        if first[pair.history] is pair and not pair.chosen.startswith(("Human:", "Assistant:"))
    ]
    assert len(kept) > 1700
    again = rows_of([record for pair in kept for record in WRITTEN[name](pair)], Preference)
    assert [replace(row, origin="") for row in again] == [replace(row, origin="") for row in kept]


# Ratings and labels.


def rated(prompt: str, response: str, rating: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "helpfulness": rating}


RATED = [
    *(rated("a", text, rating) for text, rating in (("x", 2), ("y", 4), ("z", 0), ("w", 4))),
    rated("b", "alone", 3),
    *(rated("c", text, 1) for text in ("x", "y")),
]


def test_the_best_rated_response_is_paired_with_the_worst_and_the_others_are_counted() -> None:
    result = parsed(RATED)
    (pair,) = [row for row, _ in result.rows]
    assert pair == Preference((Turn("human", "a"),), "y", "z", "f:2")
    counts = {what: n for what, n in result.counts.items() if n}
    left = rated_responses
    assert counts == {left.BETWEEN: 2, left.SINGLE: 1, left.EQUAL: 1}
    demonstrations = [row for row, _ in parsed(RATED, Demonstration).rows]
    assert [row.response for row in demonstrations if isinstance(row, Demonstration)] == [
        *("y", "alone", "x")
    ]
    prompts = [row for row, _ in parsed(RATED, Prompt).rows]
    assert [row.original for row in prompts if isinstance(row, Prompt)] == ["y", "alone", "x"]


def labelled(prompt: str, response: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": response, "label": label}


LABELLED = [
    labelled("a", "bad", "False"),
    labelled("a", "good", "true"),
    labelled("a", "fine", True),
    labelled("b", "good", 1),
    labelled("c", "bad", 0),
]


def test_responses_labelled_true_are_imitated_and_paired_with_those_labelled_false() -> None:
    a = (Turn("human", "a"),)
    result = parsed(LABELLED, Preference)
    assert [row for row, _ in result.rows] == [Preference(a, "good", "bad", "f:2")]
    counts = {what: n for what, n in result.counts.items() if n}
    assert counts == {rated_responses.LABEL_LEFT: 1, rated_responses.ONE_LABEL: 2}
    result = parsed(LABELLED, Demonstration)
    assert [row.origin for row, _ in result.rows] == ["f:2", "f:3", "f:4"]
    assert {what: n for what, n in result.counts.items() if n} == {rated_responses.NOT_IMITATED: 2}
    prompts = [row for row, _ in parsed(LABELLED, Prompt).rows]
    assert [row.original for row in prompts if isinstance(row, Prompt)] == ["good", "good", "bad"]


def test_helpsteers_marks_of_turns_in_a_prompt() -> None:
    prompt = "c#\n<extra_id_1>Assistant\nA language.\n<extra_id_1>User\nMore."
    turns = (Turn("human", "c#"), Turn("assistant", "A language."), Turn("human", "More."))
    records = [rated(prompt, "It", 1), rated(prompt, "It is", 2)]
    assert rows_of(records) == [Preference(turns, "It is", "It", "f:2")]


# What is refused.

CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
ANSWERED = {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*said("Hi"), CALL], "message 2 has `tool_calls`; dialogues with tools cannot be trained"),
        (
            [*said("Hi"), {"role": "tool", "content": "42"}, ANSWERED],
            "message 2 has the role `tool`",
        ),
        ([{"role": "boss", "content": "x"}, ANSWERED], "role `boss`; known roles: system, user"),
        ([*said("Hi"), {"role": "system", "content": "x"}, ANSWERED], "not its first message"),
        ([{"role": "user"}, ANSWERED], "message 1 has no `content`; fields found: role"),
        ([{"role": "user", "content": None}, ANSWERED], "has NoneType as content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWERED],
            "a part of the type `image_url`; only text can be read",
        ),
        (said("Hi"), "does not end with an assistant turn"),
        ([ANSWERED], "does not end with a human turn"),
        ([], "is an empty list"),
        ("[1, 2]", "message 1 is int, `role` and `content` were expected"),
        ("Hi", "`messages` is str, a list was expected"),
        (said("Hi", ""), "the response is empty"),
        (said("Hi\n\nAssistant: no", "Yes"), "a line that begins as a turn does"),
        (said("Hi", "\ud83d"), "half of a character"),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages: object, reason: str) -> None:
    result = parsed([{"messages": said("Hi", "Yes")}, {"messages": messages}])
    assert len(result.rows) == 1
    (unusable,) = result.unusable
    assert unusable.origin == "f:2"
    assert reason in unusable.reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": said("Hi", "Yes"), "tools": [{"name": "f"}]}, "the row has `tools`"),
        ({"chosen": said("Hi", "Yes"), "rejected": "No"}, "the other is not"),
        ({"chosen": said("Hi", "Yes"), "rejected": said("Ho", "No")}, "share no human turn"),
        ({"prompt": "Hi", "chosen": said("Ho", "Yes"), "rejected": said("Hi", "No")}, "neither"),
        ({"prompt": "Hi", "response": "x", "helpfulness": "good"}, "a number was expected"),
        ({"prompt": "Hi", "completion": "x", "label": "good"}, "true or false was expected"),
        ({"prompt": "Hi", "completions": ["a", "b"], "ratings": [1]}, "not one number for each"),
        ({"prompt": "Hi", "completions": [{"response": "a"}]}, "have no rating"),
        ({"question": "Hi", "response_j": "a", "response_k": "a"}, "responses are identical"),
    ],
)
def test_records_that_cannot_be_read_are_named(record: dict[str, Any], reason: str) -> None:
    (unusable,) = parsed([record]).unusable
    assert reason in unusable.reason


def test_a_file_that_fits_two_layouts_is_an_error_with_the_remedy() -> None:
    record = {"messages": said("Hi", "Yes"), "instruction": "Hi", "output": "Yes"}
    with pytest.raises(UserError) as refused:
        parsed([record])
    for part in ("f:1", "messages (messages)", "Alpaca (instruction, output, input?)"):
        assert part in str(refused.value)
    assert "data.columns={prompt:" in str(refused.value)
    mapped = parsed([record], columns={"messages": "messages"})
    assert [row for row, _ in mapped.rows] == [Demonstration(HI, "Yes", "f:1")]


def test_a_file_that_fits_no_layout_is_an_error_that_lists_what_is_known() -> None:
    with pytest.raises(UserError) as refused:
        parsed([{"question": "Hi", "answer": "Yes"}])
    assert "fields found: question, answer" in str(refused.value)
    assert "StackExchange pairs (question, response_j, response_k)" in str(refused.value)
    assert "data.columns={prompt: question, chosen: answer" in str(refused.value)


def test_rows_of_another_layout_than_the_files_are_refused_one_by_one() -> None:
    result = parsed(
        [
            {"messages": said("Hi", "Yes")},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}]},
            {"messages": said("Hi", "No"), "instruction": "Hi", "output": "Yes"},
            {"nothing": 1},
        ]
    )
    assert [row.origin for row, _ in result.rows] == ["f:1"]
    reasons = [row.reason for row in result.unusable]
    assert "layout ShareGPT (conversations), the file's first row (f:1)" in reasons[0]
    assert "several layouts" in reasons[1]
    no_layout = "fields found: nothing; they are those of no layout; the file's is messages"
    assert reasons[2].startswith(no_layout)


def test_our_own_formats_may_share_a_file() -> None:
    rows = rows_of([{"prompt": "a"}, {"prompt": "a", "response": "b"}, *LAYOUTS[0][1]])
    assert [type(row) for row in rows] == [Prompt, Demonstration, Preference]
    # The hub's Dahoas/rm-static: the pair counts.
    (row,) = rows_of([{"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}])
    assert row == Preference((Turn("human", "a"),), "b", "c", "f:1")
    assert row.fields == {"response": "b"}


# Columns.


def test_columns_name_what_no_layout_does() -> None:
    record = {"q": "Hi", "a": "Yes", "b": "No", "sys": "Be kind.", "answer": 42}
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "sys"}
    (row,) = [row for row, _ in parsed([record], columns=columns).rows]
    assert row == Preference(TOLD, "Yes", "No", "f:1")
    assert row.fields == {"answer": 42}
    # A file of prompts needs no more than theirs, and an empty system turn is none.
    bare = {"q": "Hi", "sys": None}
    assert [row for row, _ in parsed([bare], Prompt, columns).rows] == [Prompt(HI, None, "f:1")]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "q", "response": "a"}, Demonstration(HI, "Yes", "f:1")),
        ({"prompt": "q"}, Prompt(HI, None, "f:1")),
        ({"text": "whole"}, Demonstration(HI, "Yes", "f:1")),
        ({"messages": "turns"}, Demonstration(HI, "Yes", "f:1")),
        ({"prompt": "q", "response": "a", "label": "good"}, Demonstration(HI, "Yes", "f:1")),
    ],
)
def test_columns_of_every_kind(columns: dict[str, str], row: Row) -> None:
    record = {
        **{"q": "Hi", "a": "Yes", "good": "1", "turns": json.dumps(said("Hi", "Yes"))},
        "whole": "\n\nHuman: Hi\n\nAssistant: Yes",
    }
    assert [row for row, _ in parsed([record], columns=columns).rows] == [row]


def test_a_column_that_is_not_there_is_an_error_with_the_nearest_name() -> None:
    records = [{"question": "Hi", "answer": "Yes"}]
    with pytest.raises(UserError) as refused:
        parsed(records, columns={"prompt": "qestion", "response": "answer"})
    assert "data.columns.prompt=qestion" in str(refused.value)
    assert "it has question, answer; did you mean question?" in str(refused.value)
    with pytest.raises(UserError, match="rating are not enough for a row; give chosen, rejected"):
        parsed(records, columns={"rating": "answer"})


def test_a_row_without_a_column_of_the_others_is_unusable() -> None:
    records = [{"q": "Hi", "a": "Yes"}, {"q": "Ho"}]
    (unusable,) = parsed(records, columns={"prompt": "q", "response": "a"}).unusable
    assert unusable.reason == "no field 'a', which data.columns names"


def test_the_config_has_a_field_for_each_target() -> None:
    assert {item.name for item in fields(ColumnsConfig)} == set(TARGETS)


def test_a_system_field_that_is_not_read_is_counted() -> None:
    record = {"system": "Be kind.", "prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    result = parsed([record])
    assert result.rows[0][0].history == HI
    assert result.counts == {layouts.SYSTEM_IGNORED: 1}
    (row,) = [row for row, _ in parsed([record], columns={n: n for n in record}).rows]
    assert row.history == TOLD
    two = {"messages": said("Hi", "Yes", system="x"), "s": "y"}
    (unusable,) = parsed([two], columns={"messages": "messages", "system": "s"}).unusable
    assert "and the dialogue its own" in unusable.reason


def test_a_record_alone_is_a_row_unless_it_needs_others() -> None:
    assert parse_row({"messages": said("Hi", "Yes")}, "f:1") == Demonstration(HI, "Yes", "f:1")
    with pytest.raises(ValueError, match="HelpSteer"):
        parse_row(RATED[0], "f:1")


def test_numbers_that_json_does_not_have_are_null_in_the_fields() -> None:
    record = {"prompt": "Hi", "score": float("nan"), "marks": [1.5, float("inf")], "n": 2}
    (row,) = rows_of([record])
    assert row.fields == {"score": None, "marks": [1.5, None], "n": 2}


def test_messages_in_the_cells_of_a_csv_file_are_those_of_the_lists() -> None:
    def cells(record: dict[str, Any]) -> dict[str, Any]:
        return {n: json.dumps(v) if isinstance(v, list) else v for n, v in record.items()}

    asked, yes, no = said("Hi", system="Be kind."), said("Yes"), said("No")
    for message in (*yes, *no):
        message["role"] = "assistant"
    records: list[dict[str, Any]] = [
        {"prompt": asked, "chosen": yes, "rejected": no},
        {"chosen": [*asked, *yes], "rejected": [*asked, *no]},
        {"prompt": asked, "completion": yes},
        {"prompt": asked},
    ]
    for record in records:
        assert rows_of([cells(record)]) == rows_of([record])
        assert rows_of([record])[0].history == TOLD
    (unusable,) = parsed([{"prompt": str(asked)}]).unusable
    assert "`prompt` is a list of messages as Python writes it" in unusable.reason
    (row,) = rows_of([{"prompt": '[{"a": 1}] is JSON?'}])
    assert row.history == (Turn("human", '[{"a": 1}] is JSON?'),)
