"""What the parts of an evaluation work with: the models, and their answers to what a part asks.

The answers come from the models, sampled by all processes together, or from the samples of an
earlier evaluation. A part cannot tell the difference.

Who is asked what in an evaluation, and how.

What answers that no model under evaluation gave as it is are called in `samples.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhf_exp.config.evaluation import ROLES
from rlhf_exp.config.experiment import Config
from rlhf_exp.data.parsing import dialogue
from rlhf_exp.data.rows import History, Preference
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer
from rlhf_exp.stages.context import StageContext

T = TypeVar("T")


class AnswerSource(Protocol):
    """Where answers come from."""

    contestants: tuple[EvaluatedModel, ...]

    def asked(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """Return the prompts of a part: what `load` returns, or those of the stored answers."""

    def answers(
        self,
        part: str,
        contestant: EvaluatedModel,
        asked: Sequence[EvalPrompt],
        manner: GenerationSettings,
    ) -> list[Answer]:
        """Return the answers, all those to the first prompt first; the same in every process."""

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """Return held-out pairs with their scores: `CHOSEN`, `REJECTED` and `BLANK` answers."""

    def snapshots(self, part: str, contestant: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """Return the models of other training steps that a model's artifact, or the part, has."""


class Bench:
    """One evaluation.

    Attributes:
        config: The experiment.
        context: The stage's folder, materials and models.
        world: The processes.
        contestants: The models, the baseline first.
        given: The answers so far, in the order they were asked for.

    Args:
        source: Where answers come from.
    """

    def __init__(
        self, config: Config, context: StageContext, world: World, source: AnswerSource
    ) -> None:
        self.config, self.context, self.world = config, context, world
        self.contestants = source.contestants
        self.given: list[Answer] = []
        self._source = source

    @property
    def baseline(self) -> EvaluatedModel:
        """The model that the others are compared with."""
        return self.contestants[0]

    def asked(self, part: str, load: Callable[[], list[EvalPrompt]]) -> list[EvalPrompt]:
        """Return the prompts of a part.

        Args:
            part: Its name.
            load: Reads them from the data; not called where the answers are stored ones.
        """
        return self._source.asked(part, load)

    def answers(
        self,
        part: str,
        contestant: EvaluatedModel,
        asked: Sequence[EvalPrompt],
        manner: GenerationSettings,
    ) -> list[Answer]:
        """Return a model's answers and keep them for `samples.jsonl`. All processes take part.

        Returns:
            [prompts * count] answers, all those to the first prompt first; the same in every
            process.

        Raises:
            UserError: The stored answers are not those asked for.
        """
        found = self._source.answers(part, contestant, asked, manner)
        self.given += found
        return found

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """Return held-out pairs with their scores and keep them for `samples.jsonl`.

        Args:
            part: The name of the part that asks.
            load: Reads them from the data; not called where the answers are stored ones.

        Returns:
            `CHOSEN`, `REJECTED` and `BLANK` answers, each [pairs]; the same in every process.
        """
        found = self._source.pairs(part, load)
        self.given += [answer for side in found.values() for answer in side]
        return found

    def snapshots(self, part: str, contestant: EvaluatedModel) -> tuple[EvaluatedModel, ...]:
        """Return the models of other training steps that there are of a model."""
        return self._source.snapshots(part, contestant)

    def alone(self, function: Callable[[], T]) -> T:
        """Return what `function` returns in the main process, the only one that calls it."""
        found = self.world.run_on_all(lambda: function() if self.world.is_main else None)[0]
        return found  # type: ignore[return-value]

    def manner(self, **other: Any) -> GenerationSettings:  # noqa: ANN401 - fields of Manner
        """Return how the suite asks for answers, with `other` fields as given."""
        section = self.config.eval
        usual: dict[str, Any] = {
            "max_new_tokens": section.max_new_tokens or self.config.ppo.generation.max_new_tokens,
            "temperature": section.temperature,
            "top_p": section.top_p,
            "top_k": section.top_k,
            "seed": section.seed,
        }
        return GenerationSettings(**{**usual, **other})


@dataclass(frozen=True)
class PartResult:
    """What a part found.

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

    def __call__(self, bench: Bench) -> PartResult:
        """Ask, judge and summarise; called in every process, whose results must be the same.

        What is costly, or has effects, goes through `Bench.alone`.
        """


def test_prompts(bench: Bench, part: str) -> list[EvalPrompt]:
    """Return the held-out dialogues that the suite asks.

    Raises:
        UserError: The data have none.
    """

    def load() -> list[EvalPrompt]:
        rows = bench.context.materials.corpus.prompts.test[: bench.config.eval.prompts]
        if not rows:
            raise UserError(
                "data: no test prompts to evaluate on; give data.test or a test_fraction"
            )
        # The prompt as the model reads it may hold a template's tokens and have lost its beginning.
        return [EvalPrompt(row.history, facts={DIALOGUE: dialogue(row.history)}) for row in rows]

    return bench.asked(part, load)


DIALOGUE = "dialogue"
"""Fact of a prompt: the whole dialogue with HH's markers, for judges that are no policy's kin."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model under evaluation.

    Attributes:
        name: What tables call it.
        source: Folder or hub id; empty where only its answers are known.
    """

    name: str
    source: str


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt.

    Attributes:
        history: A dialogue, to be written in the run's prompt format.
        text: A text to be continued as it is, instead of a dialogue.
        facts: What the data say of the prompt, JSON values; kept with its first answer.
    """

    history: History | None = None
    text: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token.
        top_p: What the tokens that can be drawn add up to, the most probable ones first.
        top_k: How many tokens can be drawn, the most probable ones; 0 for all.
        seed: Of the noise, which is the same for every model.
        count: Answers to each prompt.
        score: Whether answers get their reward.
        referee: Whether they get that of the second reward model too, if there is one.
        kl: Whether answers get their KL to the baseline, where the tokenizers are the same and
            every token can be drawn.
        stop: Whether the prompt format's stop strings end an answer.
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

    @property
    def sampling(self) -> dict[str, float | int]:
        """How the tokens are drawn, as it is kept with the answers."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


def evaluated_models(context: StageContext, specs: Sequence[str]) -> tuple[EvaluatedModel, ...]:
    """Return the models of a config's `eval.models`, by names that differ."""
    found: list[EvaluatedModel] = []
    for spec in specs:
        name = spec.upper() if spec in ROLES else Path(spec).name or spec
        taken = {one.name for one in found}
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name} ({number})", number + 1
        found.append(EvaluatedModel(unique, context.models[spec]))
    return tuple(found)


CHOSEN, REJECTED, BLANK = "chosen", "rejected", "blank"
"""Sides of held-out pairs: what people chose, what they did not, and an answer of no words."""


def pairs_part(part: str) -> str:
    """Return the name under which a part's held-out pairs are kept."""
    return f"{part}/pairs"


def at_step(name: str, step: int | str) -> str:
    """Return the name of a model at another step of its training."""
    return f"{name}, step {step}"
