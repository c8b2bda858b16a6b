"""The harness part: tasks of lm-evaluation-harness on every model (`eval.harness.tasks`).

A model's numbers are kept by the content of model and tasks, so that the SFT model of a sweep
answers them once. `lm_eval` is imported only here; the main process asks, with its own device.
"""

from __future__ import annotations

import difflib
import logging
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_exp.config.evaluation import HARNESS, HarnessConfig, parts_of
from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.harness import TaskScore, compare_tasks, scalars, task_scores
from rlhf_exp.evaluation.harness_tasks import (
    KEY,
    folders_of,
    is_path,
    specifications,
    task_content,
)
from rlhf_exp.stages.evaluation.evaluation import EvaluatedModel, Evaluation, PartResult
from rlhf_exp.stages.setup import load_policy_model
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.fingerprint import DigestCache, key_of
from rlhf_exp.store.sealed import Damaged, seal_values, sealed_values

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

FILE = "harness.json"
_CLOSE = 3


def run(evaluation: Evaluation) -> PartResult:
    """Have every model do the tasks, and compare each with the first."""
    section = evaluation.config.eval
    lm_eval = LmEval(section.harness, section.seed)
    # One model after another: the other processes wait, and not for all of them at once.
    scores = {
        model.name: evaluation.on_main_process(partial(_scores, evaluation, model, lm_eval))
        for model in evaluation.models
    }
    return evaluation.on_main_process(lambda: _conclude(evaluation, scores))


def check(config: Config) -> None:
    """Load the tasks, which fetches their data, before anything is trained.

    Raises:
        UserError: lm-eval is not installed, or a task or its data do not exist.
    """
    if HARNESS in parts_of(config.eval):
        LmEval(config.eval.harness, config.eval.seed).load()


def _conclude(evaluation: Evaluation, scores: dict[str, list[TaskScore]]) -> PartResult:
    section = evaluation.config.eval.harness
    comparisons = compare_tasks(scores, evaluation.config.eval.seed)
    content = {
        "models": [model.name for model in evaluation.models],
        "version": version("lm_eval"),
        "few_shot": section.few_shot,
        "limit": section.limit,
        "chat_template": section.chat_template,
        "tasks": [comparison.to_json() for comparison in comparisons],
    }
    return PartResult(scalars(comparisons), {FILE: content})


def _scores(evaluation: Evaluation, model: EvaluatedModel, lm_eval: LmEval) -> list[TaskScore]:
    """Return a model's numbers: those kept of the same model and tasks, or new ones."""
    path = _place_to_keep(evaluation, model)
    kept = None if path is None else _read(path)
    if kept is None:
        log.info("lm-eval: %s", model.name)
        causal_lm = load_policy_model(evaluation.config, model.source)
        Module.to(causal_lm, evaluation.world.device)
        tokenizer = evaluation.context.materials.codec(model.source).tokenizer
        results = lm_eval.results(causal_lm, tokenizer)
        kept = [score.to_json() for score in task_scores(results)]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, seal_values({"scores": kept}))
    return [TaskScore.from_json(score) for score in kept]


def _place_to_keep(evaluation: Evaluation, model: EvaluatedModel) -> Path | None:
    """Return the file of a model's numbers; `None` for a hub id, which says nothing of content."""
    config, cache = evaluation.config, evaluation.context.cache
    folder = Path(model.source)
    if not folder.is_dir():
        return None
    digests = DigestCache(cache / "digests.json")
    section = config.eval.harness
    key = key_of(
        {
            "model": digests.folder(folder),
            "tasks": [task_content(task, digests.file) for task in section.tasks],
            "settings": [section.few_shot, section.limit, section.chat_template],
            "seed": config.eval.seed,
            "dtype": config.model.dtype.name,
            "version": version("lm_eval"),
        }
    )
    return cache / "harness" / f"{key}.json"


def _read(path: Path) -> list[dict[str, Any]] | None:
    """Return the numbers in a kept file; `None` if it is missing or damaged."""
    try:
        numbers: list[dict[str, Any]] = sealed_values(path)["scores"]
        return numbers
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as error:
        log.warning("numbers of lm-eval: %s; they are computed again", error)
        return None


class LmEval:
    """lm-evaluation-harness with the tasks of a config; their index is built at first use.

    Args:
        section: The tasks, and how they are asked.
        seed: Of few-shot examples, and of tasks that sample.
    """

    def __init__(self, section: HarnessConfig, seed: int) -> None:
        self.section, self.seed = section, seed

    @cached_property
    def _tasks(self) -> TaskManager:
        """lm-eval's index of tasks, the user's own among them.

        Raises:
            UserError: lm-eval is not installed, or a file does not exist.
        """
        folders = folders_of(self.section.tasks)
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"{KEY}: tasks need lm-evaluation-harness, which is not installed: "
                "`pip install lm-eval` (extra `harness`)"
            ) from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        return TaskManager(include_path=folders or None)

    def load(self) -> None:
        """Load the tasks and their data.

        Raises:
            UserError: lm-eval is not installed, a task does not exist, or its data cannot be read.
        """
        names = self._tasks.all_tasks
        for task in self.section.tasks:
            if not is_path(task) and task not in names:
                close = difflib.get_close_matches(task, names, _CLOSE)
                hint = (
                    f"did you mean {' or '.join(close)}?" if close else "lm-eval's docs list all."
                )
                raise UserError(
                    f"{KEY}: lm-eval has no task {task!r}; {hint} A file or folder of your own is "
                    f"named by its path: ./{task}.yaml"
                )
        try:
            self._tasks.load(specifications(self.section.tasks))
        except Exception as error:  # of lm-eval, datasets and the hub: many unrelated classes
            raise UserError(
                f"{KEY}: lm-eval cannot load {', '.join(self.section.tasks)}: "
                f"{type(error).__name__}: {error}. Data of the hub need a network once; relative "
                "paths in a task's file are those of the folder that the run starts in"
            ) from error

    def results(
        self, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Return what `lm_eval.simple_evaluate` returns of a model."""
        tasks, section, seed = self._tasks, self.section, self.seed
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        results = lm_eval.simple_evaluate(
            HFLM(causal_lm.eval(), tokenizer=tokenizer, batch_size=section.batch),
            tasks=specifications(section.tasks),
            task_manager=tasks,
            num_fewshot=section.few_shot,
            limit=section.limit,
            apply_chat_template=section.chat_template,
            bootstrap_iters=0,  # intervals are over documents, by `evaluation/statistics.py`
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        assert results is not None, "one process asks"
        return dict(results)
