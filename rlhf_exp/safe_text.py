"""Untrusted text made safe to display, without characters that reorder, hide or control output.

Such characters are terminal escapes, right-to-left overrides and zero-width marks. HTML is escaped
elsewhere, by the templates and in SVG.
"""

from __future__ import annotations

import io
import sys
import unicodedata

# Line breaks and tabs are layout; the joiners shape letters in Persian, Indic scripts and emoji.
_HARMLESS = {"\n", "\t", "\u200c", "\u200d"}
# Cc and Cf: control and format characters. Cs: surrogates, which cannot be written as UTF-8.
# Zl and Zp: line and paragraph separators.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_CONTROL_PICTURES = 0x2400
_DELETE = 0x7F

MAX_CHARACTERS = 8_000


def visible(text: str) -> str:
    """Return `text` with control and format characters replaced by symbols: `␛`, `⟨U+202E⟩`.

    Line ends become line feeds; all other characters stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_character(character) for character in text.replace("\r\n", "\n"))


def well_formed(text: str) -> str:
    """Return `text` with halves of surrogate pairs joined, or replaced by U+FFFD if alone.

    JSON's escapes and bytes that are no UTF-8 can leave them in a text, which then can neither be
    written nor sent.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def accept_any_text() -> None:
    """Let this process read any bytes from its standard input, and print any text.

    Bytes that are no UTF-8 are read as halves of surrogate pairs (see `well_formed`), and what the
    terminal cannot show is printed as an escape.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def clipped(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return `text` cut to `limit` characters, with a note of the number left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n… {len(text) - limit:,} more characters not shown"


def _visible_character(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _UNSAFE_CATEGORIES:
        return character
    code = ord(character)
    if code < ord(" "):
        return chr(_CONTROL_PICTURES + code)
    if code == _DELETE:
        return "\u2421"
    return f"\u27e8U+{code:04X}\u27e9"
