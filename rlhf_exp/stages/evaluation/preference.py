"""The preference part: each model against the baseline on held-out prompts, by one or more judges.

The reward judges in any case; `eval.judge` adds other judges, and pairs judged by people to measure
all of them against. The people part counts the pairs that people can judge: `rlhf-exp annotate`
serves the `result.json` of this part. Votes come later and stay in the campaign's own file; the
report reads them when it is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.config.evaluation import PREFERENCE, EvalJudgeConfig, JudgeName
from rlhf_exp.config.experiment import Config
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, sampling_words
from rlhf_exp.evaluation.comparison import ModelComparison, compare_models
from rlhf_exp.evaluation.judges.human_agreement import (
    JudgedPairs,
    Judgment,
    compare_judges,
    judge_quality,
    people_agreement,
    read_judged_pairs,
)
from rlhf_exp.evaluation.judges.llm import Endpoint, JudgeClient, LLMJudge, ReplyCache
from rlhf_exp.evaluation.judges.protocol import AnswerPair, Judge, Verdict
from rlhf_exp.evaluation.judges.reward_models import (
    ClassifierTextScorer,
    RewardJudge,
    RewardModelTextScorer,
    Score,
    history_of,
    score_verdicts,
)
from rlhf_exp.evaluation.preference import needed_pairs
from rlhf_exp.evaluation.toxicity.scorers import TextScores
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.redaction import secret_variable
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.evaluation.best_of_n import best_answers
from rlhf_exp.stages.evaluation.evaluation import DIALOGUE, Evaluation, PartResult, test_prompts
from rlhf_exp.stages.evaluation.gold_judge import gold_judge
from rlhf_exp.stages.evaluation.toxicity_scorer import shared_scores, toxicity_scorer
from rlhf_exp.stages.scorers import reward_client
from rlhf_exp.stages.setup import attention_of, torch_dtype
from rlhf_exp.stages.tracking import stage_progress
from rlhf_exp.training.scorers import RewardFunction

RESULT, COMPARISONS = "result.json", "comparisons.json"
"""The first comparison, and the list of all of them if there are several."""
REPLIES = "judges/replies.jsonl"
"""Replies of language models, below the output folder."""
PEOPLE_FILE = "people.json"
# Shares of wins among decided pairs for which the necessary number of pairs is reported.
EFFECTS = (0.6, 0.65, 0.7)
JUDGES = "judges.json"


def run(evaluation: Evaluation) -> PartResult:
    """Answer held-out prompts by all models, and compare each with the first."""
    # Made before anything is sampled, so that a wrong address costs nothing.
    panels: list[JudgePanel] = []
    evaluation.on_main_process(lambda: panels.append(JudgePanel(evaluation)))
    prompts = test_prompts(evaluation, PREFERENCE)
    chooses_best = evaluation.config.eval.chooses_best
    generation = evaluation.generation(score=True, referee=chooses_best, kl=True)
    answers = [
        evaluation.answers(PREFERENCE, model, prompts, generation) for model in evaluation.models
    ]
    if chooses_best:
        answers.append(best_answers(evaluation))
    scored = _toxicity(evaluation, [answer.text for model in answers for answer in model])
    return evaluation.on_main_process(
        lambda: _conclude(evaluation.config, answers, scored, panels[0])
    )


def _toxicity(evaluation: Evaluation, texts: list[str]) -> TextScores:
    """Return the config's toxicity scores of the answers; each process scores its share."""
    scorer = toxicity_scorer(evaluation.config, evaluation.world)
    scores = shared_scores(scorer, texts, evaluation.world).tolist()
    return TextScores(scorer.name, dict(zip(texts, scores, strict=True)))


def _conclude(
    config: Config, answers: list[list[Answer]], scored: TextScores, panel: JudgePanel
) -> PartResult:
    baseline, *others = answers
    results = [_compare(config, baseline, other, scored) for other in others]
    metrics = results[0].scalars()
    for result in results[1:]:
        prefix = f"eval/{result.name_b}/"
        metrics |= {name.replace("eval/", prefix, 1): v for name, v in result.scalars().items()}
    files: dict[str, Any] = {RESULT: results[0].to_json()}
    if len(results) > 1:
        files[COMPARISONS] = [result.to_json() for result in results]
    dialogues = [str(answer.facts.get(DIALOGUE, answer.prompt)) for answer in baseline]
    judged, content = panel.report(results, dialogues)
    if content:
        files[JUDGES] = content
    return PartResult(metrics | judged, files, {"eval/side_by_side": _table(results)})


def _compare(
    config: Config, baseline: list[Answer], other: list[Answer], scored: TextScores
) -> ModelComparison:
    kl = [answer.kl for answer in other if answer.kl is not None]
    comparison = compare_models(
        [answer.prompt for answer in baseline],
        [answer.text for answer in baseline],
        [answer.text for answer in other],
        _scores(baseline),
        _scores(other),
        kl if len(kl) == len(other) else None,
        lengths_a=[answer.tokens for answer in baseline],
        lengths_b=[answer.tokens for answer in other],
        toxicity=scored,
        gold=gold_judge(config),
        terms={
            name: ([a.terms[name] for a in baseline], [b.terms[name] for b in other])
            for name in baseline[0].terms
        },
        name_a=baseline[0].model,
        name_b=other[0].model,
        judge=config.ppo.reward.kind,
        seed=config.eval.seed,
        tie_band=(config.eval.tie_low, config.eval.tie_high),
    )
    return replace(comparison, sampling=sampling_words(other[0].sampling))


def _scores(answers: list[Answer]) -> np.ndarray:
    return np.array([answer.score for answer in answers], dtype=np.float64)


def _table(results: list[ModelComparison]) -> tuple[list[str], list[list[object]]]:
    columns = ["prompt", "baseline", "model", "answer of baseline", "answer of model"]
    columns += ["score of baseline", "score of model", "outcome"]
    rows = []
    for result in results:
        names = [result.name_a, result.name_b]
        for row in result.rows:
            cells = [row.answer_a, row.answer_b, row.score_a, row.score_b, row.outcome]
            rows.append([row.prompt, *names, *cells])
    return columns, rows


class JudgePanel:
    """The judges of one evaluation, used by the main process alone.

    Args:
        evaluation: The evaluation.

    Raises:
        UserError: The file of judged pairs cannot be read, or the endpoint does not answer.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.section: EvalJudgeConfig = evaluation.config.eval.judge
        self.labels: JudgedPairs | None = None
        if self.section.labels is not None:
            labels = read_judged_pairs(
                Path(self.section.labels), "eval.judge.labels", self.section.question
            )
            self.labels = labels.first(self.section.pairs)
        self._judges: dict[JudgeName, Judge] = {}
        if JudgeName.llm in self.section.names:
            self._judges[JudgeName.llm] = self._llm()
        scored = evaluation.config.ppo.reward.model_scores
        if self.labels is not None and JudgeName.reward in self.section.names and not scored:
            self._judge(JudgeName.reward)  # fail now where it asks for rows

    def report(
        self, results: Sequence[ModelComparison], dialogues: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the judges' numbers, and the content of `judges.json`.

        Args:
            results: A comparison for each model but the baseline.
            dialogues: The prompts [N] as texts with HH's markers, or plain.
        """
        if self.section.names == [JudgeName.reward] and self.labels is None:
            # The comparison itself holds the reward's judgment.
            return {}, {}
        metrics: dict[str, float] = {}
        comparisons = []
        for number, result in enumerate(results):
            judgments = [self._judgment(name, result, dialogues) for name in self.section.names]
            prefix = f"{result.name_b}/judge" if number else "judge"
            for judgment in judgments:
                metrics |= {
                    f"eval/{prefix}/{judgment.kind}/{k}": v for k, v in judgment.scalars().items()
                }
            comparisons.append(
                {
                    "a": result.name_a,
                    "b": result.name_b,
                    "judges": [judgment.to_json() for judgment in judgments],
                    "agreement": compare_judges(judgments, result.seed),
                }
            )
        content: dict[str, Any] = {"comparisons": comparisons, "quality": None}
        if self.labels is not None:
            quality_metrics, content["quality"] = self._quality(self.labels)
            metrics |= quality_metrics
        return metrics, content

    def _judgment(
        self, name: JudgeName, result: ModelComparison, dialogues: Sequence[str]
    ) -> Judgment:
        if name is JudgeName.reward:
            scores = [(row.score_a, row.score_b) for row in result.rows]
            a, b = zip(*scores, strict=True)
            verdicts = score_verdicts(a, b, result.tie_band)
            return Judgment.of(name.value, result.judge, verdicts, result.seed, result.level)
        judge = self._judge(name)
        pairs = [
            AnswerPair(prompt, row.answer_a, row.answer_b)
            for prompt, row in zip(dialogues, result.rows, strict=True)
        ]
        verdicts = judge_with_progress(judge, pairs, self.evaluation.context)
        usage = judge.usage if isinstance(judge, LLMJudge) else None
        return Judgment.of(name.value, judge.name, verdicts, result.seed, result.level, usage)

    def _quality(self, labels: JudgedPairs) -> tuple[dict[str, float], dict[str, Any]]:
        metrics: dict[str, float] = {}
        judges = []
        seed = self.evaluation.config.eval.seed
        for name in self.section.names:
            judge = self._judge(name)
            verdicts = judge_with_progress(judge, labels.pairs, self.evaluation.context)
            signs = [verdict.sign for verdict in verdicts]
            agreement = judge_quality(judge.name, signs, labels.ratings, seed)
            for short, estimate in (("agreement", agreement.agreement), ("kappa", agreement.kappa)):
                if np.isfinite(estimate.mean):
                    metrics[f"eval/judge/{name.value}/people_{short}"] = estimate.mean
            judges.append({"kind": name.value, **agreement.to_json()})
        return metrics, {
            "file": Path(str(self.section.labels)).name,
            "question": labels.question,
            "unusable": labels.unusable,
            "people": people_agreement(labels.ratings, labels.annotators, seed).to_json(),
            "judges": judges,
        }

    def _judge(self, name: JudgeName) -> Judge:
        if name not in self._judges:
            make = {JudgeName.reward: self._reward, JudgeName.model: self._model}[name]
            self._judges[name] = make()
        return self._judges[name]

    def _llm(self) -> LLMJudge:
        section = self.section
        assert section.llm is not None
        assert section.url is not None
        endpoint = Endpoint(
            section.url,
            section.llm,
            None if section.key_env is None else secret_variable(section.key_env),
            section.timeout_s,
            section.retries,
            request_fields(section.request),
        )
        client = JudgeClient(endpoint)
        if self.evaluation.config.eval.samples is None:
            # Fail before an hour of sampling; without sampling, cached replies may suffice.
            client.check()
        replies = ReplyCache(Path(self.evaluation.config.output_dir) / REPLIES)
        return LLMJudge(client, replies, section.criterion, section.concurrency)

    def _model(self) -> Judge:
        section, config = self.section, self.evaluation.config
        assert section.model is not None
        classifier = ClassifierTextScorer(
            section.model,
            section.revision,
            self.evaluation.world.device,
            torch_dtype(config),
            attention_of(config),
            section.batch,
        )
        return RewardJudge(classifier.name, classifier, self._band())

    def _reward(self) -> Judge:
        """Return the reward that PPO maximised, as a judge of any texts."""
        config, context = self.evaluation.config, self.evaluation.context
        if not config.ppo.reward.model_scores:
            codec = context.materials.codec(self._policy())
            return RewardJudge(config.ppo.reward.kind, self._asked(codec), self._band())
        folder = context.models["reward"]
        model = RewardModel.load(folder, None, torch_dtype(config), attention_of(config))
        own = RewardModelTextScorer(
            model,
            context.materials.codec(folder),
            max(config.reward.seq_length, config.ppo.seq_length),
            config.ppo.reward.device or self.evaluation.world.device,
            self.section.batch,
        )
        return RewardJudge(config.ppo.reward.kind, own, self._band())

    def _asked(self, codec: Codec) -> Score:
        """Return the function or server that scores in place of a reward model, asked for texts."""
        reward = self.evaluation.config.ppo.reward
        function = None if reward.function is None else RewardFunction(reward.function)
        client = None if reward.url is None else reward_client(reward, reward.url, reward.name)
        if client is not None:
            client.check()
        if any(asked.reads_rows for asked in (function, client) if asked is not None):
            raise UserError(
                f"eval.judge.labels: the {reward.kind} asks for the rows of the prompts, and "
                "judged pairs have none; leave `reward` out of eval.judge.names"
            )

        def score(prompts: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
            histories = [history_of(prompt) for prompt in prompts]
            texts = [codec.render(history) for history in histories]
            if function is not None:
                return np.asarray(function.scores(texts, answers), dtype=np.float64)
            assert client is not None, "a function or a server scores"
            dialogues = histories if client.reads_dialogues(codec) else None
            return np.asarray(client.scores(texts, answers, None, dialogues), dtype=np.float64)

        return score

    def _policy(self) -> str:
        return self.evaluation.models[-1].source

    def _band(self) -> tuple[float, float]:
        return self.evaluation.config.eval.tie_low, self.evaluation.config.eval.tie_high


def judge_with_progress(
    judge: Judge, pairs: Sequence[AnswerPair], context: StageContext | None = None
) -> list[Verdict]:
    """Return a judge's verdicts, with its progress for a language model.

    Args:
        judge: The judge.
        pairs: The pairs.
        context: The stage that asks, if one does.
    """
    if not isinstance(judge, LLMJudge):
        return judge.verdicts(pairs)
    total = 2 * sum(not pair.identical for pair in pairs)
    with stage_progress(context, "judge", total) as progress:
        judge.on_progress = lambda done, _: progress.update(done, {})
        return judge.verdicts(pairs)


def request_fields(fields: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `NAME:JSON` texts; a value that is not JSON is taken as text."""
    fields_by_name: dict[str, Any] = {}
    for text in fields:
        name, _, value = text.partition(":")
        try:
            fields_by_name[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields_by_name[name.strip()] = value
    return fields_by_name


def run_people(evaluation: Evaluation) -> PartResult:
    """Count the pairs with different answers; equal answers are ties that nobody has to read."""
    first, second = (model.name for model in evaluation.models[:2])
    texts = {
        name: {
            answer.row: answer.text
            for answer in evaluation.collected
            if (answer.part, answer.model) == (PREFERENCE, name)
        }
        for name in (first, second)
    }
    differ = sum(text != texts[second][row] for row, text in texts[first].items())
    content = {
        "names": [first, second],
        "prompts": len(texts[first]),
        "differ": differ,
        "needed": [[effect, needed_pairs(effect)] for effect in EFFECTS],
    }
    return PartResult({"people/pairs": float(differ)}, {PEOPLE_FILE: content})
