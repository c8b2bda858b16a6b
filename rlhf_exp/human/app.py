"""The web application: pages of annotators, pages of the owner, votes.

Addresses: `/a/TOKEN` an annotator's start, `/a/TOKEN/7` her seventh item (GET shows it, POST
answers it), `/o/TOKEN` the owner's results. Everything but the style sheet and the script needs a
token.
"""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rlhf_exp.human import guard, views
from rlhf_exp.human.study import Conflict, Study, now
from rlhf_exp.human.views import Desk
from rlhf_exp.human.votes import Choice, Vote

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


def make_app(study: Study) -> Starlette:
    """Return the application that serves a study."""
    pages = _Pages(study)
    return Starlette(
        routes=[
            Route("/a/{token}", pages.start),
            Route("/a/{token}/{number:int}", pages.question),
            Route("/a/{token}/{number:int}", pages.answer, methods=["POST"]),
            Route("/o/{token}", pages.results),
            Mount("/static", StaticFiles(directory=views.STATIC)),
        ],
        middleware=[Middleware(guard.Headers)],
        exception_handlers={HTTPException: _refused},
    )


class _Pages:
    """The handlers; those that are no coroutines run in threads."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def start(self, request: Request) -> Response:
        return HTMLResponse(views.start_page(self._desk(request)))

    def question(self, request: Request) -> Response:
        desk = self._desk(request)
        return HTMLResponse(views.question_page(desk, _number(request, desk)))

    def results(self, request: Request) -> Response:
        if not guard.same(self.study.about.owner, request.path_params["token"]):
            raise HTTPException(403, _NO_LINK)
        return HTMLResponse(views.results_page(self.study))

    async def answer(self, request: Request) -> Response:
        fields = await _form(request)
        return await run_in_threadpool(self._answer, request, fields)

    def _answer(self, request: Request, fields: dict[str, str]) -> Response:
        desk = self._desk(request)
        number = _number(request, desk)
        vote = _vote(desk, number, fields)
        try:
            stored = self.study.record(vote)
        except Conflict as conflict:
            desk.votes.setdefault(vote.item, {})[vote.criterion] = conflict.stored
            return _conflict(request, desk, number)
        item = desk.items[number - 1]
        changed = desk.answered(item)
        desk.votes.setdefault(item.id, {})[vote.criterion] = stored
        target = f"/a/{desk.annotator.token}"
        # An earlier answer was changed: back to where the annotator had been.
        upcoming = desk.next_open(0 if changed else number - 1)
        if upcoming is not None:
            target += f"/{upcoming}"
        if _wants_json(request):
            return JSONResponse({"next": target})
        return RedirectResponse(target, 303)

    def _desk(self, request: Request) -> Desk:
        annotator = guard.find(self.study.annotators(), request.path_params["token"])
        if annotator is None:
            raise HTTPException(403, _NO_LINK)
        return Desk(self.study, annotator)


def _number(request: Request, desk: Desk) -> int:
    number: int = request.path_params["number"]
    if not 1 <= number <= len(desk.items):
        raise HTTPException(404, f"There are only {len(desk.items)} questions.")
    return number


async def _form(request: Request) -> dict[str, str]:
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


def _vote(desk: Desk, number: int, fields: dict[str, str]) -> Vote:
    """Return the vote in a form.

    Raises:
        HTTPException: the form was not made by this server for this annotator and item.
    """
    item, about = desk.items[number - 1], desk.study.about
    try:
        shown_ms, revision = int(fields["shown"]), int(fields["revision"])
        expected = guard.form_token(about.secret, desk.annotator.name, item.id, shown_ms)
        if not guard.same(expected, fields["token"]) or fields["criterion"] not in about.criteria:
            raise HTTPException(403, _BAD_FORM)
        choice = Choice(fields["choice"])
    except (KeyError, ValueError) as error:
        raise HTTPException(403, _BAD_FORM) from error
    return Vote(
        item=item.id,
        annotator=desk.annotator.name,
        criterion=fields["criterion"],
        side=desk.side(item),
        choice=choice,
        seconds=max(0, guard.now_ms() - shown_ms) / 1000,
        at=now(),
        revision=revision,
    )


def _conflict(request: Request, desk: Desk, number: int) -> Response:
    if _wants_json(request):
        return JSONResponse({"message": _CHANGED}, 409)
    return HTMLResponse(views.question_page(desk, number, _CHANGED), 409)


def _wants_json(request: Request) -> bool:
    return request.headers.get("accept") == "application/json"


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = _NO_LINK if error.status_code == 404 and error.detail == "Not Found" else error.detail
    if _wants_json(request):
        return JSONResponse({"message": text}, error.status_code)
    return HTMLResponse(views.message_page("Not possible", text), error.status_code)
