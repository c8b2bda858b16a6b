"""What a finished run prints: the evaluation in the terminal, the answer before the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.report.run.verdict import marked_rows, p_label
from rlhf_exp.safe_text import visible

_STYLES = {"better": "green", "worse": "red", "unclear": "dim", "": ""}
_MARKS = {"better": "✓ ", "worse": "✗ ", "unclear": "", "": ""}


def print_headlines(sentences: Sequence[str], console: Console) -> None:
    """Print the answer: the first sentence stands out."""
    for number, sentence in enumerate(sentences):
        text = _text(sentence)
        text.stylize("dim" if number else "bold")
        console.print(text)


def print_comparison(result: ModelComparison, console: Console | None = None) -> None:
    """Print the comparison; by default to the standard output."""
    (console or Console()).print(comparison_table(result))


def comparison_table(result: ModelComparison) -> Group:
    """Return the comparison as an object that rich can print.

    Names are untrusted: they are put in as text, so neither rich's markup nor a terminal's escape
    sequences in them act.
    """
    outcome = result.outcome
    table = Table(title=_text(f"{result.name_b} against {result.name_a}, {outcome.total} prompts"))
    table.add_column("mean over prompts")
    for name in (result.name_a, result.name_b, f"difference [{result.level:.0%}]"):
        table.add_column(_text(name), justify="right")
    for row in marked_rows(result):
        mark = Text(_MARKS[row.verdict] + visible(row.difference), style=_STYLES[row.verdict])
        a, b = (_text(side.partition(" [")[0]) for side in (row.a, row.b))
        table.add_row(_text(row.label), a, b, mark)
    lines = [f"{outcome.wins} wins, {outcome.ties} ties, {outcome.losses} losses"]
    if outcome.decided:
        low, high = result.win_rate.low, result.win_rate.high
        lines[0] += (
            f"; wins {outcome.win_rate:.3f} of the decided [{low:.3f}, {high:.3f}], "
            f"exact sign test {p_label(result.p_value)}"
        )
    lines.append(f"judge: {result.judge}")
    if result.toxicity_scorer:
        lines[-1] += f"; toxicity: {result.toxicity_scorer}"
    if result.sampling:
        lines.append(f"answers of {result.sampling}")
    return Group(table, *(_text(line) for line in lines))


def _text(text: str) -> Text:
    return Text(visible(text))
