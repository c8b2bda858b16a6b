"""Records of every known format."""

from __future__ import annotations

import pytest

from rlhf_exp.data.formats import parse_row
from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Turn

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
        ({"prompt": "hi", "chosen": "a", "rejected": None}, "`rejected` is NoneType"),
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
