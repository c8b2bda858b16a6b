"""`rlhf-exp` trains and evaluates (`run`), looks at runs, serves their models and tidies up.

A RUN is `latest`, a name, the beginning of a key, or a folder. Commands import their modules only
when they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_exp import __version__
from rlhf_exp.errors import UserError
from rlhf_exp.processes.failures import exit_after
from rlhf_exp.redaction import install
from rlhf_exp.safe_text import accept_any_text
from rlhf_exp.store.atomic_files import write_error

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["-sc"] and not _completes_overrides():
        print(*_command_names(parser()))
        return 0
    if given[:1] in (["run"], ["-sc"]):
        from rlhf_exp.hydra_app import main as run

        exit_after(lambda: run(given[1:] if given[0] == "run" else given))
    install()
    accept_any_text()
    arguments = parser().parse_args(given)
    try:
        arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        refused = write_error(error, arguments.outputs)
        if refused is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _completes_overrides() -> bool:
    """Prepare a shell's completion of overrides; return whether the typed line has any.

    The script of `rlhf-exp run -sc install=bash` asks with the typed line in a variable. Hydra
    expects overrides behind the program's name, where `run` stands here.
    """
    line = os.environ.get("COMP_LINE", "")
    typed = re.match(r"(\S+\s+)run\s", line)
    if typed is not None:
        os.environ["COMP_LINE"] = typed[1] + line[typed.end() :]
    return typed is not None


def _command_names(root: argparse.ArgumentParser) -> list[str]:
    (commands,) = (one for one in root._actions if isinstance(one, argparse._SubParsersAction))
    return list(commands.choices)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    root = argparse.ArgumentParser(prog="rlhf-exp", description=__doc__.split("\n\n")[0])
    root.add_argument("--version", action="version", version=f"rlhf-exp {__version__}")
    root.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="output_dir of the runs (outputs)"
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    # `main` hands it over before anything is parsed: its options are Hydra's.
    commands.add_parser("run", help="train and evaluate, as launch.py: rlhf-exp run --help")
    _add_run_commands(commands)
    _add_model_commands(commands)
    _add_annotate_command(commands)
    _add_judge_command(commands)
    _add_store_commands(commands)
    return root


def _add_run_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser("status", help="list runs, or the points of one")
    status.add_argument("run", nargs="?", metavar="RUN")
    status.add_argument("--json", action="store_true", help="print JSON instead")
    status.set_defaults(command=_run_status)

    profile = commands.add_parser("profile", help="where a PPO run's time goes, and what to change")
    profile.add_argument("run", metavar="RUN")
    text = "take the limits of this GPU's data sheet (a100-40gb, a100, h100, h200)"
    profile.add_argument("--device", metavar="NAME", help=text)
    profile.add_argument("--json", action="store_true", help="print JSON instead")
    profile.set_defaults(command=_run_profile)

    cancel = commands.add_parser("cancel", help="cancel the Slurm jobs of a run or multirun")
    cancel.add_argument("name", metavar="NAME")
    cancel.set_defaults(command=_run_cancel)

    doctor = commands.add_parser("doctor", help="list what will not work of a run, before it runs")
    fetch = commands.add_parser("fetch", help="download what a run needs from the hub, and pin it")
    for command in (doctor, fetch):
        add = command.add_argument
        add("overrides", nargs="*", metavar="OVERRIDE", help="as launch.py takes them")
        add("--config-dir", type=Path, metavar="DIR", help="as launch.py takes it")
    doctor.set_defaults(command=_run_doctor)
    fetch.add_argument("--update", action="store_true", help="take the newest revisions")
    fetch.set_defaults(command=_run_fetch)

    data = commands.add_parser("data", help="show how a data file is read, and what is left out")
    data_options(data)
    data.set_defaults(command=_run_data)

    sync = commands.add_parser("sync", help="send to W&B what was recorded offline")
    sync.add_argument("run", metavar="RUN")
    sync.add_argument("--dry-run", action="store_true", help="say what would be sent")
    sync.set_defaults(command=_run_sync)

    report = commands.add_parser("report", help="write the report of a run, a sweep or any runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="or NAME:KEY=VALUE,... of a sweep")
    budget = "judge by the highest validation reward within this KL per answer"
    report.add_argument("--kl-budget", type=float, metavar="NATS", help=budget)
    report.set_defaults(command=_run_report)

    figures = commands.add_parser("figures", help="write the charts of a run as SVG files")
    figures.add_argument("run", metavar="RUN")
    figures.add_argument("folder", type=Path, metavar="DIR")
    figures.set_defaults(command=_run_figures)

    compare = commands.add_parser("compare", help="differences in config and results")
    for side, name in (("first", "A"), ("second", "B")):
        compare.add_argument(side, metavar=name, help="a run, a sweep, or NAME:KEY=VALUE,... of it")
    compare.set_defaults(command=_run_compare)
    for command in (report, compare):
        form = command.add_mutually_exclusive_group()
        for name in ("json", "csv"):
            text = f"print {name.upper()} instead"
            form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=text)


def _add_model_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser("chat", help="talk to a run's model")
    chat_options(chat)
    chat.set_defaults(command=_run_chat)

    export = commands.add_parser("export", help="write a run's model as a Hugging Face folder")
    export_options(export)
    export.set_defaults(command=_run_export)

    serve = commands.add_parser("serve-reward", help="score responses for PPO elsewhere")
    serve_options(serve)
    serve.set_defaults(command=_run_serve_reward)
    vllm = commands.add_parser("vllm-server", help="sample for PPO elsewhere, by vLLM")
    vllm.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    vllm.add_argument("--port", type=int, default=8500, help="port to listen on (8500)")
    vllm.add_argument("--python", help="interpreter with vLLM (RLHF_EXP_VLLM_PYTHON, or this one)")
    vllm.add_argument("--threads", type=int, metavar="N", help="processor threads (vLLM's choice)")
    vllm.set_defaults(command=_run_vllm_server)


def _add_annotate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    annotate = commands.add_parser("annotate", help="let people judge a run's answers")
    annotate_options(annotate)
    annotate.set_defaults(command=_run_annotate)


def _add_judge_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    judge = commands.add_parser("judge", help="compare judges with people on a file of pairs")
    judge_options(judge)
    judge.set_defaults(command=_run_judge)


def _add_store_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    store = commands.add_parser("store", help="artifacts: ls, show, rm, gc")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list artifacts, and the disk space of each run name")
    listing.set_defaults(command=_run_store_ls)
    show = actions.add_parser("show", help="show what an artifact was made from")
    show.add_argument("key", metavar="KEY")
    show.set_defaults(command=_run_store_show)
    remove = actions.add_parser("rm", help="delete artifacts")
    remove.add_argument("keys", nargs="+", metavar="KEY")
    gc = actions.add_parser("gc", help="delete what no run refers to")
    gc_options(gc)
    for action, command in ((remove, _run_store_rm), (gc, _run_store_gc)):
        action.add_argument("--dry-run", action="store_true", help="say what would be deleted")
        action.set_defaults(command=command)


def data_options(data: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp data`."""
    add = data.add_argument
    add("source", nargs="?", metavar="FILE", help="a file, folder or hub id (the config's data)")
    add("overrides", nargs="*", metavar="OVERRIDE", help="as launch.py takes them")
    add("--config-dir", type=Path, metavar="DIR", help="as launch.py takes it")
    roles = ("preferences", "demonstrations", "prompts")
    add("--as", dest="role", choices=roles, help="what it serves as (what its layout gives)")
    add("--rows", type=int, default=3, metavar="N", help="rows to show (3)")
    add("--json", action="store_true", help="print JSON instead")


def annotate_options(annotate: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp annotate`."""
    annotate.add_argument("run", metavar="RUN", help="a run, or a JSONL file of pairs of answers")
    add = annotate.add_argument
    add("--collect", action="store_true", help="gather preferences to train on")
    add(
        "--study",
        dest="campaign",
        type=Path,
        metavar="FILE",
        help="the study's file (OUTPUTS/human/RUN.sqlite)",
    )
    add("--annotators", metavar="N|NAMES", help="how many, or their names: anna,ben")
    add("--criteria", metavar="NAMES", help="what is asked: overall,helpful,harmless (overall)")
    add("--prompts", type=int, metavar="N", help="prompts to judge (100)")
    add("--seed", type=int, help="of prompts, sides and order (0)")
    add("--instructions", type=Path, metavar="FILE", help="a text instead of the usual one")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8470, help="port to listen on; 0: any (8470)")
    add("--url", help="the server's address as annotators see it, for their links")
    instead = annotate.add_mutually_exclusive_group()
    for option, name, formats in (
        ("--import", "read", "jsonl, labelstudio or groundtruth"),
        ("--export", "write", "jsonl, preferences, labelstudio or groundtruth"),
    ):
        words, text = ("FORMAT", "PATH"), f"{name} votes: {formats}"
        instead.add_argument(option, dest=name, nargs=2, metavar=words, help=text)
    instead.add_argument("--results", action="store_true", help="print the results so far")


def chat_options(chat: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp chat`."""
    chat.add_argument("run", metavar="RUN")
    add = chat.add_argument
    add("--against", metavar="ROLE|RUN", help="a second model: `sft`, or another run")
    add("--temperature", type=float, default=0.7, help="0: most probable tokens")
    add("--seed", type=int, default=0)


def export_options(export: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp export`."""
    export.add_argument("run", metavar="RUN")
    export.add_argument("folder", type=Path, metavar="DIR")
    add = export.add_argument
    add("--step", type=int, metavar="N", help="the snapshot of this step")
    add("--push", metavar="ORG/NAME", help="also upload it to this repository of the hub")
    add("--private", action="store_true", help="make the repository private, if it is new")


def serve_options(serve: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp serve-reward`."""
    text = "a run with a reward model, or the folder of one"
    serve.add_argument("run", metavar="RUN|DIR", help=text)
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8480, help="port to listen on; 0: any (8480)")
    add("--device", help="cpu, cuda or cuda:N (the first GPU, else the processor)")
    add("--batch", type=int, metavar="N", help="responses read at once (the run's)")
    add("--seq-length", type=int, metavar="N", help="most tokens of a row (the run's)")
    formats = ("float32", "bfloat16")
    add("--dtype", choices=formats, help="number format of weights and products (the run's)")
    prompts = ("hh", "chat_template", "plain")
    add("--format", choices=prompts, default="hh", help="of prompts; for a folder without a run")
    add("--key-env", metavar="VARIABLE", help="environment variable with a key to ask for")


def judge_options(judge: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp judge`."""
    judge.add_argument("file", type=Path, metavar="FILE", help="pairs that people have judged")
    add = judge.add_argument
    several = "a reward model; may be repeated"
    add("--reward", action="append", default=[], metavar="RUN|DIR|ID", help=several)
    add("--llm", metavar="NAME", help="a language model behind an OpenAI-compatible endpoint")
    add("--url", help="the endpoint, such as http://127.0.0.1:8000/v1")
    add("--key-env", metavar="VARIABLE", help="environment variable with the endpoint's key")
    add("--criterion", help="what the better answer is more of, as the LLM is asked")
    field = "a further field of each request; may be repeated"
    add("--request", action="append", default=[], metavar="NAME:JSON", help=field)
    add("--concurrency", type=int, metavar="N", help="requests under way at once (8)")
    add("--question", metavar="NAME", help="count the votes on it, of a file with several (first)")
    add("--pairs", type=int, metavar="N", help="only the first N pairs")
    add("--out", type=Path, metavar="FILE", help="write the numbers as JSON")


def gc_options(gc: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp store gc`, except --dry-run."""
    add = gc.add_argument
    add("--older-than", metavar="AGE", help="only what was last used longer ago: 7d, 12h (1h)")
    add("--sweep", metavar="NAME", help="also let go of runs of this name, by --keep")
    add("--keep", metavar="RULE", help="the ended runs that keep their results: best:3, last:5")


def _run_status(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.inspect import status

    form = "json" if arguments.json else "text"
    print(status(arguments.outputs, arguments.run, form), end="")


def _run_profile(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.profile import profile

    form = "json" if arguments.json else "text"
    print(profile(arguments.outputs, arguments.run, arguments.device, form), end="")


def _run_cancel(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.inspect import cancel

    print(cancel(arguments.outputs, arguments.name), end="")


def _run_doctor(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.doctor import doctor

    print(doctor(arguments.overrides, arguments.config_dir), end="")


def _run_data(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.data import as_json, as_text, describe_data

    source, overrides = arguments.source, arguments.overrides
    if source is not None and "=" in source and not Path(source).exists():
        source, overrides = None, [source, *overrides]
    found = describe_data(source, arguments.role, overrides, arguments.config_dir, arguments.rows)
    print(as_json(found) if arguments.json else as_text(found), end="")


def _run_fetch(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.sync import fetch

    fetch(arguments.overrides, arguments.config_dir, arguments.update, print)


def _run_sync(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.sync import sync

    text, failed = sync(arguments.outputs, arguments.run, arguments.dry_run, print)
    print(text, end="")
    if failed:
        raise UserError(f"{failed} runs were not sent; the same command tries them again")


def _run_report(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.inspect import report

    form = arguments.form or "page"
    print(report(arguments.outputs, arguments.runs, form, arguments.kl_budget), end="")


def _run_figures(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.inspect import write_figures

    for path in write_figures(arguments.outputs, arguments.run, arguments.folder):
        print(path)


def _run_compare(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.inspect import compare

    form = arguments.form or "text"
    print(compare(arguments.outputs, arguments.first, arguments.second, form), end="")


def _run_chat(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.models import chat

    chat(arguments.outputs, arguments.run, arguments.against, arguments.temperature, arguments.seed)


def _run_export(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.models import export

    if arguments.private and arguments.push is None:
        raise UserError("--private: says how --push makes a repository; give both")
    push = arguments.push, arguments.private
    print(export(arguments.outputs, arguments.run, arguments.folder, arguments.step, *push))


def _run_serve_reward(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.serve_reward import ServeOptions, serve_reward

    values = vars(arguments)
    options = ServeOptions(
        **{field.name: values[field.name] for field in dataclasses.fields(ServeOptions)}
    )
    serve_reward(arguments.outputs, arguments.run, options)


def _run_vllm_server(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.vllm_server import VllmServerOptions, vllm_server

    values = vars(arguments)
    names = [field.name for field in dataclasses.fields(VllmServerOptions)]
    vllm_server(VllmServerOptions(**{name: values[name] for name in names}))


def _run_annotate(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.annotate import AnnotateOptions, CampaignDesign, annotate

    values = vars(arguments)
    design = CampaignDesign(
        **{field.name: values[field.name] for field in dataclasses.fields(CampaignDesign)}
    )
    options = AnnotateOptions(
        **{field.name: values[field.name] for field in dataclasses.fields(AnnotateOptions)}
    )
    annotate(arguments.outputs, arguments.run, design, arguments.campaign, options)


def _run_judge(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.judge import RequestedJudges, judge

    values = {name: value for name, value in vars(arguments).items() if value is not None}
    names = [field.name for field in dataclasses.fields(RequestedJudges)]
    panel = RequestedJudges(**{name: values[name] for name in names if name in values})
    outputs, file, question = arguments.outputs, arguments.file, arguments.question
    print(judge(outputs, file, panel, arguments.pairs, arguments.out, question), end="")


def _run_store_ls(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.store import listing

    print(listing(arguments.outputs), end="")


def _run_store_show(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.runs import OutputFolder
    from rlhf_exp.commands.store import show

    print(show(OutputFolder(arguments.outputs).store.get(arguments.key)), end="")


def _run_store_rm(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.runs import OutputFolder
    from rlhf_exp.commands.store import remove

    store = OutputFolder(arguments.outputs).store
    print(remove(store, arguments.keys, arguments.dry_run), end="")


def _run_store_gc(arguments: argparse.Namespace) -> None:
    from rlhf_exp.commands.store import collect_garbage

    rules = (arguments.older_than, arguments.sweep, arguments.keep)
    print(collect_garbage(arguments.outputs, arguments.dry_run, *rules), end="")


if __name__ == "__main__":
    sys.exit(main())
