"""Options of commands that have many; imports nothing that they need to run."""

from __future__ import annotations

import argparse
from pathlib import Path


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
