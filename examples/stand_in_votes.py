"""Votes of a stand-in for people, to try the loop of human feedback without any.

The rule-based judge of the bundled data votes on every pair of a study that
`rlhf-exp annotate RUN --collect` has made from it, and calls a tie what is nearly as good:

    python examples/stand_in_votes.py outputs/human/RUN-collect.sqlite stand-in.jsonl
    rlhf-exp annotate RUN --collect --import jsonl stand-in.jsonl

No person is asked, and nothing that is learned so says anything of people.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf_exp.annotation.campaign import Campaign
from rlhf_exp.data.toy.gold_judge import gold_score

ANNOTATOR = "gold-judge"
TIE = 0.05  # marks, of 0 to 1, by which a better answer must be better


def winner(prompt: str, answer_a: str, answer_b: str) -> str:
    """Return `a`, `tie` or `b`."""
    ahead = gold_score(prompt, answer_b).total - gold_score(prompt, answer_a).total
    if abs(ahead) < TIE:
        return "tie"
    return "b" if ahead > 0 else "a"


def main(study: Path, votes: Path) -> None:
    """Write one vote a line, as `--import jsonl` reads them."""
    with votes.open("w", encoding="utf-8") as file:
        for item in Campaign(study).items:
            vote = winner(item.prompt, item.answer_a, item.answer_b)
            line = {"item": item.id, "annotator": ANNOTATOR, "winner": vote}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
