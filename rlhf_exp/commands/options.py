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
