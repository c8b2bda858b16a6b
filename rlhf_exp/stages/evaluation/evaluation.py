"""The common ground of an evaluation's parts: models, prompts, their answers, and results.

The answers come from the models, sampled by all processes together, or from the samples of an
earlier evaluation. A part cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhf_exp.config.evaluation import ROLES
from rlhf_exp.config.experiment import Config
from rlhf_exp.data.parsing import format_dialogue
from rlhf_exp.data.rows import Fields, History, Preference, reward_fields
from rlhf_exp.distributed.world import World
from rlhf_exp.evaluation.answers import Answer
from rlhf_exp.stages.context import StageContext

T = TypeVar("T")
DIALOGUE = "dialogue"
"""Fact of a prompt: the whole dialogue with HH's markers, for judges with another prompt format."""
CHOSEN, REJECTED, BLANK = "chosen", "rejected", "blank"
"""Names of the sides of held-out pairs in `samples.jsonl`; a blank answer is the empty text."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model under evaluation.

    Attributes:
        name: Its name in tables.
        source: Folder or hub id; empty where only its answers are known.
    """

    name: str
    source: str


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of an evaluation.

    Attributes:
        history: A dialogue, to be written in the run's prompt format.
        text: A text to be continued as it is, instead of a dialogue.
        facts: The data's own facts of the prompt, JSON values; kept with its first answer.
        fields: What a reward sees of the prompt's row.
        origin: Where the row is, for errors.
    """

    history: History | None = None
    text: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    fields: Fields = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are sampled, and which numbers come with them.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token.
        top_p: Probability that the tokens to draw from add up to, the most probable ones first.
        top_k: Number of most probable tokens to draw from; 0 for all.
        seed: Seed of the noise, which is the same for every model.
        count: Answers to each prompt.
        score: Whether answers get a reward.
        referee: Whether they get the second reward model's too, if there is one.
        kl: Whether answers get their KL to the baseline, where the tokenizers are the same and
            every token can be drawn.
        stop: Whether the prompt format's stop strings end an answer.
        keep: Whether the answers are kept by content, for other evaluations to score.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    count: int = 1
    score: bool = False
    referee: bool = False
    kl: bool = False
    stop: bool = True
    keep: bool = False

    @property
    def sampling(self) -> dict[str, float | int]:
        """The sampling parameters, as stored with the answers."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


class AnswerSource(Protocol):
    """Where answers come from."""

    models: tuple[EvaluatedModel, ...]

    def close(self) -> None:
        """End what was started to answer."""

    def prompts(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """Return the prompts of a part: those `load` returns, or those of the stored answers."""

    def answers(
        self,
        part: str,
        model: EvaluatedModel,
        prompts: Sequence[EvalPrompt],
        generation: GenerationSettings,
    ) -> list[Answer]:
        """Return the answers, all those to the first prompt first; the same in every process."""

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """Return held-out pairs with their scores: `CHOSEN`, `REJECTED` and `BLANK` answers."""

    def snapshots(self, part: str, model: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """Return the model at other steps of its training, as far as the source has them."""


class Evaluation:
    """An evaluation: its models, where their answers come from, and the answers so far.

    Attributes:
        config: The experiment.
        context: The stage's folder, materials and models.
        world: The processes.
        models: The models, the baseline first.
        collected: The answers so far, in the order they were sampled.

    Args:
        source: Where answers come from.
    """

    def __init__(
        self, config: Config, context: StageContext, world: World, source: AnswerSource
    ) -> None:
        self.config, self.context, self.world = config, context, world
        self.models = source.models
        self.collected: list[Answer] = []
        self._source = source

    @property
    def baseline(self) -> EvaluatedModel:
        """The model that the others are compared with."""
        return self.models[0]

    def prompts(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """Return the prompts of a part.

        Args:
            part: Its name.
            load: Reads them from the data; not called where the answers are stored ones.
        """
        return self._source.prompts(part, load)

    def answers(
        self,
        part: str,
        model: EvaluatedModel,
        prompts: Sequence[EvalPrompt],
        generation: GenerationSettings,
    ) -> list[Answer]:
        """Return a model's answers and keep them for `samples.jsonl`. All processes take part.

        Returns:
            [prompts * count] answers, all those to the first prompt first; the same in every
            process.

        Raises:
            UserError: An answer is missing among the stored ones.
        """
        answers = self._source.answers(part, model, prompts, generation)
        self.collected += answers
        return answers

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """Return held-out pairs with their scores and keep them for `samples.jsonl`.

        Args:
            part: The name of the part that asks.
            load: Reads them from the data; not called where the answers are stored ones.

        Returns:
            `CHOSEN`, `REJECTED` and `BLANK` answers, each [pairs]; the same in every process.
        """
        sides = self._source.pairs(part, load)
        self.collected += [answer for side in sides.values() for answer in side]
        return sides

    def snapshots(self, part: str, model: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """Return the model at other steps of its training, as far as the source has them."""
        return self._source.snapshots(part, model)

    def on_main_process(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process alone and return its result in all of them."""
        result = self.world.run_on_all(lambda: function() if self.world.is_main else None)[0]
        return result  # type: ignore[return-value]

    def generation(self, **changes: Any) -> GenerationSettings:  # noqa: ANN401 - fields of GenerationSettings
        """Return the suite's settings of generation, with the fields in `changes` replaced."""
        section = self.config.eval
        defaults: dict[str, Any] = {
            "max_new_tokens": section.max_new_tokens or self.config.ppo.generation.max_new_tokens,
            "temperature": section.temperature,
            "top_p": section.top_p,
            "top_k": section.top_k,
            "seed": section.seed,
        }
        return GenerationSettings(**{**defaults, **changes})


@dataclass(frozen=True)
class PartResult:
    """The results of a part.

    Attributes:
        metrics: Finite numbers under flat names, for trackers and the manifest.
        files: JSON values by file name, for the artifact.
        tables: Columns and rows by name, for trackers.
    """

    metrics: dict[str, float]
    files: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)


class Part(Protocol):
    """A part of an evaluation."""

    def __call__(self, evaluation: Evaluation) -> PartResult:
        """Sample, judge and summarise; called in every process, with the same result in all.

        Work that is costly or has effects goes through `Evaluation.on_main_process`.
        """


def test_prompts(evaluation: Evaluation, part: str) -> list[EvalPrompt]:
    """Return the held-out dialogues of the suite.

    Raises:
        UserError: The data have none.
    """

    def load() -> list[EvalPrompt]:
        rows = evaluation.context.materials.test_prompts()[: evaluation.config.eval.prompts]
        # Stored because the prompt as the model reads it may hold a template's tokens and be cut.
        return [
            EvalPrompt(
                row.history,
                facts={DIALOGUE: format_dialogue(row.history)},
                fields=reward_fields(row),
                origin=row.origin,
            )
            for row in rows
        ]

    return evaluation.prompts(part, load)


def evaluated_models(context: StageContext, specs: Sequence[str]) -> tuple[EvaluatedModel, ...]:
    """Return the models of `eval.models`, each under a name of its own."""
    models: list[EvaluatedModel] = []
    for spec in specs:
        name = spec.upper() if spec in ROLES else Path(spec).name or spec
        taken = {model.name for model in models}
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name} ({number})", number + 1
        models.append(EvaluatedModel(unique, context.models[spec]))
    return tuple(models)


def pairs_part(part: str) -> str:
    """Return the name under which a part's held-out pairs are kept."""
    return f"{part}/pairs"


def at_step(name: str, step: int | str) -> str:
    """Return the name of a model at another step of its training."""
    return f"{name}, step {step}"
