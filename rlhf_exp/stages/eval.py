"""The eval stage: two or more models on held-out prompts, by the parts of the suite."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from rlhf_exp.config.evaluation import (
    BEST_OF,
    HARNESS,
    PEOPLE,
    PREFERENCE,
    REWARD_QUALITY,
    SAMPLES,
    SAMPLES_FILE,
    TOXICITY,
    parts_of,
)
from rlhf_exp.config.experiment import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.evaluation.answers import write_answers
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.evaluation import best_of_n, harness, preference, reward_quality, toxicity
from rlhf_exp.stages.evaluation.answer_sources import SampledSource, StoredSource
from rlhf_exp.stages.evaluation.evaluation import AnswerSource, Evaluation, Part, PartResult
from rlhf_exp.stages.setup import world_for
from rlhf_exp.stages.tracking import tracker_for
from rlhf_exp.tracking.tracker import finishing

PARTS: dict[str, Part] = {
    PREFERENCE: preference.run,
    TOXICITY: toxicity.run,
    REWARD_QUALITY: reward_quality.run,
    PEOPLE: preference.run_people,
    BEST_OF: best_of_n.run,
    HARNESS: harness.run,
}


def run(config: Config, context: StageContext) -> StageResult:
    """Run the parts of the suite; write `samples.jsonl` and the files of each part."""
    with world_for(config) as world, closing(_source(config, context, world)) as source:
        evaluation = Evaluation(config, context, world, source)
        results = [PARTS[part](evaluation) for part in parts_of(config.eval)]
        metrics = {name: value for result in results for name, value in result.metrics.items()}
        run_id = evaluation.on_main_process(lambda: _save(evaluation, results, metrics))
        prompts = len({answer.row for answer in evaluation.collected if answer.part == PREFERENCE})
        facts: dict[str, float | int | str] = {"prompts": prompts} if prompts else {}
        return StageResult(metrics, None, run_id, facts)


def _source(config: Config, context: StageContext, world: World) -> AnswerSource:
    if config.eval.samples is None:
        return SampledSource(config, context, world)
    return StoredSource(Path(context.models[SAMPLES]))


def _save(evaluation: Evaluation, results: list[PartResult], metrics: dict[str, float]) -> str:
    """Write the files and record the numbers; return the run's id."""
    folder = evaluation.context.folder
    write_answers(folder / SAMPLES_FILE, evaluation.collected)
    for result in results:
        for name, value in result.files.items():
            (folder / name).write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    with finishing(
        tracker_for(evaluation.config, evaluation.context, None, evaluation.world)
    ) as tracker:
        for result in results:
            for name, (columns, rows) in result.tables.items():
                tracker.table(name, columns, rows, 0)
        tracker.log(metrics, 0)
        tracker.summary(metrics)
        return tracker.run_id
