"""Where answers come from: the models, each process sampling its share, or an earlier evaluation.

Legend: N answers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.batch import FinishReason, Prompts, Samples
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import RolloutEngineName
from rlhf_exp.data.batching import prompts_batch, right_padded
from rlhf_exp.data.rows import Preference, Prompt
from rlhf_exp.data.tokenized import (
    RaggedArray,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_texts,
)
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, read_answers
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import sampled_kl
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.stages.context import MODEL, SNAPSHOTS, StageContext
from rlhf_exp.stages.evaluation.evaluation import (
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
from rlhf_exp.stages.evaluation.kept_samples import kept_samples, samples_key
from rlhf_exp.stages.sampling import vllm_dtype, vllm_engine
from rlhf_exp.stages.scorers import EvaluationScorers
from rlhf_exp.stages.setup import cache_of, load_policy_model
from rlhf_exp.stages.tracking import stage_progress
from rlhf_exp.training.reward_scorer import (
    PromptRows,
    Scorer,
    score_samples,
    score_shared,
    texts_of,
)
from rlhf_exp.training.reward_terms import Scores, any_reads_rows, judge_samples, set_all_rows
from rlhf_exp.vllm.engine import VllmEngine

log = logging.getLogger(__name__)


class SampledSource:
    """Samples answers from the models.

    At most two models are in memory: the baseline, which a KL needs, and another one.

    Args:
        config: The experiment.
        context: The stage's folders, and the folders of the models.
        world: The processes.
    """

    def __init__(self, config: Config, context: StageContext, world: World) -> None:
        self.config, self.context, self.world = config, context, world
        self.models = evaluated_models(context, config.eval.models)
        self._policies: dict[str, Policy] = {}
        self._vllm: VllmEngine | None = None
        self._answers: str | None = None
        self._scorers = EvaluationScorers(config, context, world)

    def prompts(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """See `AnswerSource`."""
        return load()

    def answers(
        self,
        part: str,
        model: EvaluatedModel,
        prompts: Sequence[EvalPrompt],
        generation: GenerationSettings,
    ) -> list[Answer]:
        """See `AnswerSource`."""
        codec = self._codec(model)
        tokenized = self._prompts(prompts, codec, generation)
        share = self.world.share(len(tokenized))
        own_prompts = tokenized.select(torch.from_numpy(share.rows)).to(self.world.device)
        label = f"{self.context.stage} {part.replace('_', ' ')}, {model.name}"
        total, processes = len(tokenized), self.world.processes
        with stage_progress(self.context, label, total, self.world) as progress:
            samples = self._sample(
                model,
                tokenized,
                own_prompts,
                codec,
                generation,
                # The others are as far, give or take a row.
                lambda ended: progress.update(min(ended * processes, total), {}),
            )
            progress.update(total, {})  # also where they were kept
        texts = texts_of(samples.tokens, samples.prompt_lengths, samples.content_lengths, codec)
        reward = self._scorers.reward(codec) if generation.score else None
        scores = None if reward is None else judge_samples(reward, samples)
        referee = _scores(self._scorers.referee(codec) if generation.referee else None, samples)
        kl = self._kl(model, samples, generation)
        # Only the first answer to a prompt keeps its facts.
        first = range(0, len(tokenized), generation.count)
        facts = {number: prompt.facts for number, prompt in zip(first, prompts, strict=True)}
        own_answers = [
            Answer(
                part=part,
                model=model.name,
                row=number // generation.count,
                sample=number % generation.count,
                seed=generation.seed,
                sampling=generation.sampling,
                prompt=texts[0][line],
                text=texts[1][line],
                tokens=int(samples.response_lengths[line]),
                finish=FinishReason(int(samples.finish[line])).name.lower(),
                score=None if scores is None else float(scores.total[line]),
                terms={} if scores is None else _terms(scores, line),
                referee=None if referee is None else referee[line],
                kl=None if kl is None else float(kl[line]),
                facts=facts.get(number, {}),
            )
            for line, number in enumerate(own_prompts.rollout.tolist())
        ]
        shares = self.world.all_gather_object(own_answers)
        everyone = [answer for answers in shares for answer in answers]
        return everyone[: len(tokenized)]

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """See `AnswerSource`."""
        codec = self._scorers.own_codec() or self._codec(self.models[0])
        return score_pairs(load(), part, codec, self._scorers)

    def snapshots(self, part: str, model: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """See `AnswerSource`."""
        folder = Path(model.source)
        folders = sorted(folder.with_name(SNAPSHOTS).glob("step-*")) if folder.name == MODEL else []
        steps = [(int(path.name.removeprefix("step-")), path) for path in folders]
        return tuple(EvaluatedModel(at_step(model.name, n), str(path)) for n, path in steps)

    def _codec(self, model: EvaluatedModel) -> Codec:
        return self.context.materials.codec(model.source)

    def _prompts(
        self, prompts: Sequence[EvalPrompt], codec: Codec, generation: GenerationSettings
    ) -> Prompts:
        """Return every prompt `generation.count` times, numbered throughout."""
        limits = (self.config.ppo.seq_length, generation.max_new_tokens)
        texts = [prompt.text for prompt in prompts if prompt.text is not None]
        rows = [
            Prompt(prompt.history, None, prompt.origin, prompt.fields)
            for prompt in prompts
            if prompt.history is not None
        ]
        assert not (texts and rows), "a part asks either texts or dialogues"
        tokenized = (
            tokenize_texts(texts, codec, *limits)
            if texts
            else tokenize_prompts(rows, codec, *limits, self.context.cache / "tokenized")
        )
        if generation.score or generation.referee:
            self._scorers.rows(codec).add(tokenized.prompt, rows)
        index = np.repeat(np.arange(len(prompts)), generation.count)
        return prompts_batch(tokenized, index, np.arange(len(index)))

    def _policy(self, model: EvaluatedModel) -> Policy:
        if model.name not in self._policies:
            for other in [name for name in self._policies if name != self.models[0].name]:
                del self._policies[other]
            causal_lm = load_policy_model(self.config, model.source)
            policy = Policy(causal_lm, value_head=False).requires_grad_(False)
            self._policies[model.name] = policy.to(self.world.device)
        return self._policies[model.name]

    def _answering(self, model: EvaluatedModel, codec: Codec) -> RolloutEngine:
        """Return the engine that samples from a model; vLLM is started once for all models."""
        policy, section = self._policy(model), self.config.ppo.generation
        if section.engine is RolloutEngineName.native:
            return NativeEngine(policy)
        if self._vllm is None:
            args = (self.config, self.context, policy, codec, self.world, section)
            self._vllm = vllm_engine(*args)
        elif model.name != self._answers:
            self._vllm.adopt(policy, codec.tokenizer)
        self._answers = model.name
        self._vllm.refresh(0)
        return self._vllm

    def close(self) -> None:
        """End the processes that answer."""
        if self._vllm is not None:
            self._vllm.close()

    def _sample(
        self,
        model: EvaluatedModel,
        prompts: Prompts,
        own: Prompts,
        codec: Codec,
        generation: GenerationSettings,
        on_ended: Callable[[int], None],
    ) -> Samples:
        """Return the answers to this process's own share of the prompts."""
        greedy = generation.temperature == 0.0
        params = SamplingParams(
            max_new_tokens=generation.max_new_tokens,
            temperature=1.0 if greedy else generation.temperature,
            batch=self.config.eval.batch,
            eos_id=codec.eos_id,
            end_ids=codec.end_ids,
            pad_id=codec.pad_id,
            greedy=greedy,
            top_p=generation.top_p,
            top_k=generation.top_k,
            cache=cache_of(self.config),
        )
        stopper = Stopper(codec.tokenizer, codec.stop_strings) if generation.stop else None

        def compute() -> Samples:
            request = RolloutRequest(params, generation.seed, stopper, on_ended=on_ended)
            return self._answering(model, codec).answer(own, request)

        folder = Path(model.source)
        if not generation.keep or not folder.is_dir():  # a hub id does not say what is there
            return compute()
        settings = {
            "sampling": generation.sampling,
            "seed": generation.seed,
            "stop": [codec.digest, *codec.stop_strings] if generation.stop else None,
            "ends": [codec.eos_id, *sorted(codec.end_ids)],
            "dtype": self.config.model.dtype.name,
            "cache": params.cache,
        }
        section = self.config.ppo.generation
        if section.engine is RolloutEngineName.vllm:
            settings["sampler"] = f"vllm, {vllm_dtype(self.config, section)}"
        key = self.world.broadcast_object(
            samples_key(self.context.cache, folder, prompts, settings) if self.world.is_main else ""
        )
        path = self.context.cache / "samples" / f"{key}.npy"
        return kept_samples(path, own, len(prompts), compute, self.world)

    def _kl(
        self, model: EvaluatedModel, samples: Samples, generation: GenerationSettings
    ) -> Tensor | None:
        """Return the sum over each answer [N] of log model - log baseline, in nats."""
        baseline = self.models[0]
        if not generation.kl or model == baseline:
            return None
        if (generation.top_p, generation.top_k) != (1.0, 0):
            # Answers from a truncated distribution do not estimate the KL of the whole ones, and
            # two models truncate to different tokens.
            return None
        if self._codec(model).digest != self._codec(baseline).digest:
            if self.world.is_main:
                log.warning(
                    "%s and %s have different tokenizers: there is no KL between them",
                    model.name,
                    baseline.name,
                )
            return None
        policies = self._policy(model), self._policy(baseline)
        return sampled_kl(*policies, samples, generation.temperature or 1.0, self.config.eval.batch)


def _terms(scores: Scores, line: int) -> dict[str, float]:
    return {name: float(values[line]) for name, values in scores.terms.items()}


def _scores(scorer: Scorer | None, samples: Samples) -> list[float] | None:
    return None if scorer is None else score_samples(scorer, samples).tolist()


class StoredSource:
    """The answers of an earlier evaluation's `samples.jsonl`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers = read_answers(path)
        if not self._answers:
            raise UserError(f"eval.samples: {path} holds no answers")
        # The first part of a suite samples every model under evaluation, and perhaps snapshots.
        first = self._answers[0].part
        names = dict.fromkeys(answer.model for answer in self._answers if answer.part == first)
        snapshot_prefixes = tuple(at_step(name, "") for name in names)
        published = [name for name in names if not name.startswith(snapshot_prefixes)]
        self.models = tuple(EvaluatedModel(name, "") for name in published)

    def close(self) -> None:
        """See `AnswerSource`: nothing was started."""

    def prompts(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """See `AnswerSource`."""
        model = self.models[0].name
        first_answers = {
            answer.row: answer
            for answer in reversed(self._answers)
            if (answer.part, answer.model) == (part, model)
        }
        if not first_answers:
            parts = ", ".join(dict.fromkeys(answer.part for answer in self._answers))
            raise UserError(
                f"eval.samples: {self.path} has no answers for {part}, only for {parts}; choose "
                "another eval suite, or evaluate the models themselves"
            )
        return [
            EvalPrompt(text=first_answers[row].prompt, facts=first_answers[row].facts)
            for row in sorted(first_answers)
        ]

    def answers(
        self,
        part: str,
        model: EvaluatedModel,
        prompts: Sequence[EvalPrompt],
        generation: GenerationSettings,
    ) -> list[Answer]:
        """See `AnswerSource`."""
        stored = {
            (answer.row, answer.sample): answer
            for answer in self._answers
            if (answer.part, answer.model) == (part, model.name)
        }
        try:
            answers = [
                stored[row, sample]
                for row in range(len(prompts))
                for sample in range(generation.count)
            ]
        except KeyError as error:
            row, sample = error.args[0]
            raise UserError(
                f"eval.samples: {self.path} has no answer {sample + 1} of {model.name} to "
                f"prompt {row + 1} of {part}; ask for fewer, or evaluate the models themselves"
            ) from error
        unscored = sum(answer.score is None for answer in answers)
        if generation.score and unscored:
            raise UserError(
                f"eval.samples: {unscored} answers of {model.name} in {self.path} have no "
                f"score, which {part} needs; evaluate the models themselves"
            )
        return answers

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """See `AnswerSource`."""
        sides: dict[str, list[Answer]] = {CHOSEN: [], REJECTED: [], BLANK: []}
        for answer in self._answers:
            if answer.part == pairs_part(part):
                sides[answer.model].append(answer)
        return sides

    def snapshots(self, part: str, model: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """See `AnswerSource`."""
        names = dict.fromkeys(answer.model for answer in self._answers if answer.part == part)
        prefix = at_step(model.name, "")
        return tuple(EvaluatedModel(name, "") for name in names if name.startswith(prefix))


def score_pairs(
    rows: list[Preference], part: str, codec: Codec, scorers: EvaluationScorers
) -> dict[str, list[Answer]]:
    """Return both sides of held-out pairs, and an empty answer to each prompt, with their scores.

    Args:
        rows: The pairs.
        part: The part of the evaluation that the scores are for.
        codec: Tokenizes the pairs, which are cut as the reward model's training pairs are.
        scorers: The reward and its referee; all processes take part.
    """
    if not rows:
        return {CHOSEN: [], REJECTED: [], BLANK: []}
    config = scorers.config
    cache = scorers.context.cache / "tokenized"
    tokenized = tokenize_preferences(rows, codec, config.reward.seq_length, cache)
    reward, referee = scorers.reward(codec), scorers.referee(codec)
    prompts = tokenized.prompt
    # An empty answer is its end-of-sequence token.
    empty = RaggedArray.of([[codec.eos_id]] * len(rows))
    sides: dict[str, list[Answer]] = {}
    for side, texts, ids in (
        (CHOSEN, [row.chosen for row in rows], tokenized.chosen),
        (REJECTED, [row.rejected for row in rows], tokenized.rejected),
        (BLANK, [""] * len(rows), empty),
    ):
        inputs = _scorer_inputs(prompts, ids)
        scores = _pair_scores(reward, inputs, rows, scorers, codec)
        referee_scores = (
            None if referee is None else _pair_scores(referee, inputs, rows, scorers, codec)
        )
        sides[side] = [
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
                referee=None if referee_scores is None else referee_scores[row],
            )
            for row in range(len(rows))
        ]
    return sides


def _pair_scores(
    scorer: Scorer,
    inputs: tuple[Tensor, Tensor, Tensor],
    rows: list[Preference],
    scorers: EvaluationScorers,
    codec: Codec,
) -> list[float]:
    """Return the score of one side of each pair, as a scorer that knows the pair's row gives it.

    Pairs may share a prompt, with each other and with the prompts that models have answered, and
    have other fields: the data's own response, for one. A scorer that reads rows is therefore asked
    for the first pair of every prompt, then for the second, and so on.
    """
    tokens, prompt_lengths, _ = inputs
    ids = [tuple(row[:n].tolist()) for row, n in zip(tokens, prompt_lengths.tolist(), strict=True)]
    rounds = [list(range(len(rows)))]
    if any_reads_rows(scorer):
        seen: Counter[tuple[int, ...]] = Counter()
        rounds = []
        for number, key in enumerate(ids):
            if seen[key] == len(rounds):
                rounds.append([])
            rounds[seen[key]].append(number)
            seen[key] += 1
    scores = torch.zeros(len(rows))
    for numbers in rounds:
        own = PromptRows()
        own.add(RaggedArray.of([list(ids[n]) for n in numbers]), [rows[n] for n in numbers])
        set_all_rows(scorer, own)
        chosen = torch.tensor(numbers)
        asked = [column[chosen] for column in inputs]
        scores[chosen] = score_shared(scorer, asked[0], asked[1], asked[2], scorers.world)
    set_all_rows(scorer, scorers.rows(codec))
    found: list[float] = scores.tolist()
    return found


def _scorer_inputs(prompts: RaggedArray, answers: RaggedArray) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, prompt lengths and content lengths [N] as a scorer takes them."""
    tokens, _ = right_padded([(prompts[row], answers[row]) for row in range(len(prompts))])
    lengths = np.stack([prompts.lengths(), answers.lengths()], axis=1).astype(np.int64)
    return tokens, torch.from_numpy(lengths[:, 0]), torch.from_numpy(lengths[:, 1] - 1)
