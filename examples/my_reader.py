"""A reader of data files: rows from texts that no built-in layout has. See docs/how-to/data.md."""

from collections.abc import Iterator
from pathlib import Path


def read(path: Path) -> Iterator[dict[str, str]]:
    """Yield a pair from each block of three lines: a question, a good and a bad answer."""
    for block in path.read_text(encoding="utf-8").strip().split("\n---\n"):
        question, good, bad = block.splitlines()
        yield {"prompt": question, "chosen": good, "rejected": bad}
