"""`rlhf-exp annotate RUN`: people judge a run's answers, on a page or through a labelling service.

The first command creates a campaign and keeps it in one file; later commands continue it. The
campaign compares two models' answers (from the run's evaluation, or a file of pairs), or, with
`--collect`, two answers of one model, sampled here to gather preferences to train on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlhf_exp.annotation.campaign import (
    CAMPAIGNS,
    INSTRUCTIONS,
    NAME_LENGTH,
    Campaign,
    CampaignInfo,
    Item,
    check_criteria,
    item_of,
    items_of_rows,
    question,
    read_pairs,
    sample_items,
)
from rlhf_exp.annotation.export import read_votes, write_preferences, write_votes
from rlhf_exp.annotation.ground_truth import read_ground_truth, write_ground_truth
from rlhf_exp.annotation.label_studio import read_label_studio, write_label_studio
from rlhf_exp.annotation.results import preference_lines, quality_lines, results
from rlhf_exp.commands.runs import OutputFolder, table
from rlhf_exp.config.compose import from_dict
from rlhf_exp.data.batching import prompts_batch
from rlhf_exp.data.parsing import format_turns
from rlhf_exp.data.rows import Prompt, prompt_key
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import load_causal_lm
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.serving.listen import address_of, is_local, listen, need_server, serve
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.stages.setup import cache_of
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.sealed import file_digest
from rlhf_exp.training.reward_scorer import texts_of

READERS = {
    "jsonl": read_votes,
    "labelstudio": read_label_studio,
    "groundtruth": read_ground_truth,
}
WRITERS = ("jsonl", "preferences", "labelstudio", "groundtruth")
# Exports of votes alone; the other formats also hold the answers to judge.
VOTE_FORMATS = ("jsonl", "preferences")
MAX_ANNOTATORS = 1000
RESULT_FILE = "result.json"
DEFAULT_PROMPTS = 100


@dataclass(frozen=True)
class AnnotateOptions:
    """What to do with a campaign: import, export, print results, or (none of these) serve it.

    Attributes:
        annotators: their number or names; `None` leaves them as they are.
        read: format and path of votes to import.
        write: format and path of an export.
        results: print the results.
        host: address to listen on.
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


@dataclass(frozen=True)
class CampaignDesign:
    """Options that a campaign is created with and keeps; `None` means the default."""

    collect: bool = False
    criteria: str | None = None
    prompts: int | None = None
    seed: int | None = None
    instructions: Path | None = None


def annotate(
    outputs: Path, run: str, design: CampaignDesign, file: Path | None, options: AnnotateOptions
) -> None:
    """Open or create the campaign of `run`; then exchange votes, print results, or serve the page.

    Raises:
        UserError: see `open_campaign`; or an unknown format, or no Starlette.
    """
    serving = not (options.read or options.write or options.results)
    _check_options(options, serving)
    # Reading votes must not create a campaign with default options.
    read_only = options.results or (options.write is not None and options.write[0] in VOTE_FORMATS)
    campaign = open_campaign(outputs, run, design, file, create=not read_only)
    if options.annotators is not None or (serving and not campaign.annotators()):
        campaign.invite(_annotator_names(options.annotators or "1"))
    if options.read is not None:
        _import(campaign, *options.read)
    elif options.write is not None:
        _export(campaign, *options.write)
    elif options.results:
        print(results_text(campaign), end="")
    else:
        _serve(campaign, options)


def results_text(campaign: Campaign) -> str:
    """Return the results so far, for the terminal."""
    summary = results(campaign)
    rows = [(person.name, f"{person.answered} of {summary.items}") for person in summary.progress]
    parts = [table(("annotator", "answered"), rows)] if rows else []
    for criterion_results in summary.criteria:
        lines = quality_lines(criterion_results)
        if not campaign.info.collect:
            lines = preference_lines(criterion_results, campaign.info) + lines
        parts.append(table((question(criterion_results.criterion), ""), lines))
    return "\n".join(parts)


def _check_options(options: AnnotateOptions, serving: bool) -> None:
    for requested, formats, option in (
        (options.read, tuple(READERS), "--import"),
        (options.write, WRITERS, "--export"),
    ):
        if requested is not None and requested[0] not in formats:
            raise UserError(
                f"{option} {requested[0]}: unknown format; expected {', '.join(formats)}"
            )
    if serving:
        need_server("annotate", "annotate")


def _annotator_names(text: str) -> list[str]:
    """Return the annotators' names: those listed, or `annotator-1` and so on."""
    if text.isdigit():
        if not 1 <= int(text) <= MAX_ANNOTATORS:
            raise UserError(f"--annotators {text}: expected 1 to {MAX_ANNOTATORS}, or names")
        return [f"annotator-{number}" for number in range(1, int(text) + 1)]
    names = [name.strip() for name in text.split(",")]
    if not all(0 < len(name) <= NAME_LENGTH and name.isprintable() for name in names):
        raise UserError(
            f"--annotators {text!r}: expected a number, or names of 1 to {NAME_LENGTH} characters "
            "with commas between them"
        )
    return names


def _import(campaign: Campaign, format_name: str, path: str) -> None:
    votes = READERS[format_name](campaign, Path(path))
    added = campaign.add(votes)
    print(f"{path}: {len(votes)} votes, {added} of them new; {campaign.path}")


def _export(campaign: Campaign, format_name: str, path: str) -> None:
    if format_name == "jsonl":
        print(f"{path}: {write_votes(campaign, Path(path))} votes")
    elif format_name == "preferences":
        criterion = campaign.info.criteria[0]
        counts = write_preferences(campaign, Path(path), criterion)
        print(
            f"{path}: {counts.preferences} preferences ({criterion}); left out: "
            f"{counts.ties} ties, {counts.open} without a vote"
        )
    else:
        write = write_label_studio if format_name == "labelstudio" else write_ground_truth
        for written_file in write(campaign, Path(path)):
            print(written_file)


def _serve(campaign: Campaign, options: AnnotateOptions) -> None:
    from rlhf_exp.annotation.web import make_app

    listener = listen(options.host, options.port)
    base_url = (options.url or address_of(listener)).rstrip("/")
    annotators, info = campaign.annotators(), campaign.info
    expected = len(campaign.items) * len(info.criteria) * len(annotators)
    prompts, votes = len(campaign.items), len(campaign.votes())
    print(f"{campaign.path}: {prompts} prompts, {votes} of {expected} votes")
    rows = [(person.name, f"{base_url}/a/{person.token}") for person in annotators]
    rows.append(("results, for you only", f"{base_url}/o/{info.owner}"))
    width = max(len(name) for name, _ in rows)
    for name, link in rows:
        print(f"  {name.ljust(width)}  {link}")
    if not is_local(listener):
        print(
            "Others on the network can reach this address, without encryption: put it behind a "
            "proxy with HTTPS (--url), or keep --host 127.0.0.1."
        )
    print("Ctrl-C ends it; the same command goes on, with the same links.", flush=True)
    serve(make_app(campaign), listener)


def open_campaign(
    outputs: Path,
    run: str,
    design: CampaignDesign,
    file: Path | None = None,
    *,
    create: bool = True,
) -> Campaign:
    """Return the campaign of a run: the existing one, or a new one.

    Args:
        outputs: the output folder.
        run: a run, or a JSONL file of pairs.
        design: options of a new campaign; an existing one must match them.
        file: the campaign's file; by default below `outputs`.
        create: whether to create the campaign if there is none.

    Raises:
        UserError: there are no answers to judge, or the existing campaign has other options.
    """
    folder = OutputFolder(outputs)
    title = re.sub(r"[^A-Za-z0-9._-]+", "-", _title(folder, run))
    path = file or outputs / CAMPAIGNS / f"{title}{'-collect' if design.collect else ''}.sqlite"
    if path.exists() or not create:
        campaign = Campaign(path)
        run = _run_of_study(folder, run, campaign.info.source)
        _check_unchanged(campaign, _answers_origin(folder, run, design.collect), design)
        return campaign
    origin = _answers_origin(folder, run, design.collect)
    if design.prompts is not None and design.prompts < 1:
        raise UserError(f"--prompts {design.prompts}: must be at least 1")
    criteria = check_criteria(_criteria(design) or ["overall"])
    instructions = _instructions(design.instructions)
    seed = design.seed or 0
    drawn = origin.load(design.prompts or DEFAULT_PROMPTS, seed)
    items = [item for item in drawn if not item.identical]
    info = CampaignInfo(
        source=origin.text,
        name_a=origin.name_a,
        name_b=origin.name_b,
        collect=design.collect,
        criteria=criteria,
        instructions=instructions,
        seed=seed,
        # Equal answers of two models count as ties; two of one model teach nothing.
        identical=0 if design.collect else len(drawn) - len(items),
    )
    return Campaign.create(path, info, items)


def _title(outputs: OutputFolder, run: str) -> str:
    """Return the name of a run, or of a file of pairs, that its study is named by."""
    if _is_file_of_pairs(run):
        return Path(run).name.partition(".")[0]
    return outputs.records.resolve_all(run, outputs.store)[-1].name


def _is_file_of_pairs(run: str) -> bool:
    path = Path(run)
    return path.suffix in (".jsonl", ".gz") and not path.is_dir()


def _run_of_study(outputs: OutputFolder, run: str, source: str) -> str:
    """Return which of several runs of one name a study asks about; else `run` as it is."""
    if run not in outputs.records.names():
        return run
    stage, _, key = source.partition("/")
    named = [record for record in outputs.records.sweep(run) if record.keys.get(stage) == key]
    return f"{run}/{named[-1].key}" if named else run


def _check_unchanged(campaign: Campaign, origin: AnswersOrigin, design: CampaignDesign) -> None:
    """Raise if options or answers differ from those that the campaign was created with."""
    info = campaign.info
    criteria, instructions = _criteria(design), design.instructions
    for option, requested, stored in (
        ("--collect", design.collect, info.collect),
        ("--seed", design.seed, info.seed),
        ("--criteria", None if criteria is None else ",".join(criteria), ",".join(info.criteria)),
        (
            "--instructions",
            None if instructions is None else _instructions(instructions),
            info.instructions,
        ),
        ("answers from", origin.text, info.source),
    ):
        if requested is not None and requested != stored:
            raise UserError(
                f"{campaign.path}: the study there was made with {option} {str(stored)[:80]!r}, "
                f"not {str(requested)[:80]!r}; leave the option out, or name another file with "
                "--study"
            )
    if design.prompts is not None and design.prompts != len(campaign.items) + info.identical:
        raise UserError(
            f"{campaign.path}: the study there has {len(campaign.items) + info.identical} prompts, "
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


@dataclass(frozen=True)
class AnswersOrigin:
    """Source of a campaign's answers.

    Attributes:
        text: identifies the answers.
        name_a: name of the baseline.
        name_b: name of the other model; with `--collect` the same.
        load: `load(prompts, seed)` returns the items of a number of randomly drawn prompts.
    """

    text: str
    name_a: str
    name_b: str
    load: Callable[[int, int], list[Item]]


def _answers_origin(outputs: OutputFolder, run: str, collect: bool) -> AnswersOrigin:
    if _is_file_of_pairs(run):
        path = Path(run)
        names = ("the model", "the model") if collect else ("a", "b")
        load_pairs = lambda count, seed: sample_items(read_pairs(path), count, seed)  # noqa: E731
        digest = file_digest(path)[:12] if path.is_file() else ""
        return AnswersOrigin(f"{path.name} {digest}", *names, load_pairs)
    if collect:
        policy = outputs.policy(run)
        name = policy.stage.upper()
        text = f"{policy.stage}/{policy.key}"
        return AnswersOrigin(text, name, name, lambda n, seed: sampled_pairs(policy, n, seed))
    artifacts = outputs.artifacts(run, ("eval",))
    if "eval" not in artifacts:
        raise UserError(
            f"{run}: was not evaluated, so there are no answers to judge; run stage=eval first"
        )
    evaluation = artifacts["eval"]
    result = evaluation.json(RESULT_FILE)
    rows = items_of_rows(result["rows"])
    names = (result["name_a"], result["name_b"])
    text = f"eval/{evaluation.key}"
    return AnswersOrigin(text, *names, lambda n, seed: sample_items(rows, n, seed))


def sampled_pairs(policy: Artifact, count: int, seed: int) -> list[Item]:
    """Return two samples of a policy for each of `count` training prompts, drawn by the seed.

    The prompts are those that PPO trains on; none is in the evaluation set, which is held out by
    prompt.

    Raises:
        UserError: the run's data cannot be read.
    """
    config = from_dict(policy.manifest.config)
    data = DataModule(config.data, policy.path / "model")
    held_out = {prompt_key(row.history) for row in data.corpus.prompts.test}
    # A test file of the user's may hold near copies of training prompts.
    far = [row for row in data.corpus.prompts.train if prompt_key(row.history) not in held_out]
    rows = _draw_prompts(far, count, seed)
    codec = data.codec(policy.path / "model")
    generation = config.ppo.generation
    tokenized = tokenize_prompts(rows, codec, config.ppo.seq_length, generation.max_new_tokens)
    # Each prompt twice: the rollout number alone makes the second answer differ from the first.
    prompt_numbers = np.repeat(np.arange(len(rows)), 2)
    prompts = prompts_batch(tokenized, prompt_numbers, np.arange(len(prompt_numbers)))
    settings = SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        batch=config.eval.batch,
        eos_id=codec.eos_id,
        end_ids=codec.end_ids,
        pad_id=codec.pad_id,
        cache=cache_of(config),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_causal_lm(policy.path / "model")
    nn.Module.to(model, device)
    stopper = Stopper(codec.tokenizer, codec.stop_strings)
    samples = sample(model, prompts.to(device), settings, seed, stopper)
    _, answers = texts_of(samples.tokens, samples.prompt_lengths, samples.content_lengths, codec)
    return [
        item_of(format_turns(row.history), answers[2 * number], answers[2 * number + 1])
        for number, row in enumerate(rows)
    ]


def _draw_prompts(rows: list[Prompt], count: int, seed: int) -> list[Prompt]:
    if not rows:
        raise UserError("annotate --collect: the run's data has no training prompts")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[int(number)] for number in order]
