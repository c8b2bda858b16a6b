"""`rlhf-exp annotate RUN`: people judge a run's answers, on a page or through a labelling service.

A study is made by the first command and kept in one file; every later one goes on with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.commands.studies import Design, open_study
from rlhf_exp.commands.text import table
from rlhf_exp.errors import UserError
from rlhf_exp.http.listening import address_of, is_local, listen, need_server, serve
from rlhf_exp.human.exchange.ground_truth import read_ground_truth, write_ground_truth
from rlhf_exp.human.exchange.label_studio import read_label_studio, write_label_studio
from rlhf_exp.human.exchange.lines import read_votes, write_votes
from rlhf_exp.human.exchange.preferences import write_preferences
from rlhf_exp.human.results import results
from rlhf_exp.human.study import NAME_LENGTH, Study
from rlhf_exp.human.summary import preference_lines, quality_lines
from rlhf_exp.human.wording import question

READERS = {
    "jsonl": read_votes,
    "labelstudio": read_label_studio,
    "groundtruth": read_ground_truth,
}
WRITERS = ("jsonl", "preferences", "labelstudio", "groundtruth")
# Exports of votes alone; the others also write what is to be judged.
LOOKS = ("jsonl", "preferences")
MOST_ANNOTATORS = 1000


@dataclass(frozen=True)
class Wanted:
    """What is to be done with a study.

    Attributes:
        annotators: how many, or their names; `None` leaves them as they are.
        read: format and path of votes to import.
        write: format and path of an export.
        results: print the results.
        host: address to listen on, if nothing else is to be done.
        port: port to listen on; 0 takes a free one.
        url: the server's address as annotators see it.
    """

    annotators: str | None = None
    read: tuple[str, str] | None = None
    write: tuple[str, str] | None = None
    results: bool = False
    host: str = "127.0.0.1"
    port: int = 8470
    url: str | None = None


def annotate(outputs: Path, run: str, design: Design, file: Path | None, wanted: Wanted) -> None:
    """Open or make the study of `run`; then exchange votes, print results, or serve the page.

    Raises:
        UserError: see `open_study`; or an unknown format, or no Starlette.
    """
    serving = not (wanted.read or wanted.write or wanted.results)
    _check(wanted, serving)
    # What only looks at votes must not fix a study by the usual options.
    looks = wanted.results or (wanted.write is not None and wanted.write[0] in LOOKS)
    study = open_study(outputs, run, design, file, make=not looks)
    if wanted.annotators is not None or (serving and not study.annotators()):
        study.invite(_names(wanted.annotators or "1"))
    if wanted.read is not None:
        _import(study, *wanted.read)
    elif wanted.write is not None:
        _export(study, *wanted.write)
    elif wanted.results:
        print(results_text(study), end="")
    else:
        _serve(study, wanted)


def results_text(study: Study) -> str:
    """Return the results so far, for the terminal."""
    found = results(study)
    rows = [(one.annotator, f"{one.answered} of {found.items}") for one in found.progress]
    parts = [table(("annotator", "answered"), rows)] if rows else []
    for one in found.criteria:
        lines = quality_lines(one)
        if not study.about.collect:
            lines = preference_lines(one, study.about) + lines
        parts.append(table((question(one.criterion), ""), lines))
    return "\n".join(parts)


def _check(wanted: Wanted, serving: bool) -> None:
    for given, known, option in (
        (wanted.read, tuple(READERS), "--import"),
        (wanted.write, WRITERS, "--export"),
    ):
        if given is not None and given[0] not in known:
            raise UserError(f"{option} {given[0]}: unknown format; expected {', '.join(known)}")
    if serving:
        need_server("annotate", "annotate")


def _names(text: str) -> list[str]:
    """Return the annotators' names: those listed, or `annotator-1` and so on."""
    if text.isdigit():
        if not 1 <= int(text) <= MOST_ANNOTATORS:
            raise UserError(f"--annotators {text}: expected 1 to {MOST_ANNOTATORS}, or names")
        return [f"annotator-{number}" for number in range(1, int(text) + 1)]
    names = [name.strip() for name in text.split(",")]
    if not all(0 < len(name) <= NAME_LENGTH and name.isprintable() for name in names):
        raise UserError(
            f"--annotators {text!r}: expected a number, or names of 1 to {NAME_LENGTH} characters "
            "with commas between them"
        )
    return names


def _import(study: Study, kind: str, path: str) -> None:
    votes = READERS[kind](study, Path(path))
    new = study.add(votes)
    print(f"{path}: {len(votes)} votes, {new} of them new; {study.path}")


def _export(study: Study, kind: str, path: str) -> None:
    if kind == "jsonl":
        print(f"{path}: {write_votes(study, Path(path))} votes")
    elif kind == "preferences":
        told = write_preferences(study, Path(path), study.about.criteria[0])
        print(
            f"{path}: {told.preferences} preferences ({study.about.criteria[0]}); left out: "
            f"{told.ties} ties, {told.open} without a vote"
        )
    else:
        write = write_label_studio if kind == "labelstudio" else write_ground_truth
        for written in write(study, Path(path)):
            print(written)


def _serve(study: Study, wanted: Wanted) -> None:
    from rlhf_exp.human.app import make_app

    bound = listen(wanted.host, wanted.port)
    base = (wanted.url or address_of(bound)).rstrip("/")
    people, about = study.annotators(), study.about
    expected = len(study.items) * len(about.criteria) * len(people)
    print(f"{study.path}: {len(study.items)} prompts, {len(study.votes())} of {expected} votes")
    rows = [(person.name, f"{base}/a/{person.token}") for person in people]
    rows.append(("results, for you only", f"{base}/o/{about.owner}"))
    width = max(len(name) for name, _ in rows)
    for name, link in rows:
        print(f"  {name.ljust(width)}  {link}")
    if not is_local(bound):
        print(
            "Others on the network can reach this address, without encryption: put it behind a "
            "proxy with HTTPS (--url), or keep --host 127.0.0.1."
        )
    print("Ctrl-C ends it; the same command goes on, with the same links.", flush=True)
    serve(make_app(study), bound)
