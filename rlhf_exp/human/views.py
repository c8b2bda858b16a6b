"""What the pages show, and their rendering.

Texts of models and data are untrusted: templates escape everything, and characters that hide or
reorder text become signs (`visible`). Names of models and runs never reach an annotator's page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlhf_exp.data.dialogue import turns_of
from rlhf_exp.data.visible import visible
from rlhf_exp.human.guard import form_token, now_ms
from rlhf_exp.human.items import Item, order, side_of
from rlhf_exp.human.results import results
from rlhf_exp.human.study import Annotator, Study
from rlhf_exp.human.summary import preference_lines, quality_lines
from rlhf_exp.human.votes import Choice, Vote
from rlhf_exp.human.wording import question

STATIC = Path(__file__).parent / "static"
_TEMPLATES = Path(__file__).parent / "templates"
_SPEAKERS = {"Human": "Person", "Assistant": "Assistant", "": "Prompt"}


@dataclass(frozen=True)
class Asked:
    """One question about the item shown.

    Attributes:
        name: the criterion.
        text: the question.
        vote: the stored answer.
        current: whether the keys answer this one.
    """

    name: str
    text: str
    vote: Vote | None
    current: bool

    @property
    def revision(self) -> int:
        """The revision shown; 0 for none."""
        return self.vote.revision if self.vote else 0


class Desk:
    """One annotator's work: her items in her order, and her answers so far."""

    def __init__(self, study: Study, annotator: Annotator) -> None:
        self.study = study
        self.annotator = annotator
        self.criteria = study.about.criteria
        self.items = order(study.items, study.about.seed, annotator.name)
        self.votes: dict[str, dict[str, Vote]] = {}
        for vote in study.votes(annotator.name):
            self.votes.setdefault(vote.item, {})[vote.criterion] = vote

    def side(self, item: Item) -> int:
        """Return 0 if model a's answer is shown as A."""
        return side_of(self.study.about.seed, item.id, self.annotator.name)

    def answered(self, item: Item) -> bool:
        """Return whether every question about the item has an answer."""
        return len(self.votes.get(item.id, {})) == len(self.criteria)

    @property
    def count(self) -> int:
        """Number of items answered."""
        return sum(map(self.answered, self.items))

    def next_open(self, after: int = 0) -> int | None:
        """Return the number (from 1) of the next item to answer, beginning behind `after`."""
        numbers = [*range(after + 1, len(self.items) + 1), *range(1, after + 1)]
        return next((n for n in numbers if not self.answered(self.items[n - 1])), None)

    def asked(self, item: Item) -> list[Asked]:
        """Return the questions about an item."""
        votes = self.votes.get(item.id, {})
        current = next((name for name in self.criteria if name not in votes), self.criteria[0])
        return [Asked(n, question(n), votes.get(n), n == current) for n in self.criteria]


def start_page(desk: Desk) -> str:
    """Return instructions, progress and the list of questions."""
    marks = []
    for item in desk.items:
        votes = desk.votes.get(item.id, {})
        answers = [votes[name].choice.value for name in desk.criteria if name in votes]
        marks.append((desk.answered(item), ", ".join(answers)))
    return _render(
        "start.html",
        desk=desk,
        marks=marks,
        questions=[question(name) for name in desk.criteria],
        paragraphs=desk.study.about.instructions.split("\n\n"),
        next_open=desk.next_open(),
    )


def question_page(desk: Desk, number: int, alert: str = "") -> str:
    """Return the page of the item with this number, from 1."""
    item = desk.items[number - 1]
    answers = [item.answer_a, item.answer_b]
    shown_ms = now_ms()
    return _render(
        "question.html",
        desk=desk,
        number=number,
        turns=[(_SPEAKERS[role], text) for role, text in turns_of(item.prompt)],
        answers=answers[::-1] if desk.side(item) else answers,
        asked=desk.asked(item),
        answered=desk.answered(item),
        choices=list(Choice),
        paragraphs=desk.study.about.instructions.split("\n\n"),
        shown_ms=shown_ms,
        token=form_token(desk.study.about.secret, desk.annotator.name, item.id, shown_ms),
        alert=alert,
    )


def results_page(study: Study) -> str:
    """Return the owner's page."""
    found = results(study)
    sections = []
    for one in found.criteria:
        outcome = one.preference.outcome
        bar: Sequence[tuple[str, str, int]] = ()
        lines = quality_lines(one)
        if not study.about.collect:
            lines = preference_lines(one, study.about) + lines
            names = (f"{study.about.name_b} better", "Tie", f"{study.about.name_a} better")
            counts = (outcome.wins, outcome.ties, outcome.losses)
            bar = list(zip(("win", "tie", "loss"), names, counts, strict=True))
        sections.append((question(one.criterion), bar if outcome.total else (), lines))
    return _render("results.html", study=study, found=found, sections=sections)


def message_page(title: str, text: str) -> str:
    """Return a page that only says something."""
    return _render("message.html", title=title, text=text)


def _render(template: str, **values: Any) -> str:  # noqa: ANN401
    return _ENVIRONMENT.get_template(template).render(**values)


def _shown(value: object) -> object:
    """Make acting characters of a string that a template writes visible; markup is ours."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
