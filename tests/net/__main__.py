"""Shows that a change leaves every result as it was, bit for bit.

    python -m tests.net OLD_REV [NEW_REV] [--cache DIR]

Runs `experiment=smoke` with the code of two git revisions (the second is the working tree unless
it is named), in one process and in two, and compares keys, weights, metrics and evaluations. The
exit code is 0 if all are equal, and 1 if not or if a run failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.net.facts import KINDS, NEEDED, Facts, differences, read
from tests.net.runs import MODES, OVERRIDES, RunFailed, check_out, commit_of, run

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Side:
    """One of the two revisions.

    Attributes:
        label: How it is called in the output.
        commit: Its hash, None for the working tree.
        tree: Where its files are written, if it has to run.
    """

    label: str
    commit: str | None
    tree: Path


def main(argv: Sequence[str]) -> int:
    """Compare two revisions and return the exit code."""
    options = _parse(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="net-") as folder:
        work = Path(folder).resolve()
        try:
            sides = [_side("old", options.old, work), _side("new", options.new, work)]
            facts = _collect(sides, options, work)
        except RunFailed as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    equal = True
    for mode in MODES:
        equal &= _report(mode, facts["old", mode], facts["new", mode], options.show)
    names = " and ".join(side.label for side in sides)
    verdict = "equal" if equal else "DIFFERENT"
    print(f"{names}: {verdict} ({time.monotonic() - started:.0f} s)")
    return 0 if equal else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.net",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD_REV", help="git revision to compare with")
    parser.add_argument("new", metavar="NEW_REV", nargs="?", help="default: the working tree")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep revisions' results here")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--show", type=int, default=5, help="differences shown of a kind")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a further override"
    )
    return parser.parse_args(argv)


def _side(name: str, revision: str | None, work: Path) -> Side:
    if revision is None:
        return Side("the working tree", None, work / name)
    commit = commit_of(revision)
    return Side(commit[:9], commit, work / name)


def _collect(
    sides: Sequence[Side], options: argparse.Namespace, work: Path
) -> dict[tuple[str, str], Facts]:
    """Return the facts of both sides in each mode, of those that were kept or of new runs."""
    found: dict[tuple[str, str], Facts] = {}
    waiting: list[tuple[Side, str]] = []
    for side in sides:
        for mode in MODES:
            place = _kept(side, mode, options)
            if place is not None and place.is_file():
                found[side.tree.name, mode] = json.loads(place.read_text(encoding="utf-8"))
                print(f"{side.label}, {mode}: kept in {place}")
            else:
                waiting.append((side, mode))
    for side in {side.tree: side for side, _ in waiting}.values():
        check_out(side.commit, side.tree)

    def one(task: tuple[Side, str]) -> Facts:
        side, mode = task
        started = time.monotonic()
        outputs = run(side.tree, mode, options.set, work / f"{side.tree.name}-{mode}")
        facts = read(outputs)
        lacking = [kind for kind in NEEDED if not facts[kind]]
        if lacking:
            raise RunFailed(f"{side.label}, {mode}: the run left no {', '.join(lacking)}")
        print(f"{side.label}, {mode}: {time.monotonic() - started:.0f} s", flush=True)
        place = _kept(side, mode, options)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return facts

    with ThreadPoolExecutor(options.jobs) as pool:
        for (side, mode), facts in zip(waiting, pool.map(one, waiting), strict=True):
            found[side.tree.name, mode] = facts
    return found


def _kept(side: Side, mode: str, options: argparse.Namespace) -> Path | None:
    """Return the file for a revision's facts, named by all else that they depend on."""
    if side.commit is None or options.cache is None:
        return None
    parts = [*OVERRIDES, *options.set, sys.version]
    parts += [f"{name} {version(name)}" for name in LIBRARIES]
    parts += [Path(__file__).with_name(name).read_text() for name in ("runs.py", "facts.py")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return Path(options.cache) / f"{side.commit}-{mode}-{digest}.json"


def _report(mode: str, old: Facts, new: Facts, shown: int) -> bool:
    """Print what was compared and return whether all is equal."""
    differing = differences(old, new)
    print(f"\ndistributed={mode}\n  {'':12}{'compared':>9}{'differ':>8}")
    for kind in KINDS:
        count = len(old[kind].keys() | new[kind].keys())
        print(f"  {kind:12}{count:>9}{len(differing[kind]):>8}")
    for kind in KINDS:
        for line in differing[kind][:shown]:
            print(f"  {kind}: {line if len(line) <= 300 else line[:297] + '...'}")
        if len(differing[kind]) > shown:
            print(f"  {kind}: and {len(differing[kind]) - shown} more")
    return not any(differing.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
