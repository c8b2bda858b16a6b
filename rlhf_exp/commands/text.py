"""Plain text tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 140


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """Return a table as text; cells are shown as they are, whatever markup is in them."""
    drawn = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH).print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
