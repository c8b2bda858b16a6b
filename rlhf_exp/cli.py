"""`rlhf-exp`: looks at runs, serves their models and tidies up; `launch.py` trains and evaluates.

Wherever a RUN is asked for: `latest`, a name, the beginning of a key, or a folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_exp.commands import options
from rlhf_exp.errors import UserError

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each imports what it needs when it runs."""
    root = argparse.ArgumentParser(prog="rlhf-exp", description=__doc__.split("\n\n")[0])
    root.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="output_dir of the runs (outputs)"
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    _runs(commands)
    _models(commands)
    _people(commands)
    _judges(commands)
    _store(commands)
    return root


def _runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser("status", help="list runs, or the points of one")
    status.add_argument("run", nargs="?", metavar="RUN")
    status.set_defaults(command=_status)

    cancel = commands.add_parser("cancel", help="cancel the Slurm jobs of a run or multirun")
    cancel.add_argument("name", metavar="NAME")
    cancel.set_defaults(command=_cancel)

    fetch = commands.add_parser("fetch", help="download what a run needs from the hub, and pin it")
    fetch.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as launch.py takes them")
    fetch.add_argument("--config-dir", type=Path, metavar="DIR", help="as launch.py takes it")
    fetch.add_argument("--update", action="store_true", help="take the newest revisions")
    fetch.set_defaults(command=_fetch)

    sync = commands.add_parser("sync", help="send to W&B what was recorded offline")
    sync.add_argument("run", metavar="RUN")
    sync.add_argument("--dry-run", action="store_true", help="say what would be sent")
    sync.set_defaults(command=_sync)

    report = commands.add_parser("report", help="write the report of a run, a sweep or any runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="or NAME:KEY=VALUE,... of a sweep")
    budget = "judge by the highest validation reward within this KL per answer"
    report.add_argument("--kl-budget", type=float, metavar="NATS", help=budget)
    report.set_defaults(command=_report)

    figures = commands.add_parser("figures", help="write the charts of a run as SVG files")
    figures.add_argument("run", metavar="RUN")
    figures.add_argument("folder", type=Path, metavar="DIR")
    figures.set_defaults(command=_figures)

    compare = commands.add_parser("compare", help="differences in config and results")
    for side, name in (("first", "A"), ("second", "B")):
        compare.add_argument(side, metavar=name, help="a run, a sweep, or NAME:KEY=VALUE,... of it")
    compare.set_defaults(command=_compare)
    for command in (report, compare):
        form = command.add_mutually_exclusive_group()
        for name in ("json", "csv"):
            text = f"print {name.upper()} instead"
            form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=text)


def _models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser("chat", help="talk to a run's model")
    options.chat_options(chat)
    chat.set_defaults(command=_chat)

    export = commands.add_parser("export", help="write a run's model as a Hugging Face folder")
    options.export_options(export)
    export.set_defaults(command=_export)

    serve = commands.add_parser("serve-reward", help="score responses for PPO elsewhere")
    options.serve_options(serve)
    serve.set_defaults(command=_serve_reward)


def _people(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    annotate = commands.add_parser("annotate", help="let people judge a run's answers")
    options.annotate_options(annotate)
    annotate.set_defaults(command=_annotate)


def _judges(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    judge = commands.add_parser("judge", help="compare judges with people on a file of pairs")
    options.judge_options(judge)
    judge.set_defaults(command=_judge)


def _store(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    store = commands.add_parser("store", help="artifacts: ls, show, rm, gc")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list artifacts, and the disk space of each run name")
    listing.set_defaults(command=_store_ls)
    show = actions.add_parser("show", help="show what an artifact was made from")
    show.add_argument("key", metavar="KEY")
    show.set_defaults(command=_store_show)
    remove = actions.add_parser("rm", help="delete artifacts")
    remove.add_argument("keys", nargs="+", metavar="KEY")
    collect = actions.add_parser("gc", help="delete what no run refers to")
    options.collect_options(collect)
    for action, command in ((remove, _store_rm), (collect, _store_gc)):
        action.add_argument("--dry-run", action="store_true", help="say what would be deleted")
        action.set_defaults(command=command)


def _status(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.status import status

    print(status(arguments.outputs, arguments.run), end="")


def _cancel(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.cancel import cancel

    print(cancel(arguments.outputs, arguments.name), end="")


def _fetch(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.fetch import fetch

    fetch(arguments.overrides, arguments.config_dir, arguments.update, print)


def _sync(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.sync import sync

    shown, failed = sync(arguments.outputs, arguments.run, arguments.dry_run, print)
    print(shown, end="")
    if failed:
        raise UserError(f"{failed} runs were not sent; the same command tries them again")


def _report(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.report import report

    form = arguments.form or "page"
    print(report(arguments.outputs, arguments.runs, form, arguments.kl_budget), end="")


def _figures(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.figures import write_figures

    for path in write_figures(arguments.outputs, arguments.run, arguments.folder):
        print(path)


def _compare(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.compare import compare

    form = arguments.form or "text"
    print(compare(arguments.outputs, arguments.first, arguments.second, form), end="")


def _chat(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.chat import chat

    chat(arguments.outputs, arguments.run, arguments.against, arguments.temperature, arguments.seed)


def _export(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.export import export

    print(export(arguments.outputs, arguments.run, arguments.folder, arguments.step))


def _serve_reward(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.serve_reward import Wanted, serve_reward

    given = vars(arguments)
    wanted = Wanted(**{field.name: given[field.name] for field in dataclasses.fields(Wanted)})
    serve_reward(arguments.outputs, arguments.run, wanted)


def _annotate(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.annotate import Wanted, annotate
    from rlhf_exp.commands.studies import Design

    given = vars(arguments)
    design = Design(**{field.name: given[field.name] for field in dataclasses.fields(Design)})
    wanted = Wanted(**{field.name: given[field.name] for field in dataclasses.fields(Wanted)})
    annotate(arguments.outputs, arguments.run, design, arguments.study, wanted)


def _judge(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.judge import Panel, judge

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    names = [field.name for field in dataclasses.fields(Panel)]
    panel = Panel(**{name: given[name] for name in names if name in given})
    outputs, file = arguments.outputs, arguments.file
    print(judge(outputs, file, panel, arguments.pairs, arguments.out), end="")


def _store_ls(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.disk import listing

    print(listing(arguments.outputs), end="")


def _store_show(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.runs import Outputs
    from rlhf_exp.store import views

    print(views.show(Outputs(arguments.outputs).store.get(arguments.key)), end="")


def _store_rm(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.runs import Outputs
    from rlhf_exp.store import views

    print(views.remove(Outputs(arguments.outputs).store, arguments.keys, arguments.dry_run), end="")


def _store_gc(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.disk import collect

    given = (arguments.older_than, arguments.sweep, arguments.keep)
    print(collect(arguments.outputs, arguments.dry_run, *given), end="")


if __name__ == "__main__":
    sys.exit(main())
