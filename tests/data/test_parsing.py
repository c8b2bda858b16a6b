"""Prompts as turns.

Records of every known format.

Dialogues as HH writes them, from tidy to real.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest

from rlhf_exp.data import parsing
from rlhf_exp.data.layouts import parse_row
from rlhf_exp.data.parsing import (
    DialogueReader,
    end_of_response,
    format_dialogue,
    parse_prompt,
    split_pair,
    split_turns,
)
from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Turn


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", [("Human", "Hi")]),
        (
            "Human: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:",
            [("Human", "Hi"), ("Assistant", "Yes?"), ("Human", "Bye")],
        ),
        ("Be kind.\n\nHuman: a\n\nb\n\nAssistant: ", [("", "Be kind."), ("Human", "a\n\nb")]),
        ("No dialogue: Human: here", [("", "No dialogue: Human: here")]),
        ("\n\nHuman:\n\nAssistant: x", [("Human", ""), ("Assistant", "x")]),
        ("", []),
    ],
)
def test_turns(prompt: str, turns: list[tuple[str, str]]) -> None:
    assert split_turns(prompt) == turns


HI = (Turn("human", "hi"),)


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: a",
                "rejected": "\n\nHuman: hi\n\nAssistant: b",
            },
            Preference(HI, "a", "b", "f:1"),
        ),
        (
            # As in rm-static: a marked prompt with its cue, and a field that is not needed.
            {
                "prompt": "\n\nHuman: hi\n\nAssistant:",
                "response": " a",
                "chosen": " a",
                "rejected": " b",
            },
            Preference(HI, "a", "b", "f:1"),
        ),
        ({"prompt": "hi", "chosen": "", "rejected": "b"}, Preference(HI, "", "b", "f:1")),
        ({"prompt": "hi", "response": " a "}, Demonstration(HI, "a", "f:1")),
        ({"dialogue": "Human: hi\n\nAssistant: a"}, Demonstration(HI, "a", "f:1")),
        ({"text": "\n\nHuman: hi\n\nAssistant: a"}, Demonstration(HI, "a", "f:1")),
        ({"prompt": "hi"}, Prompt(HI, None, "f:1")),
        ({"prompt": {"text": "hi", "toxicity": None}, "continuation": {}}, Prompt(HI, None, "f:1")),
    ],
)
def test_formats_are_told_by_their_fields(record: dict[str, object], row: object) -> None:
    assert parse_row(record, "f:1") == row


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "JSON object was expected, found list"),
        ({"question": "hi"}, "fields found: question"),
        ({}, "fields found: none"),
        ({"prompt": 3}, "`prompt` is int"),
        ({"prompt": "hi", "chosen": "a", "rejected": None}, "`rejected` is null"),
        ({"prompt": "hi", "chosen": "a", "rejected": " a"}, "identical"),
        ({"prompt": "hi", "chosen": "", "rejected": " "}, "both responses are empty"),
        ({"prompt": "hi", "response": " "}, "response is empty"),
        ({"prompt": " "}, "empty"),
        ({"text": "no dialogue"}, "beginning"),
        ({"dialogue": "Human: hi"}, "does not end with an assistant"),
    ],
)
def test_unusable_records_say_why(record: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_row(record, "f:1")


H, A = "\n\nHuman:", "\n\nAssistant:"
SPELLED = {parsing.SPELLING}


def test_parses_turns_and_strips_them() -> None:
    assert DialogueReader().dialogue(f"{H} hi {A}  hello\nthere {H} bye{A}") == (
        Turn("human", "hi"),
        Turn("assistant", "hello\nthere"),
        Turn("human", "bye"),
        Turn("assistant", ""),
    )


def test_the_blank_line_before_the_first_marker_may_be_missing() -> None:
    assert DialogueReader().dialogue(f"Human: hi{A} yes")[0] == Turn("human", "hi")


def test_a_marker_inside_a_line_is_text() -> None:
    (_, answer) = DialogueReader().dialogue(
        f"{H} hi{A} I said so. Human: Then why?\nAssistant: odd"
    )
    assert answer.text == "I said so. Human: Then why?\nAssistant: odd"


def test_two_turns_of_one_speaker_stay_two() -> None:
    roles = [turn.role for turn in DialogueReader().dialogue(f"{H} hi{A} the key:{A} ok")]
    assert roles == ["human", "assistant", "assistant"]


@pytest.mark.parametrize("text", ["", "no markers", "Once, Human: said"])
def test_text_without_a_leading_marker_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="beginning"):
        DialogueReader().dialogue(text)


def test_a_prompt_is_plain_text_or_a_dialogue_with_its_cue() -> None:
    assert parse_prompt(" hi ") == (Turn("human", "hi"),)
    assert parse_prompt(f"{H} hi{A} yes{H} so?{A}")[-1] == Turn("human", "so?")


@pytest.mark.parametrize("text", ["  ", f"{H}{A}", f"{H} hi{A} already answered"])
def test_a_prompt_that_asks_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        parse_prompt(text)


def test_pair_shares_all_turns_up_to_the_last_response() -> None:
    start = f"{H} one{A} two{H} three"
    history, good, bad = split_pair(f"{start}{A} four", f"{start}{A} five")
    assert [turn.text for turn in history] == ["one", "two", "three"]
    assert (good, bad) == ("four", "five")


def test_pair_that_parts_early_keeps_the_rest_with_its_markers() -> None:
    left, right = f"{H} one{A} two{H} three{A} four", f"{H} one{A} TWO"
    history, good, bad = split_pair(left, right)
    assert history == (Turn("human", "one"),)
    assert good == f"two{H} three{A} four"
    assert bad == "TWO"


def test_pair_that_parts_at_a_human_turn_goes_back_to_the_question_before() -> None:
    history, good, bad = split_pair(f"{H} q{A} a{H} b{A} c", f"{H} q{A} a{H} d{A} e")
    assert history == (Turn("human", "q"),)
    assert (good, bad) == (f"a{H} b{A} c", f"a{H} d{A} e")


def test_one_empty_side_is_kept() -> None:
    assert split_pair(f"{H} q{A}", f"{H} q{A} no")[1:] == ("", "no")
    assert split_pair(f"{H} q", f"{H} q{A} no")[1:] == ("", "no")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{H} q{A} a", f"{H} q{A} a", "identical"),
        (f"{H} q{A}", f"{H} q{A} ", "empty"),
        (f"{H} q{A} a", f"{H} other{A} a", "share no"),
        (f"{A} a{H} q", f"{A} b{H} q", "share no"),
        (f"{H} q{H} r{A} a", f"{H} q{A} b", "human turn stands"),
    ],
)
def test_pairs_that_cannot_be_used_say_why(chosen: str, rejected: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        split_pair(chosen, rejected)


def turns(*texts: str) -> tuple[Turn, ...]:
    """Return turns of human and assistant in turn."""
    return tuple(
        Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(texts)
    )


@pytest.mark.parametrize(
    ("prompt", "history", "notes"),
    [
        ("Human: Hi", turns("Hi"), set()),
        (f"{H} Hi{A}{A}", turns("Hi"), set()),
        ("\r\n\r\nHuman: Hi\r\nyou\r\n\r\nAssistant:", turns("Hi\nyou"), {parsing.LINE_ENDS}),
        ("Human: Hi\nAssistant: Yo\nHuman: Bye\nAssistant:", turns("Hi", "Yo", "Bye"), SPELLED),
        ("human: Hi\n\nassistant : Yo\n\nHUMAN: Bye", turns("Hi", "Yo", "Bye"), SPELLED),
        ("Human: Hi\n \n  Assistant:", turns("Hi"), SPELLED),
        (f"Be kind.{H} Hi{A}", turns("Be kind.\n\nHi"), {parsing.PREAMBLE}),
        (
            f"Be kind.{H} Hi{A} Yo{H} Bye",
            turns("Be kind.\n\nHi", "Yo", "Bye"),
            {parsing.PREAMBLE},
        ),
        (
            "Be kind.\nHuman: Hi\nAssistant:",
            turns("Be kind.\n\nHi"),
            {parsing.PREAMBLE, parsing.SPELLING},
        ),
        (" Human: Hi Assistant:", turns("Hi"), {parsing.CUE_IN_TEXT}),
        (f"What is it?{A} ", turns("What is it?"), {parsing.CUE_IN_TEXT}),
        ("\ufeffHuman: Hi", turns("Hi"), set()),
        ("Who is human: you?\nhuman: me", turns("Who is human: you?\nhuman: me"), set()),
    ],
)
def test_prompts_that_can_be_read_in_one_way_are(
    prompt: str, history: tuple[Turn, ...], notes: set[str]
) -> None:
    found: set[str] = set()
    assert parse_row({"prompt": prompt}, "f:1", found) == Prompt(history, None, "f:1")
    assert found == notes


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (f"Sum this up:{H} hi{A} hello", "does not end with a human turn"),
        (f"He wrote:{H} a being that speaks", "has markers but does not begin"),
        (f"Hello!{A} Hi{H} Bye{A}", "has markers but does not begin"),
        (f"Human: Hi\nAssistant: Yo\nHuman: Bye{A}", "mark all turns alike"),
        ("Human: a Assistant: b Human: c Assistant:", "inside a line"),
    ],
)
def test_prompts_that_can_be_read_in_several_ways_are_refused(prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_row({"prompt": prompt}, "f:1")


TWO = f"{H} one{A} two{H} three"
REPEATED, CUE = {parsing.REPEATED_PROMPT}, {parsing.REPEATED_CUE}


@pytest.mark.parametrize(
    ("prompt", "response", "expected", "notes"),
    [
        (f"{TWO}{A}", f"{TWO}{A} four", "four", REPEATED),
        (TWO, f"{TWO}{A} four", "four", REPEATED),
        (f"{TWO}{A}", f"{H}  one{A}two{H} three{A} four", "four", REPEATED),
        (f"{TWO}{A}", f"{H} three{A} four", "four", REPEATED),  # the end of the prompt
        ("three", f"{H} three{A} four", "four", REPEATED),
        ("three", f"three{A} four", "four", REPEATED),
        (" Human: three Assistant:", "Human: three Assistant: four", "four", REPEATED),
        (f"Be kind.{TWO}{A}", f"Be kind.{TWO}{A} four", "four", REPEATED),
        (f"{H} three{A}", "Assistant: four", "four", CUE),
        ("three", f"{A}\n four", "four", CUE),
        ("three", "assistant :four", "four", CUE),
        ("three", f"Assistant:{A} four", "four", CUE),
        ("three", "four Assistant: five", "four Assistant: five", set()),
        # As in HH, where a writer took the wrong side.
        (f"{H} three{A}", " Human: What do you mean?", "Human: What do you mean?", set()),
        (f"{H} three{A}", " Human: three", "Human: three", set()),
    ],
)
def test_a_response_is_the_last_turn(
    prompt: str, response: str, expected: str, notes: set[str]
) -> None:
    found: set[str] = set()
    row = parse_row({"prompt": prompt, "response": response}, "f:1", found)
    assert isinstance(row, Demonstration)
    assert row.response == expected
    assert found & (REPEATED | CUE) == notes
    pair = {"prompt": prompt, "chosen": response, "rejected": f"{A} other"}
    assert parse_row(pair, "f:1") == Preference(row.history, expected, "other", "f:1")


def test_a_response_that_is_another_dialogue_is_refused() -> None:
    with pytest.raises(ValueError, match="`response` is a dialogue that does not begin with the"):
        parse_row({"prompt": "one", "response": f"{H} two{A} three"}, "f:1")


def test_a_pairs_response_may_have_a_second_cue() -> None:
    assert split_pair(f"{H} q{A} Assistant: a", f"{H} q{A} b")[1:] == ("a", "b")


def test_half_a_character_is_refused_where_it_is_needed() -> None:
    with pytest.raises(ValueError, match=r"`response` holds half of a character \(\\ud83d\)"):
        parse_row({"prompt": "a", "response": "b \ud83d"}, "f:1")
    assert parse_row({"prompt": "a", "by": "\ud83d"}, "f:1") == Prompt(turns("a"), None, "f:1")


@pytest.mark.parametrize(
    ("response", "end"),
    [
        (f"Yo{H} And?{A} Ok", 2),
        ("Yo\r\n\r\nhuman: And?", 2),
        (f"Yo{A} again", 2),
        ("Yo\nHuman: And?\nAssistant: Ok", 2),
        ("Yo\nHuman: a being that speaks", None),
        ("Yo, Human: And?", None),
    ],
)
def test_a_response_ends_where_another_turn_begins(response: str, end: int | None) -> None:
    assert end_of_response(response) == end


@pytest.mark.parametrize("filler", ["\n", " ", "\r\n", "\n ", "\nHuman:", "Assistant:\n\n"])
def test_long_runs_cost_no_more_than_their_length(filler: str) -> None:
    # Of the square of its length, one of these would take minutes.
    text = filler * 50_000
    with contextlib.suppress(ValueError):
        parse_row({"prompt": f"a{text}b", "response": f"a{text}b"}, "f:1")
    assert split_turns(f"a{text}b")


def test_real_pairs_can_be_put_together_again(shared_data: Path) -> None:
    with gzip.open(shared_data / "hh" / "harmless-train.jsonl.gz", "rt") as file:
        lines = file.readlines()
    different, empty = 0, 0
    for line in lines:
        row = json.loads(line)
        history, good, bad = split_pair(row["chosen"], row["rejected"])
        shared = "".join(f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in history)
        for whole, rest in ((row["chosen"], good), (row["rejected"], bad)):
            assert "".join(whole.split()) == "".join(f"{shared}{A} {rest}".split())
        cuts = [row[side].rsplit(A, 1)[0] for side in ("chosen", "rejected")]
        different += cuts[0] != cuts[1]
        empty += "" in (good, bad)
    # Counted by hand in the file: 2 pairs differ before their last response, 4 have an empty side.
    assert (len(lines), different, empty) == (1750, 2, 4)


@pytest.mark.parametrize(
    "read",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"prompt": "Hi", "response": "Yes"},
        {"text": "\n\nHuman: Hi\n\nAssistant: Yes"},
        {"prompt": "Hi"},
    ],
)
def test_what_is_not_read_is_kept(read: dict[str, str]) -> None:
    others = {"answer": 42, "labels": ["a", None]}
    assert parse_row(read | others, "f:1").fields == others
    assert parse_row(read, "f:1").fields == {}


TOLD = (Turn("system", "Be kind.\n\nBe brief."), Turn("human", "Hi\n\nSystem: no"))


def test_a_system_turn_survives_the_text_that_judges_read() -> None:
    text = format_dialogue(TOLD)
    assert text == ("\n\nSystem: Be kind.\n\nBe brief.\n\nHuman: Hi\n\nSystem: no\n\nAssistant:")
    assert parse_prompt(text) == TOLD
    assert split_turns(text) == [
        ("System", "Be kind.\n\nBe brief."),
        ("Human", "Hi\n\nSystem: no"),
    ]
    # Only a dialogue begins with a system turn.
    assert parse_prompt("System: what is it?") == (Turn("human", "System: what is it?"),)
    assert split_turns("System: what is it?") == [("", "System: what is it?")]
