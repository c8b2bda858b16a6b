"""Untrusted text made safe to look at: nothing in it may reorder, hide or command what is shown.

Escaping for HTML is done elsewhere (templates and SVG escape everything); this is about characters
that act without being markup: terminal escapes, right-to-left overrides, zero-width marks.
"""

from __future__ import annotations

import unicodedata

# Line breaks and tabs are layout; the joiners shape letters in Persian, Indic scripts and emoji.
_KEPT = {"\n", "\t", "\u200c", "\u200d"}
# Cc and Cf: control and format characters. Cs: halves of pairs, which cannot be written as UTF-8.
# Zl and Zp: line and paragraph separators.
_ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_CONTROL_PICTURES = 0x2400
_DELETE = 0x7F

LIMIT = 8_000


def visible(text: str) -> str:
    """Return `text` with acting characters replaced by signs: `␛`, `⟨U+202E⟩`.

    Line ends become line feeds; every character of ordinary text stays as it is.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_sign(character) for character in text.replace("\r\n", "\n"))


def clipped(text: str, limit: int = LIMIT) -> str:
    """Return `text`, cut to `limit` characters with a note that says how many are left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n… {len(text) - limit:,} more characters not shown"


def _sign(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _ACTING:
        return character
    code = ord(character)
    if code < ord(" "):
        return chr(_CONTROL_PICTURES + code)
    if code == _DELETE:
        return "\u2421"
    return f"\u27e8U+{code:04X}\u27e9"
