"""The people part: which of the answers people can judge, and how.

The pairs are those of the preference part, whose `result.json` `rlhf-exp annotate` serves. Votes
come later and stay in the study's own file; the report reads them when it is written.
"""

from __future__ import annotations

from rlhf_exp.config.evaluation import PREFERENCE
from rlhf_exp.evaluation.preference import needed_pairs
from rlhf_exp.stages.bench import Bench, PartResult

FILE = "people.json"
# Shares of wins among decided pairs for which the size of a study is told.
EFFECTS = (0.6, 0.65, 0.7)


def run(bench: Bench) -> PartResult:
    """Count the pairs that differ; equal answers are ties that nobody has to read."""
    first, second = (one.name for one in bench.contestants[:2])
    texts = {
        name: {
            answer.row: answer.text
            for answer in bench.given
            if (answer.part, answer.model) == (PREFERENCE, name)
        }
        for name in (first, second)
    }
    differ = sum(text != texts[second][row] for row, text in texts[first].items())
    plain = {
        "names": [first, second],
        "prompts": len(texts[first]),
        "differ": differ,
        "needed": [[effect, needed_pairs(effect)] for effect in EFFECTS],
    }
    return PartResult({"people/pairs": float(differ)}, {FILE: plain})
