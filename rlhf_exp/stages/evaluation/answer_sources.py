"""Answers sampled from the models themselves, each process doing its share.

Answers of an earlier evaluation, in place of the models.

Scores of held-out pairs, which no model under evaluation wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.kl import sequence_kl
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Finish, Prompts, Samples
from rlhf_exp.config.experiment import Config
from rlhf_exp.data.batching import joined, prompts_batch
from rlhf_exp.data.rows import Preference, Prompt
from rlhf_exp.data.tokenized import Ragged, tokenize_preferences, tokenize_prompts, tokenize_texts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, read_answers
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import compare_with_reference
from rlhf_exp.rollout.sampler import Sampling, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.stages.context import MODEL, SNAPSHOTS, StageContext
from rlhf_exp.stages.evaluation.bench import (
    BLANK,
    CHOSEN,
    REJECTED,
    EvalPrompt,
    EvaluatedModel,
    GenerationSettings,
    at_step,
    evaluated_models,
    pairs_part,
)
from rlhf_exp.stages.scorers import EvaluationScorers
from rlhf_exp.stages.training import load_policy_model
from rlhf_exp.training.reward_scorer import Scorer, score_samples, score_shared, texts_of

log = logging.getLogger(__name__)


class SampledSource:
    """Asks the models.

    At most two of them are in memory: the baseline, which a KL needs, and another one.

    Args:
        config: The experiment.
        context: Where the models are.
        world: The processes.
    """

    def __init__(self, config: Config, context: StageContext, world: World) -> None:
        self.config, self.context, self.world = config, context, world
        self.contestants = evaluated_models(context, config.eval.models)
        self._policies: dict[str, Policy] = {}
        self._judges = EvaluationScorers(config, context, world)

    def asked(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """See `Source`."""
        return load()

    def answers(
        self,
        part: str,
        contestant: EvaluatedModel,
        asked: Sequence[EvalPrompt],
        manner: GenerationSettings,
    ) -> list[Answer]:
        """See `Source`."""
        codec = self._codec(contestant)
        prompts = self._prompts(asked, codec, manner)
        share = self.world.share(len(prompts))
        mine = prompts.select(torch.from_numpy(share.rows)).to(self.world.device)
        samples = self._sample(contestant, mine, codec, manner)
        texts = texts_of(samples.tokens, samples.prompt_lengths, samples.content_lengths, codec)
        scores = _scores(self._judges.reward(codec) if manner.score else None, samples)
        referee = _scores(self._judges.referee(codec) if manner.referee else None, samples)
        kl = self._kl(contestant, samples, manner)
        found = [
            Answer(
                part=part,
                model=contestant.name,
                row=number // manner.count,
                sample=number % manner.count,
                seed=manner.seed,
                sampling=manner.sampling,
                prompt=texts[0][line],
                text=texts[1][line],
                tokens=int(samples.response_lengths[line]),
                finish=Finish(int(samples.finish[line])).name.lower(),
                score=None if scores is None else scores[line],
                referee=None if referee is None else referee[line],
                kl=None if kl is None else float(kl[line]),
                facts={} if number % manner.count else asked[number // manner.count].facts,
            )
            for line, number in enumerate(mine.rollout.tolist())
        ]
        everyone = [answer for answers in self.world.all_gather_object(found) for answer in answers]
        return everyone[: len(prompts)]

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """See `Source`."""
        codec = self._judges.own_codec() or self._codec(self.contestants[0])
        return score_pairs(load(), part, codec, self._judges)

    def snapshots(self, part: str, contestant: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """See `Source`."""
        folder = Path(contestant.source)
        kept = sorted(folder.with_name(SNAPSHOTS).glob("step-*")) if folder.name == MODEL else []
        steps = [(int(path.name.removeprefix("step-")), path) for path in kept]
        return tuple(EvaluatedModel(at_step(contestant.name, n), str(path)) for n, path in steps)

    def _codec(self, contestant: EvaluatedModel) -> Codec:
        return self.context.materials.codec(contestant.source)

    def _prompts(
        self, asked: Sequence[EvalPrompt], codec: Codec, manner: GenerationSettings
    ) -> Prompts:
        """Return every prompt `manner.count` times, numbered throughout."""
        limits = (self.config.ppo.seq_length, manner.max_new_tokens)
        texts = [one.text for one in asked if one.text is not None]
        rows = [Prompt(one.history, None, "") for one in asked if one.history is not None]
        assert not (texts and rows), "a part asks either texts or dialogues"
        tokenized = (
            tokenize_texts(texts, codec, *limits)
            if texts
            else tokenize_prompts(rows, codec, *limits, self.context.cache / "tokenized")
        )
        index = np.repeat(np.arange(len(asked)), manner.count)
        return prompts_batch(tokenized, index, np.arange(len(index)))

    def _policy(self, contestant: EvaluatedModel) -> Policy:
        if contestant.name not in self._policies:
            for other in [name for name in self._policies if name != self.contestants[0].name]:
                del self._policies[other]
            model = load_policy_model(self.config, contestant.source)
            policy = Policy(model, value_head=False).requires_grad_(False)
            self._policies[contestant.name] = policy.to(self.world.device)
        return self._policies[contestant.name]

    def _sample(
        self, contestant: EvaluatedModel, prompts: Prompts, codec: Codec, manner: GenerationSettings
    ) -> Samples:
        greedy = manner.temperature == 0.0
        settings = Sampling(
            max_new_tokens=manner.max_new_tokens,
            temperature=1.0 if greedy else manner.temperature,
            batch=self.config.eval.batch,
            eos_id=codec.eos_id,
            pad_id=codec.pad_id,
            greedy=greedy,
            top_p=manner.top_p,
            top_k=manner.top_k,
        )
        stopper = Stopper(codec.tokenizer, codec.stop_strings) if manner.stop else None
        return sample(self._policy(contestant).model, prompts, settings, manner.seed, stopper)

    def _kl(
        self, contestant: EvaluatedModel, samples: Samples, manner: GenerationSettings
    ) -> Tensor | None:
        """Return the sum over each answer [N] of log model - log baseline, in nats."""
        baseline = self.contestants[0]
        if not manner.kl or contestant == baseline:
            return None
        if (manner.top_p, manner.top_k) != (1.0, 0):
            # Answers of a part of the distribution say nothing of the whole, and the parts of two
            # models need not have the same tokens.
            return None
        if self._codec(contestant).digest != self._codec(baseline).digest:
            if self.world.is_main:
                log.warning(
                    "%s and %s have different tokenizers: there is no KL between them",
                    contestant.name,
                    baseline.name,
                )
            return None
        policies = self._policy(contestant), self._policy(baseline)
        return kl_of(*policies, samples, manner.temperature or 1.0, self.config.eval.batch)


def _scores(scorer: Scorer | None, samples: Samples) -> list[float] | None:
    return None if scorer is None else score_samples(scorer, samples).tolist()


@torch.no_grad()
def kl_of(
    policy: Policy, reference: Policy, samples: Samples, temperature: float, batch: int
) -> Tensor:
    """Return the sum over each answer [N] of log policy - log reference, in nats."""
    kl = torch.zeros(len(samples))
    for part in compare_with_reference(policy, reference, samples, temperature, batch):
        lengths = samples.response_lengths[part.rows]
        mask = response_mask(lengths, part.ref_logprobs.shape[1])
        kl[part.rows] = sequence_kl(part.policy.logprobs, part.ref_logprobs, mask).cpu()
    return kl


class StoredSource:
    """Hands out what `samples.jsonl` holds.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers = read_answers(path)
        if not self._answers:
            raise UserError(f"eval.samples: {path} holds no answers")
        # The part that asked first asked every model under evaluation.
        first = self._answers[0].part
        names = dict.fromkeys(one.model for one in self._answers if one.part == first)
        others = tuple(at_step(name, "") for name in names)
        found = [name for name in names if not name.startswith(others)]
        self.contestants = tuple(EvaluatedModel(name, "") for name in found)

    def asked(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """See `Source`."""
        first = self.contestants[0].name
        firsts = {
            answer.row: answer
            for answer in reversed(self._answers)
            if (answer.part, answer.model) == (part, first)
        }
        if not firsts:
            parts = ", ".join(dict.fromkeys(answer.part for answer in self._answers))
            raise UserError(
                f"eval.samples: {self.path} has no answers for {part}, only for {parts}; choose "
                "another eval suite, or evaluate the models themselves"
            )
        return [
            EvalPrompt(text=firsts[row].prompt, facts=firsts[row].facts) for row in sorted(firsts)
        ]

    def answers(
        self,
        part: str,
        contestant: EvaluatedModel,
        asked: Sequence[EvalPrompt],
        manner: GenerationSettings,
    ) -> list[Answer]:
        """See `Source`."""
        mine = {
            (answer.row, answer.sample): answer
            for answer in self._answers
            if (answer.part, answer.model) == (part, contestant.name)
        }
        try:
            found = [
                mine[row, sample] for row in range(len(asked)) for sample in range(manner.count)
            ]
        except KeyError as error:
            row, sample = error.args[0]
            raise UserError(
                f"eval.samples: {self.path} has no answer {sample + 1} of {contestant.name} to "
                f"prompt {row + 1} of {part}; ask for fewer, or evaluate the models themselves"
            ) from error
        unscored = sum(answer.score is None for answer in found)
        if manner.score and unscored:
            raise UserError(
                f"eval.samples: {unscored} answers of {contestant.name} in {self.path} have no "
                f"score, which {part} needs; evaluate the models themselves"
            )
        return found

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """See `Source`."""
        found: dict[str, list[Answer]] = {CHOSEN: [], REJECTED: [], BLANK: []}
        for answer in self._answers:
            if answer.part == pairs_part(part):
                found[answer.model].append(answer)
        return found

    def snapshots(self, part: str, contestant: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """See `Source`."""
        names = dict.fromkeys(answer.model for answer in self._answers if answer.part == part)
        prefix = at_step(contestant.name, "")
        return tuple(EvaluatedModel(name, "") for name in names if name.startswith(prefix))


def score_pairs(
    rows: list[Preference], part: str, codec: Codec, judges: EvaluationScorers
) -> dict[str, list[Answer]]:
    """Return both sides of the pairs and an empty answer, as answers with scores.

    Args:
        rows: The pairs.
        part: The part of the evaluation that asks.
        codec: Writes them as tokens, cut as the reward model's training pairs are.
        judges: Score them; all processes take part.
    """
    if not rows:
        return {CHOSEN: [], REJECTED: [], BLANK: []}
    config, world = judges.config, judges.world
    cache = judges.context.cache / "tokenized"
    tokenized = tokenize_preferences(rows, codec, config.reward.seq_length, cache)
    reward, referee = judges.reward(codec), judges.referee(codec)
    prompts = tokenized.prompt
    # An empty answer is its end-of-sequence token.
    empty = Ragged.of([[codec.eos_id]] * len(rows))
    found: dict[str, list[Answer]] = {}
    for side, texts, ids in (
        (CHOSEN, [row.chosen for row in rows], tokenized.chosen),
        (REJECTED, [row.rejected for row in rows], tokenized.rejected),
        (BLANK, [""] * len(rows), empty),
    ):
        whole = _whole(prompts, ids)
        scores = score_shared(reward, *whole, world).tolist()
        others = None if referee is None else score_shared(referee, *whole, world).tolist()
        found[side] = [
            Answer(
                part=pairs_part(part),
                model=side,
                row=row,
                sample=0,
                seed=config.eval.seed,
                prompt=codec.decode(prompts[row].tolist()),
                text=texts[row],
                tokens=len(ids[row]),
                finish="eos",
                score=scores[row],
                referee=None if others is None else others[row],
            )
            for row in range(len(rows))
        ]
    return found


def _whole(prompts: Ragged, answers: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, prompt lengths and content lengths [N] as a scorer takes them."""
    tokens, _ = joined([(prompts[row], answers[row]) for row in range(len(prompts))])
    lengths = np.stack([prompts.lengths(), answers.lengths()], axis=1).astype(np.int64)
    return tokens, torch.from_numpy(lengths[:, 0]), torch.from_numpy(lengths[:, 1] - 1)
