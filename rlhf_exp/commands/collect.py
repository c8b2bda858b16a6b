"""Two answers of one model to each prompt, for people to choose between and to train on."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rlhf_exp.config.load import from_dict
from rlhf_exp.data.collate import prompts_batch
from rlhf_exp.data.rows import History, Prompt, prompt_key
from rlhf_exp.data.tokenized import tokenize_prompts
from rlhf_exp.engines.native.scoring import texts_of
from rlhf_exp.errors import UserError
from rlhf_exp.human.items import Item, item_of
from rlhf_exp.models.load import load_causal_lm
from rlhf_exp.rollout.sampler import Sampling, sample
from rlhf_exp.rollout.stops import Stopper
from rlhf_exp.stages.materials import Materials
from rlhf_exp.store.artifact import Artifact


def sampled_pairs(policy: Artifact, count: int, seed: int) -> list[Item]:
    """Return two samples of a policy for each of `count` training prompts, drawn by the seed.

    The prompts are those of the run that PPO may ask: none is in the evaluation set, which is held
    out by prompt.

    Raises:
        UserError: the run's data cannot be read any more.
    """
    config = from_dict(policy.manifest.config)
    materials = Materials(config.data)
    rows = _drawn(materials.corpus.prompts.train, count, seed)
    held_out = {prompt_key(row.history) for row in materials.corpus.prompts.test}
    assert not any(prompt_key(row.history) in held_out for row in rows), "splits are disjoint"
    codec = materials.codec(policy.path / "model")
    generation = config.ppo.generation
    tokenized = tokenize_prompts(rows, codec, config.ppo.seq_length, generation.max_new_tokens)
    # Twice each prompt; the second answer differs from the first by its rollout number alone.
    twice = np.repeat(np.arange(len(rows)), 2)
    prompts = prompts_batch(tokenized, twice, np.arange(len(twice)))
    settings = Sampling(
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
