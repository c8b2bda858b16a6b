"""The inputs of PPO, whichever the engine: prompts as ids, scores of the data's own responses.

The scores are computed once for all runs that share prompts and reward, and kept by content.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.fields import key_content
from rlhf_exp.data.batching import batch_index, right_padded
from rlhf_exp.data.rows import Prompt, reward_fields
from rlhf_exp.data.tokenized import TokenizedPrompts, tokenize_prompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.function_source import function_source
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.kept_tensor import kept_tensor
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.sealed import file_digest
from rlhf_exp.training.reward_scorer import PromptRows, Scorer, score_shared
from rlhf_exp.training.reward_terms import MixedScorer, any_reads_rows, set_all_rows
from rlhf_exp.training.scorers import ServerScorer


def ppo_prompts(
    config: Config, context: StageContext, codec: Codec
) -> tuple[TokenizedPrompts, TokenizedPrompts]:
    """Return the training prompts, and those of validation (the same where there are none).

    Raises:
        UserError: There are no prompts, or one lacks the response that scores are compared with.
    """
    rows = context.materials.training_prompts(with_response=config.ppo.reward.delta)
    train = _tokenized(rows.train, codec, config, context)
    return train, _tokenized(rows.validation, codec, config, context)


def set_prompt_rows(
    scorer: Scorer, context: StageContext, prompts: TokenizedPrompts, validation: TokenizedPrompts
) -> None:
    """Give a scorer the rows of the prompts that `ppo_prompts` returned."""
    splits, rows = context.materials.training_prompts(with_response=False), PromptRows()
    rows.add(prompts.prompt, splits.train)
    rows.add(validation.prompt, splits.validation)
    set_all_rows(scorer, rows)


def _tokenized(
    rows: list[Prompt], codec: Codec, config: Config, context: StageContext
) -> TokenizedPrompts:
    section = config.ppo
    return tokenize_prompts(
        rows,
        codec,
        section.seq_length,
        section.generation.max_new_tokens,
        context.cache / "tokenized",
    )


FOLDER = "original_scores"


def original_scores(
    prompts: TokenizedPrompts, scorer: Scorer, config: Config, context: StageContext, world: World
) -> Tensor:
    """Return the score of each prompt's own response: [prompts] float32, NaN where not needed.

    Only the prompts that this run will meet are scored, all before training and an iteration's
    together: a score's last bits depend on the batch it was computed in, and this batch is the same
    however often the run is interrupted, and however many iterations follow.
    """
    used = _used(config, len(prompts), context.probe.iterations if context.probe else None)
    judge = _judge(config, context, scorer)
    if judge is not None and any_reads_rows(scorer):
        seen = [reward_fields(row) for row in context.materials.training_prompts(True).train]
        judge = [*judge, key_of({"rows": json.dumps(seen, sort_keys=True, default=repr)})]
    key = _key(prompts, used, judge, config, world)
    # Of a server that gives no name, nobody can say that it scored the same in an earlier run.
    folder = context.folder if judge is None else context.cache
    path = folder / FOLDER / f"{key}.npy"

    def compute() -> Tensor:
        scores = torch.full((len(prompts),), float("nan"))
        for rows in used:
            scores[torch.from_numpy(rows)] = _score(prompts, rows, scorer, world)
        return scores

    return kept_tensor(path, "scores of original responses", compute, world)


def _used(config: Config, count: int, only: int | None = None) -> list[np.ndarray]:
    """Return the prompts that each iteration is the first to meet, of all or the first `only`."""
    section = config.ppo
    iterations = only or section.iterations
    seen = np.zeros(count, dtype=bool)
    found = []
    for iteration in range(iterations):
        rows = np.unique(batch_index(count, section.prompts, section.seed, iteration))
        rows = rows[~seen[rows]]
        seen[rows] = True
        if len(rows):
            found.append(rows)
        if seen.all():
            break
    return found


def _score(prompts: TokenizedPrompts, rows: np.ndarray, scorer: Scorer, world: World) -> Tensor:
    """Score the rows' own responses; their end-of-sequence token is not part of the content."""
    parts = [(prompts.prompt[row], prompts.original[row]) for row in rows]
    tokens, _ = right_padded(parts)
    lengths = torch.tensor([[len(prompt), len(answer)] for prompt, answer in parts])
    return score_shared(scorer, tokens, lengths[:, 0], (lengths[:, 1] - 1).clamp(min=0), world)


def _judge(config: Config, context: StageContext, scorer: Scorer) -> list[str | None] | None:
    """Return what tells what scores from anything else, or `None` where nothing does."""
    reward = config.ppo.reward
    if reward.terms:
        return _terms(config, context, scorer)
    if reward.function is not None:
        file, name = function_source(reward.function)
        return [file_digest(file), name]
    if isinstance(scorer, ServerScorer):
        server_name = reward.name or _server_name(scorer)
        return None if server_name is None else ["server", server_name]
    # The key alone would not do: a reward model made again under it may have other weights.
    found = [context.parents.get("reward"), context.inputs.get("reward")]
    return found if reward.device is None else [*found, reward.placement]


def _terms(config: Config, context: StageContext, scorer: Scorer) -> list[str | None] | None:
    """Return what tells a sum of rewards from any other, or `None` where nothing does."""
    reward, found = config.ppo.reward, list[str | None]()
    for role in ("reward", *reward.term_models):
        found += [role, context.parents.get(role), context.inputs.get(role)]
    for term, part in zip(reward.terms, _parts(scorer), strict=True):
        found.append(json.dumps(key_content(term), sort_keys=True))
        if term.function is not None:
            file, name = function_source(term.function)
            found += [file_digest(file), name]
        if isinstance(part, ServerScorer):
            if (name_of_server := term.name or _server_name(part)) is None:
                return None
            found.append(name_of_server)
    return found


def _parts(scorer: Scorer) -> list[Scorer]:
    assert isinstance(scorer, MixedScorer), "several terms"
    return [part for _, part in scorer.terms.values()]


def _server_name(scorer: ServerScorer) -> str | None:
    return None if scorer.client.info is None else scorer.client.info.name


def _key(
    prompts: TokenizedPrompts,
    used: list[np.ndarray],
    judge: list[str | None] | None,
    config: Config,
    world: World,
) -> str:
    """Return the key of everything that decides the scores, to their last bits."""
    digest = hashlib.sha256()
    for column in (prompts.prompt, prompts.original):
        digest.update(np.ascontiguousarray(column.flat).tobytes())
        digest.update(np.ascontiguousarray(column.offsets).tobytes())
    for rows in used:
        digest.update(rows.tobytes() + b"|")
    how = [
        config.distributed.precision.name,
        config.model.dtype.name,
        torch.get_num_threads(),
        world.processes,
        config.ppo.generation.batch,
        max(config.reward.seq_length, config.ppo.seq_length),
    ]
    return key_of({"prompts": digest.hexdigest(), "judge": judge, "how": how})
