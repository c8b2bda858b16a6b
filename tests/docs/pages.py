"""The pages of the documentation, and the blocks that a reader would type or run.

A block whose commands a test cannot run stands below a comment that says what it needs:

    <!-- needs: a Slurm cluster -->

Readers do not see the comment. Such commands are composed or parsed, and not run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Pages that are followed command by command.
FOLLOWED = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "tutorial").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<content>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Its page, from the root.
        line: Number of its first line in the page.
        language: As the page names it.
        content: Its lines.
        needs: What running it would need; nothing for a block that a test runs.
    """

    page: str
    line: int
    language: str
    content: str
    needs: str | None

    @property
    def commands(self) -> list[str]:
        """The commands of a block in bash: continued lines joined, comments left out."""
        if self.language != "bash":
            return []
        joined = self.content.replace("\\\n", " ")
        words = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [shlex.join(line) for line in words if line]

    @property
    def file(self) -> str | None:
        """The path that a block in YAML names in its first comment, for a reader to write."""
        found = re.match(r"(?:# @package .*\n)?# ([\w/.-]+\.yaml)\b", self.content)
        return found[1] if found and self.language == "yaml" else None


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            text.count("\n", 0, found.start("content")) + 1,
            found["language"],
            found["content"],
            found["needs"],
        )
        for found in _BLOCK.finditer(text)
    ]
