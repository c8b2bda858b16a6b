"""The web application of a campaign: pages of annotators, pages of the owner, votes.

Addresses: `/a/TOKEN` an annotator's start, `/a/TOKEN/7` her seventh item (GET shows it, POST
answers it), `/o/TOKEN` the owner's results. Everything but the style sheet and the script needs a
token, which is in the address; there are no cookies.

A form also carries a token of its own, bound to annotator, item and the time at which the page was
made: so a vote cannot be sent for a page that was not served, and the server measures its time.

Texts of models and data are untrusted: templates escape everything, and characters that hide or
reorder text become signs (`visible`). Names of models and runs never reach an annotator's page.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_exp.annotation.campaign import (
    SPEAKERS,
    Annotator,
    Campaign,
    Choice,
    Conflict,
    Item,
    Vote,
    display_order,
    display_side,
    now,
    question,
)
from rlhf_exp.annotation.results import preference_lines, quality_lines, results
from rlhf_exp.data.parsing import split_turns
from rlhf_exp.safe_text import visible

# A vote's form is some 300 bytes.
_FORM_LIMIT = 4096
_FIELDS_LIMIT = 20
_NO_LINK = "This address needs a personal link. Ask the person who invited you for yours."
_BAD_FORM = (
    "This form is not valid any more, so nothing was saved. Reload the page and answer again."
)
_CHANGED = (
    "This answer was changed in another window, so nothing was saved. The page shows what is "
    "stored now; answer again if you want something else."
)
STATIC = Path(__file__).parent / "static"
_TEMPLATES = Path(__file__).parent / "templates"


def make_app(campaign: Campaign) -> Starlette:
    """Return the application that serves a campaign."""
    handlers = _Handlers(campaign)
    return Starlette(
        routes=[
            Route("/a/{token}", handlers.start),
            Route("/a/{token}/{number:int}", handlers.question),
            Route("/a/{token}/{number:int}", handlers.answer, methods=["POST"]),
            Route("/o/{token}", handlers.results),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(SecurityHeaders)],
        exception_handlers={HTTPException: _error_page},
    )


class _Handlers:
    """The handlers of requests; those that are not coroutines run in threads."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign

    def start(self, request: Request) -> Response:
        return HTMLResponse(start_page(self._queue(request)))

    def question(self, request: Request) -> Response:
        queue = self._queue(request)
        return HTMLResponse(question_page(queue, _number(request, queue)))

    def results(self, request: Request) -> Response:
        if not tokens_equal(self.campaign.info.owner, request.path_params["token"]):
            raise HTTPException(403, _NO_LINK)
        return HTMLResponse(results_page(self.campaign))

    async def answer(self, request: Request) -> Response:
        fields = await _form_fields(request)
        return await run_in_threadpool(self._answer, request, fields)

    def _answer(self, request: Request, fields: dict[str, str]) -> Response:
        queue = self._queue(request)
        number = _number(request, queue)
        vote = _vote(queue, number, fields)
        try:
            stored = self.campaign.record(vote)
        except Conflict as conflict:
            queue.votes.setdefault(vote.item, {})[vote.criterion] = conflict.stored
            return _conflict(request, queue, number)
        item = queue.items[number - 1]
        changed = queue.answered(item)
        queue.votes.setdefault(item.id, {})[vote.criterion] = stored
        target = f"/a/{queue.annotator.token}"
        # After a change of an earlier answer, go back to where the annotator had been.
        upcoming = queue.next_open(0 if changed else number - 1)
        if upcoming is not None:
            target += f"/{upcoming}"
        if _wants_json(request):
            return JSONResponse({"next": target})
        return RedirectResponse(target, 303)

    def _queue(self, request: Request) -> AnnotatorQueue:
        annotator = annotator_with_token(self.campaign.annotators(), request.path_params["token"])
        if annotator is None:
            raise HTTPException(403, _NO_LINK)
        return AnnotatorQueue(self.campaign, annotator)


def _number(request: Request, queue: AnnotatorQueue) -> int:
    number: int = request.path_params["number"]
    if not 1 <= number <= len(queue.items):
        raise HTTPException(404, f"There are only {len(queue.items)} questions.")
    return number


async def _form_fields(request: Request) -> dict[str, str]:
    """Return the fields of a form; only small ones of the plain encoding are read."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise HTTPException(415, _BAD_FORM)
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _FORM_LIMIT:
            raise HTTPException(413, _BAD_FORM)
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=_FIELDS_LIMIT))
    except ValueError as error:
        raise HTTPException(403, _BAD_FORM) from error


def _vote(queue: AnnotatorQueue, number: int, fields: dict[str, str]) -> Vote:
    """Return the vote in a form.

    Raises:
        HTTPException: this server did not make the form for this annotator and item.
    """
    item, info = queue.items[number - 1], queue.campaign.info
    try:
        shown_ms, revision = int(fields["shown"]), int(fields["revision"])
        expected = form_token(info.secret, queue.annotator.name, item.id, shown_ms)
        if not tokens_equal(expected, fields["token"]) or fields["criterion"] not in info.criteria:
            raise HTTPException(403, _BAD_FORM)
        choice = Choice(fields["choice"])
    except (KeyError, ValueError) as error:
        raise HTTPException(403, _BAD_FORM) from error
    return Vote(
        item=item.id,
        annotator=queue.annotator.name,
        criterion=fields["criterion"],
        side=queue.side(item),
        choice=choice,
        seconds=max(0, now_ms() - shown_ms) / 1000,
        at=now(),
        revision=revision,
    )


def _conflict(request: Request, queue: AnnotatorQueue, number: int) -> Response:
    if _wants_json(request):
        return JSONResponse({"message": _CHANGED}, 409)
    return HTMLResponse(question_page(queue, number, _CHANGED), 409)


def _wants_json(request: Request) -> bool:
    return request.headers.get("accept") == "application/json"


def _error_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = _NO_LINK if error.status_code == 404 and error.detail == "Not Found" else error.detail
    if _wants_json(request):
        return JSONResponse({"message": text}, error.status_code)
    return HTMLResponse(message_page("Not possible", text), error.status_code)


class AnnotatorQueue:
    """One annotator's work: her items in her order, and her answers so far."""

    def __init__(self, campaign: Campaign, annotator: Annotator) -> None:
        self.campaign = campaign
        self.annotator = annotator
        self.criteria = campaign.info.criteria
        self.items = display_order(campaign.items, campaign.info.seed, annotator.name)
        self.votes: dict[str, dict[str, Vote]] = {}
        for vote in campaign.votes(annotator.name):
            self.votes.setdefault(vote.item, {})[vote.criterion] = vote

    def side(self, item: Item) -> int:
        """Return 0 if model a's answer is shown as A."""
        return display_side(self.campaign.info.seed, item.id, self.annotator.name)

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

    def questions(self, item: Item) -> list[ShownQuestion]:
        """Return the questions about an item."""
        votes = self.votes.get(item.id, {})
        current = next((name for name in self.criteria if name not in votes), self.criteria[0])
        return [ShownQuestion(n, question(n), votes.get(n), n == current) for n in self.criteria]


@dataclass(frozen=True)
class ShownQuestion:
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


def start_page(queue: AnnotatorQueue) -> str:
    """Return an annotator's start page: instructions, progress and the list of questions."""
    marks = []
    for item in queue.items:
        votes = queue.votes.get(item.id, {})
        answers = [votes[name].choice.value for name in queue.criteria if name in votes]
        marks.append((queue.answered(item), ", ".join(answers)))
    return _render(
        "start.html",
        queue=queue,
        marks=marks,
        questions=[question(name) for name in queue.criteria],
        paragraphs=queue.campaign.info.instructions.split("\n\n"),
        next_open=queue.next_open(),
    )


def question_page(queue: AnnotatorQueue, number: int, alert: str = "") -> str:
    """Return the page of the item with this number, from 1."""
    item = queue.items[number - 1]
    answers = [item.answer_a, item.answer_b]
    shown_ms = now_ms()
    return _render(
        "question.html",
        queue=queue,
        number=number,
        turns=[(SPEAKERS[role], text) for role, text in split_turns(item.prompt)],
        answers=answers[::-1] if queue.side(item) else answers,
        questions=queue.questions(item),
        answered=queue.answered(item),
        choices=list(Choice),
        paragraphs=queue.campaign.info.instructions.split("\n\n"),
        shown_ms=shown_ms,
        token=form_token(queue.campaign.info.secret, queue.annotator.name, item.id, shown_ms),
        alert=alert,
    )


def results_page(campaign: Campaign) -> str:
    """Return the owner's page."""
    campaign_results = results(campaign)
    sections = []
    for criterion in campaign_results.criteria:
        outcome = criterion.preference.outcome
        bar: Sequence[tuple[str, str, int]] = ()
        lines = quality_lines(criterion)
        if not campaign.info.collect:
            lines = preference_lines(criterion, campaign.info) + lines
            names = (f"{campaign.info.name_b} better", "Tie", f"{campaign.info.name_a} better")
            counts = (outcome.wins, outcome.ties, outcome.losses)
            bar = list(zip(("win", "tie", "loss"), names, counts, strict=True))
        sections.append((question(criterion.criterion), bar if outcome.total else (), lines))
    return _render("results.html", campaign=campaign, results=campaign_results, sections=sections)


def message_page(title: str, text: str) -> str:
    """Return a page with a message only."""
    return _render("message.html", title=title, text=text)


def _render(template: str, **values: Any) -> str:  # noqa: ANN401
    return _ENVIRONMENT.get_template(template).render(**values)


def _make_visible(value: object) -> object:
    """Make acting characters of a string that a template writes visible; markup is ours."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_make_visible,
    trim_blocks=True,
    lstrip_blocks=True,
)


def tokens_equal(left: str, right: str) -> bool:
    """Compare two tokens in constant time."""
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace"))


def annotator_with_token(annotators: Sequence[Annotator], token: str) -> Annotator | None:
    """Return the annotator whose link has this token, if there is one.

    All tokens are compared, so that the time taken does not depend on which one matches.
    """
    match = None
    for annotator in annotators:
        if tokens_equal(annotator.token, token):
            match = annotator
    return match


def form_token(secret: str, annotator: str, item: str, shown_ms: int) -> str:
    """Return the token of a form made for an annotator and an item at a time."""
    content = json.dumps([annotator, item, shown_ms])
    return hmac.new(bytes.fromhex(secret), content.encode(), "sha256").hexdigest()


def now_ms() -> int:
    """Return the server's time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Back and forward must show the answers stored now, not those of the first view.
    "Cache-Control": "no-store",
}


class SecurityHeaders:
    """Middleware: puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, guarded)
