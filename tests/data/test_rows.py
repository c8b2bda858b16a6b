"""Rows, their digest and the key of a prompt.

Which prompts are held out.
"""

from __future__ import annotations

import hashlib

from rlhf_exp.data.rows import (
    Demonstration,
    Preference,
    Prompt,
    Turn,
    convert_row,
    demonstrations_of,
    held_out_keys,
    prompt_key,
    prompts_of,
    rows_digest,
)

ASKED = (Turn("human", "How do I grow tomatoes?"),)


def test_a_prompts_key_levels_case_space_and_compatible_letters() -> None:
    key = prompt_key(ASKED)
    assert key == prompt_key((Turn("human", "  how do I  grow\nTOMATOES?"),))
    assert key == prompt_key((Turn("human", "How do I grow toma\uff54oes?"),))  # a full-width t


def test_a_prompts_key_tells_speakers_and_turns_apart() -> None:
    texts = [
        (Turn("human", "a"), Turn("human", "b")),
        (Turn("human", "a"), Turn("assistant", "b")),
        (Turn("human", "a b"),),
        (Turn("human", "b"), Turn("human", "a")),
    ]
    assert len({prompt_key(history) for history in texts}) == 4


def test_a_prompts_key_survives_lone_surrogates() -> None:
    assert len(prompt_key((Turn("human", "\ud83d"),))) == 64


def test_digest_is_of_content_and_order_but_not_of_origin() -> None:
    first, second = Demonstration(ASKED, "Water them.", "a:1"), Demonstration(ASKED, "No.", "a:2")
    moved = Demonstration(ASKED, "Water them.", "elsewhere:9")
    assert rows_digest([first, second]) == rows_digest([moved, second])
    assert rows_digest([first, second]) != rows_digest([second, first])
    assert rows_digest([first]) != rows_digest([first, second])
    assert rows_digest([Prompt(ASKED, None, "")]) != rows_digest([Prompt(ASKED, "", "")])


def test_other_fields_travel_with_the_prompt_and_change_nothing_else() -> None:
    pair = Preference(ASKED, "Water them.", "No.", "a:1", {"answer": 42, "source": ["x", "y"]})
    (prompt,) = prompts_of([pair], derived=True)
    (demonstration,) = demonstrations_of([pair], derived=True)
    as_prompt = convert_row(convert_row(pair, Demonstration), Prompt)
    for row in (prompt, demonstration, as_prompt):
        assert row.fields == {"answer": 42, "source": ["x", "y"]}
    bare = Preference(ASKED, "Water them.", "No.", "a:1")
    assert rows_digest([pair]) == rows_digest([bare])
    assert len({pair, bare}) == 1


def test_the_digest_of_rows_is_that_of_earlier_versions() -> None:
    # sha256 of '["Prompt", {"history": [{"role": "human", "text": "a"}], "original": null}]\n'
    digest = "10ec27d00ea54aabe8e5558d967c1314d3542265a09ae677ffc38e0e9fb1898f"
    assert rows_digest([Prompt((Turn("human", "a"),), None, "x:1", {"answer": 1})]) == digest


KEYS = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(2000)]


def test_fractions_are_kept_and_splits_are_disjoint() -> None:
    validation, test = held_out_keys(KEYS, set(), 0.1, 0.2)
    # Hashes are uniform: 200 and 400 expected, standard deviations 13 and 18.
    assert abs(len(validation) - 200) < 60
    assert abs(len(test) - 400) < 80
    assert not validation & test


def test_a_prompt_stays_where_it_is_when_others_come() -> None:
    validation, test = held_out_keys(KEYS[:1500], set(), 0.1, 0.2)
    more_validation, more_test = held_out_keys(KEYS[::-1], set(), 0.1, 0.2)
    assert validation < more_validation
    assert test < more_test
    assert not (more_validation | more_test) & (set(KEYS[:1500]) - validation - test)


def test_the_sources_own_test_split_is_taken_as_it_is() -> None:
    own = set(KEYS[:100])
    validation, test = held_out_keys(KEYS[50:], own, 0.1, 0.2)
    assert test == own
    assert validation
    assert not validation & own


def test_few_prompts_still_give_one_each_and_one_to_train_on() -> None:
    validation, test = held_out_keys(["0" * 64, "8" * 64, "f" * 64], set(), 0.01, 0.01)
    assert (validation, test) == ({"f" * 64}, {"0" * 64})
    assert held_out_keys(["8" * 64], set(), 0.5, 0.5) == (set(), set())
    assert held_out_keys(KEYS, set(), 0.0, 0.0) == (set(), set())


def test_fractions_that_overlap_leave_one_to_train_on() -> None:
    validation, test = held_out_keys(KEYS, set(), 0.9, 0.9)
    assert len(validation | test) == len(validation) + len(test) == 1999
