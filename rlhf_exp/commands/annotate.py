"""`rlhf-exp annotate RUN`: people judge a run's answers, on a page or through a labelling service.

A study is made by the first command and kept in one file; every later one goes on with it.

Studies of runs: what is judged in them, and where their files are.

Two answers of one model to each prompt, for people to choose between and to train on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlhf_exp.annotation.campaign import (
    INSTRUCTIONS,
    NAME_LENGTH,
    STUDIES,
    Campaign,
    CampaignInfo,
    Item,
    checked_criteria,
    choose,
    item_of,
    items_of_rows,
    question,
    read_pairs,
)
from rlhf_exp.annotation.export import read_votes, write_preferences, write_votes
from rlhf_exp.annotation.ground_truth import read_ground_truth, write_ground_truth
from rlhf_exp.annotation.label_studio import read_label_studio, write_label_studio
from rlhf_exp.annotation.results import preference_lines, quality_lines, results
from rlhf_exp.commands.runs import OutputFolder, table
from rlhf_exp.config.compose import from_dict
from rlhf_exp.data.batching import prompts_batch
from rlhf_exp.data.rows import History, Prompt, prompt_key
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import load_causal_lm
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.serving.listen import address_of, is_local, listen, need_server, serve
from rlhf_exp.stages.context import DataModule
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.fingerprint import file_digest
from rlhf_exp.training.reward_scorer import texts_of

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
class AnnotateOptions:
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


def annotate(
    outputs: Path, run: str, design: CampaignDesign, file: Path | None, wanted: AnnotateOptions
) -> None:
    """Open or make the study of `run`; then exchange votes, print results, or serve the page.

    Raises:
        UserError: see `open_campaign`; or an unknown format, or no Starlette.
    """
    serving = not (wanted.read or wanted.write or wanted.results)
    _check(wanted, serving)
    # What only looks at votes must not fix a study by the usual options.
    looks = wanted.results or (wanted.write is not None and wanted.write[0] in LOOKS)
    study = open_campaign(outputs, run, design, file, make=not looks)
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


def results_text(study: Campaign) -> str:
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


def _check(wanted: AnnotateOptions, serving: bool) -> None:
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


def _import(study: Campaign, kind: str, path: str) -> None:
    votes = READERS[kind](study, Path(path))
    new = study.add(votes)
    print(f"{path}: {len(votes)} votes, {new} of them new; {study.path}")


def _export(study: Campaign, kind: str, path: str) -> None:
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


def _serve(study: Campaign, wanted: AnnotateOptions) -> None:
    from rlhf_exp.annotation.web import make_app

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


RESULT = "result.json"
PROMPTS = 100


@dataclass(frozen=True)
class AnswersOrigin:
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
class CampaignDesign:
    """What fixes a study, as far as the command line says it; `None` means what is usual."""

    collect: bool = False
    criteria: str | None = None
    prompts: int | None = None
    seed: int | None = None
    instructions: Path | None = None


def open_campaign(
    outputs: Path, run: str, design: CampaignDesign, file: Path | None = None, *, make: bool = True
) -> Campaign:
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
    source = _source(OutputFolder(outputs), run, design.collect)
    title = re.sub(r"[^A-Za-z0-9._-]+", "-", source.title)
    path = file or outputs / STUDIES / f"{title}{'-collect' if design.collect else ''}.sqlite"
    if path.exists() or not make:
        study = Campaign(path)
        _check_same(study, source, design)
        return study
    if design.prompts is not None and design.prompts < 1:
        raise UserError(f"--prompts {design.prompts}: must be at least 1")
    criteria = checked_criteria(_criteria(design) or ["overall"])
    instructions = _instructions(design.instructions)
    seed = design.seed or 0
    found = source.load(design.prompts or PROMPTS, seed)
    items = [item for item in found if not item.identical]
    about = CampaignInfo(
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
    return Campaign.create(path, about, items)


def _source(outputs: OutputFolder, run: str, collect: bool) -> AnswersOrigin:
    path = Path(run)
    if path.suffix in (".jsonl", ".gz") and not path.is_dir():
        names = ("the model", "the model") if collect else ("a", "b")
        pairs = lambda count, seed: choose(read_pairs(path), count, seed)  # noqa: E731
        digest = file_digest(path)[:12] if path.is_file() else ""
        return AnswersOrigin(path.name.partition(".")[0], f"{path.name} {digest}", *names, pairs)
    title = outputs.run(run).name
    if collect:
        policy = outputs.policy(run)
        name = policy.stage.upper()
        text = f"{policy.stage}/{policy.key}"
        return AnswersOrigin(
            title, text, name, name, lambda n, seed: sampled_pairs(policy, n, seed)
        )
    artifacts = outputs.artifacts(run)
    if "eval" not in artifacts:
        raise UserError(
            f"{run}: was not evaluated, so there are no answers to judge; run stage=eval first"
        )
    found = artifacts["eval"]
    result = json.loads((found.path / RESULT).read_text(encoding="utf-8"))
    rows = items_of_rows(result["rows"])
    names = (result["name_a"], result["name_b"])
    return AnswersOrigin(title, f"eval/{found.key}", *names, lambda n, seed: choose(rows, n, seed))


def _check_same(study: Campaign, source: AnswersOrigin, design: CampaignDesign) -> None:
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


def _criteria(design: CampaignDesign) -> list[str] | None:
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


def sampled_pairs(policy: Artifact, count: int, seed: int) -> list[Item]:
    """Return two samples of a policy for each of `count` training prompts, drawn by the seed.

    The prompts are those of the run that PPO may ask: none is in the evaluation set, which is held
    out by prompt.

    Raises:
        UserError: the run's data cannot be read any more.
    """
    config = from_dict(policy.manifest.config)
    materials = DataModule(config.data)
    rows = _drawn(materials.corpus.prompts.train, count, seed)
    held_out = {prompt_key(row.history) for row in materials.corpus.prompts.test}
    assert not any(prompt_key(row.history) in held_out for row in rows), "splits are disjoint"
    codec = materials.codec(policy.path / "model")
    generation = config.ppo.generation
    tokenized = tokenize_prompts(rows, codec, config.ppo.seq_length, generation.max_new_tokens)
    # Twice each prompt; the second answer differs from the first by its rollout number alone.
    twice = np.repeat(np.arange(len(rows)), 2)
    prompts = prompts_batch(tokenized, twice, np.arange(len(twice)))
    settings = SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        batch=config.eval.batch,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_causal_lm(policy.path / "model")
    nn.Module.to(model, device)
    stopper = Stopper(codec.tokenizer, codec.stop_strings)
    samples = sample(model, prompts.to(device), settings, seed, stopper)
    _, answers = texts_of(samples.tokens, samples.prompt_lengths, samples.content_lengths, codec)
    return [
        item_of(_dialogue(row.history), answers[2 * number], answers[2 * number + 1])
        for number, row in enumerate(rows)
    ]


def _drawn(rows: list[Prompt], count: int, seed: int) -> list[Prompt]:
    if not rows:
        raise UserError("annotate --collect: the run's data has no training prompts")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[int(number)] for number in order]


def _dialogue(history: History) -> str:
    """Write a prompt with HH's markers, which `data=hh_local` reads back whatever the format."""
    return "".join(f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in history)
