"""The eval stage: two or more models on held-out prompts, by the parts of the suite."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_exp.config.evaluation import (
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
from rlhf_exp.stages.evaluation import preference, reward_quality, toxicity
from rlhf_exp.stages.evaluation.answer_sources import SampledSource, StoredSource
from rlhf_exp.stages.evaluation.bench import AnswerSource, Bench, Part, PartResult
from rlhf_exp.stages.training import tracker_for, world_for
from rlhf_exp.tracking.tracker import finishing

PARTS: dict[str, Part] = {
    PREFERENCE: preference.run,
    TOXICITY: toxicity.run,
    REWARD_QUALITY: reward_quality.run,
    PEOPLE: preference.run_people,
}


def run(config: Config, context: StageContext) -> StageResult:
    """Do the parts of the suite; leave `samples.jsonl` and what each part found."""
    with world_for(config) as world:
        bench = Bench(config, context, world, _source(config, context, world))
        found = [PARTS[part](bench) for part in parts_of(config.eval.suite)]
        metrics = {name: value for one in found for name, value in one.metrics.items()}
        run_id = bench.alone(lambda: _keep(bench, found, metrics))
        prompts = len({answer.row for answer in bench.given if answer.part == PREFERENCE})
        return StageResult(metrics, None, run_id, {"prompts": prompts})


def _source(config: Config, context: StageContext, world: World) -> AnswerSource:
    if config.eval.samples is None:
        return SampledSource(config, context, world)
    return StoredSource(Path(context.models[SAMPLES]))


def _keep(bench: Bench, found: list[PartResult], metrics: dict[str, float]) -> str:
    """Write the files and record the numbers; return the run's id."""
    folder = bench.context.folder
    write_answers(folder / SAMPLES_FILE, bench.given)
    for one in found:
        for name, value in one.files.items():
            (folder / name).write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    with finishing(tracker_for(bench.config, bench.context, None, bench.world)) as tracker:
        for one in found:
            for name, (columns, rows) in one.tables.items():
                tracker.table(name, columns, rows, 0)
        tracker.log(metrics, 0)
        tracker.summary(metrics)
        return tracker.run_id
