"""Options of commands that have many; imports nothing that they need to run."""

from __future__ import annotations

import argparse
from pathlib import Path


def annotate_options(annotate: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp annotate`."""
    annotate.add_argument("run", metavar="RUN", help="a run, or a JSONL file of pairs of answers")
    add = annotate.add_argument
    add("--collect", action="store_true", help="gather preferences to train on")
    add("--study", type=Path, metavar="FILE", help="the study's file (OUTPUTS/human/RUN.sqlite)")
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
    export.add_argument("--step", type=int, metavar="N", help="the snapshot of this step")


def collect_options(collect: argparse.ArgumentParser) -> None:
    """Add the options of `rlhf-exp store gc`, but for --dry-run."""
    add = collect.add_argument
    add("--older-than", metavar="AGE", help="only what was last used longer ago: 7d, 12h (1h)")
    add("--sweep", metavar="NAME", help="also let go of runs of this name, by --keep")
    add("--keep", metavar="RULE", help="the ended runs that keep their results: best:3, last:5")


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
    add("--pairs", type=int, metavar="N", help="only the first N pairs")
    add("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
