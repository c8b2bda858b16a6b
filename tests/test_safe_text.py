"""Characters that act are shown; all others stay."""

from __future__ import annotations

import pytest

from rlhf_exp.safe_text import clipped, visible, well_formed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\u241b[31mred\u2407"),  # terminal escape, bell
        ("a\x00b\x7f", "a\u2400b\u2421"),
        ("\u202egnp.exe", "⟨U+202E⟩gnp.exe"),
        ("\u2066in\u2069", "⟨U+2066⟩in⟨U+2069⟩"),
        ("a\u200bb\ufeff\u00ad", "a⟨U+200B⟩b⟨U+FEFF⟩⟨U+00AD⟩"),
        ("one\u2028two\x85", "one⟨U+2028⟩two⟨U+0085⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),  # invisible tag letters
        ("a\r\nb\rc", "a\nb\u240dc"),
    ],
)
def test_acting_characters_become_signs(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode("utf-8")


@pytest.mark.parametrize(
    "text",
    ["plain", "tab\tand\nline", "naïve β — 漢字", "مرحبا", "👩\u200d🔬", "می\u200cخواهم", "<b>&"],
)
def test_ordinary_text_stays(text: str) -> None:
    assert visible(text) == text


def test_long_text_is_cut_with_the_number_left_out() -> None:
    assert clipped("abc", limit=3) == "abc"
    assert clipped("x" * 12_003, limit=3) == "xxx\n… 12,000 more characters not shown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 👩\u200d🔬", "naïve 👩\u200d🔬"),
        ("half \ud83d", "half \ufffd"),
        ("\udce9 x", "\ufffd x"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ud83d\ud83d\ude00\ude00", "\ufffd\U0001f600\ufffd"),
    ],
)
def test_halves_of_surrogate_pairs(text: str, expected: str) -> None:
    assert well_formed(text) == expected
