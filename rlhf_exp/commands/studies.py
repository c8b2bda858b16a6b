"""Studies of runs: what is judged in them, and where their files are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.errors import UserError
from rlhf_exp.human.items import Item, choose, items_of_rows, read_pairs
from rlhf_exp.human.study import STUDIES, About, Study
from rlhf_exp.human.wording import INSTRUCTIONS, checked_criteria
from rlhf_exp.store.fingerprint import file_digest

RESULT = "result.json"
PROMPTS = 100


@dataclass(frozen=True)
class Source:
    """Where a study's answers come from.

    Attributes:
        title: of the study's file.
        text: identifies the answers.
        name_a: the baseline.
        name_b: the other model; of a collection the same.
        load: returns `prompts` items, drawn by a seed: `load(prompts, seed)`.
    """

    title: str
    text: str
    name_a: str
    name_b: str
    load: Callable[[int, int], list[Item]]


@dataclass(frozen=True)
class Design:
    """What fixes a study, as far as the command line says it; `None` means what is usual."""

    collect: bool = False
    criteria: str | None = None
    prompts: int | None = None
    seed: int | None = None
    instructions: Path | None = None


def open_study(
    outputs: Path, run: str, design: Design, file: Path | None = None, *, make: bool = True
) -> Study:
    """Return the study of a run: the one that is there, or a new one.

    Args:
        outputs: the output folder.
        run: a run, or a JSONL file of pairs.
        design: what the study is to be.
        file: the study's file; by default below `outputs`.
        make: whether to make the study if there is none.

    Raises:
        UserError: there is nothing to judge, or the study that is there is another one.
    """
    source = _source(Outputs(outputs), run, design.collect)
    title = re.sub(r"[^A-Za-z0-9._-]+", "-", source.title)
    path = file or outputs / STUDIES / f"{title}{'-collect' if design.collect else ''}.sqlite"
    if path.exists() or not make:
        study = Study(path)
        _check_same(study, source, design)
        return study
    if design.prompts is not None and design.prompts < 1:
        raise UserError(f"--prompts {design.prompts}: must be at least 1")
    criteria = checked_criteria(_criteria(design) or ["overall"])
    instructions = _instructions(design.instructions)
    seed = design.seed or 0
    found = source.load(design.prompts or PROMPTS, seed)
    items = [item for item in found if not item.identical]
    about = About(
        source=source.text,
        name_a=source.name_a,
        name_b=source.name_b,
        collect=design.collect,
        criteria=criteria,
        instructions=instructions,
        seed=seed,
        # Two equal samples of one model say nothing; two models that say the same tie.
        identical=0 if design.collect else len(found) - len(items),
    )
    return Study.create(path, about, items)


def _source(outputs: Outputs, run: str, collect: bool) -> Source:
    path = Path(run)
    if path.suffix in (".jsonl", ".gz") and not path.is_dir():
        names = ("the model", "the model") if collect else ("a", "b")
        pairs = lambda count, seed: choose(read_pairs(path), count, seed)  # noqa: E731
        digest = file_digest(path)[:12] if path.is_file() else ""
        return Source(path.name.partition(".")[0], f"{path.name} {digest}", *names, pairs)
    title = outputs.run(run).name
    if collect:
        from rlhf_exp.commands.collect import sampled_pairs

        policy = outputs.policy(run)
        name = policy.stage.upper()
        text = f"{policy.stage}/{policy.key}"
        return Source(title, text, name, name, lambda n, seed: sampled_pairs(policy, n, seed))
    artifacts = outputs.artifacts(run)
    if "eval" not in artifacts:
        raise UserError(
            f"{run}: was not evaluated, so there are no answers to judge; run stage=eval first"
        )
    found = artifacts["eval"]
    result = json.loads((found.path / RESULT).read_text(encoding="utf-8"))
    rows = items_of_rows(result["rows"])
    names = (result["name_a"], result["name_b"])
    return Source(title, f"eval/{found.key}", *names, lambda n, seed: choose(rows, n, seed))


def _check_same(study: Study, source: Source, design: Design) -> None:
    """Refuse options and answers that the study was not made with."""
    about = study.about
    criteria, instructions = _criteria(design), design.instructions
    for option, wanted, has in (
        ("--collect", design.collect, about.collect),
        ("--seed", design.seed, about.seed),
        ("--criteria", None if criteria is None else ",".join(criteria), ",".join(about.criteria)),
        (
            "--instructions",
            None if instructions is None else _instructions(instructions),
            about.instructions,
        ),
        ("answers from", source.text, about.source),
    ):
        if wanted is not None and wanted != has:
            raise UserError(
                f"{study.path}: the study there was made with {option} {str(has)[:80]!r}, not "
                f"{str(wanted)[:80]!r}; leave the option out, or name another file with --study"
            )
    if design.prompts is not None and design.prompts != len(study.items) + about.identical:
        raise UserError(
            f"{study.path}: the study there has {len(study.items) + about.identical} prompts, "
            f"not {design.prompts}; leave --prompts out, or name another file with --study"
        )


def _criteria(design: Design) -> list[str] | None:
    if design.criteria is None:
        return None
    return [name.strip() for name in design.criteria.split(",")]


def _instructions(path: Path | None) -> str:
    if path is None:
        return INSTRUCTIONS
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--instructions: {path} cannot be read: {error}") from error
