"""Keys: digests of everything that a stage's result depends on.

A key is made of resolved values, not of overrides, so editing a default changes the key as an
override would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_exp.config.evaluation import (
    COMPARED,
    HARNESS,
    PREFERENCE,
    PROFANITY,
    TOXICITY,
    ScorerKind,
    parts_of,
)
from rlhf_exp.config.experiment import (
    CacheName,
    Config,
    DataConfig,
    DataSource,
    EngineName,
    ModelConfig,
    PrecisionName,
)
from rlhf_exp.config.fields import key_content
from rlhf_exp.config.training import CONTINUED, Combine, RewardTermConfig, RolloutEngineName
from rlhf_exp.evaluation.harness_tasks import task_content
from rlhf_exp.function_source import function_source
from rlhf_exp.pipeline.stage_graph import engine_of
from rlhf_exp.store.fingerprint import DigestCache, key_of

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
PICKLED_FILES = ("*.bin", "*.pt", "*.pth")


def model_files(folder: Path | None) -> tuple[str, ...]:
    """Return patterns of the files that make up a model: pickled weights if it has no others.

    Args:
        folder: The model; `None`: of any.
    """
    if folder is None or any(folder.glob("*.safetensors")):
        return MODEL_FILES
    return (*MODEL_FILES, *PICKLED_FILES)


class Keys:
    """Makes the keys of one experiment.

    Args:
        config: The experiment.
        digests: Remembers digests of large files.

    Attributes:
        chosen: Digest of the chosen answers that are the demonstrations, if they are.
    """

    def __init__(self, config: Config, digests: DigestCache) -> None:
        self.config, self.digests = config, digests
        self.chosen: str | None = None

    def sft(self) -> str:
        """Return the key of the SFT model."""
        return self._key("sft", {"model": self._model(), "sft": key_content(self.config.sft)})

    def reward(self, parents: dict[str, str]) -> str:
        """Return the key of the reward model; without an SFT parent it starts from the base."""
        content: dict[str, Any] = {"reward": key_content(self.config.reward), "parents": parents}
        if not parents:
            content["model"] = self._model()
        return self._key("reward", content)

    def dpo(self, parents: dict[str, str]) -> str:
        """Return the key of the DPO policy; `parents` as for `ppo`."""
        content = {"dpo": key_content(self.config.dpo), "parents": parents}
        if engine_of(self.config, "dpo") is not EngineName.native:
            content["part"] = self.config.dpo.generation.batch  # as with PPO
        return self._key("dpo", content)

    def best_of(self, parents: dict[str, str]) -> str:
        """Return the key of the chosen answers; `parents` as for `ppo`."""
        section = self.config.ppo
        generation = key_content(section.generation)
        for name in ("correction", "ahead"):  # nothing learns from these answers
            generation.pop(name, None)
        content: dict[str, Any] = {
            "best_of": key_content(self.config.best_of),
            "parents": parents,
            "sampling": {"seq_length": section.seq_length, **generation},
        }
        return self._key("best_of", content | self._judge())

    def ppo(self, parents: dict[str, str], continued: str | None = None) -> str:
        """Return the key of the PPO policy.

        Args:
            parents: Keys of the results that it starts from, by role.
            continued: Key of the run that it continues, if there is one.
        """
        section = key_content(self.config.ppo)
        section.pop("continue_from", None)
        # The content of a function and the name of a server count, not their paths: see `_judge`.
        for name in ("function", "url", "name", "terms"):
            section["reward"].pop(name, None)
        content = {"ppo": section, "parents": parents}
        if self.config.engine.name is not EngineName.native:
            # trlx scales scores by the statistics of the parts sampled so far; with TRL the noise
            # of evaluations, which choose the weights, is drawn part by part.
            content["part"] = self.config.ppo.generation.batch
        if continued is not None:
            content[CONTINUED] = continued
        return self._key("ppo", content | self._judge())

    def eval(self, parents: dict[str, str], models: list[str], referee: str | None = None) -> str:
        """Return the key of the evaluation.

        Args:
            parents: Keys of the results that it starts from, by role.
            models: The models compared: roles, or keys of given models.
            referee: Key of the second reward model, if there is one.
        """
        section = self.config.ppo
        content: dict[str, Any] = {
            "eval": self._eval(),
            "parents": parents,
            "sizes": [section.seq_length, section.generation.max_new_tokens],
        }
        if models != list(COMPARED):
            content["models"] = models
        if referee is not None:
            content["referee"] = referee
        return self._key("eval", content | self._judge())

    def recomputed(self, samples: Path) -> str:
        """Return the key of an evaluation of stored samples."""
        digest = self.digests.file(samples)
        return self._key("eval", {"eval": self._eval(), "samples": digest})

    def given(self, path: str) -> str:
        """Return the key of a model that is used instead of a stage's training."""
        folder = Path(path)
        if folder.is_dir():
            return key_of({"given": self.digests.folder(folder, model_files(folder))})
        return key_of({"given_hub_id": path})

    def given_reward(self, key: str) -> str:
        """Return the key of a given reward model: with its trunk's model, where that is named."""
        trunk = self.config.reward.trunk
        return key if trunk is None else key_of({"given": key, "trunk": self.given(trunk)})

    def given_file(self, path: Path) -> str:
        """Return the key of a file that is used instead of a stage's result."""
        return key_of({"given": self.digests.file(path)})

    def _key(self, stage: str, content: dict[str, Any]) -> str:
        precision = self.config.distributed.precision
        assert precision is not PrecisionName.auto, "it is chosen before anything is planned"
        common = {
            "stage": stage,
            "data": self._data(self.config.data, stage),
            "precision": precision.name,
            # For every stage, not only the one that starts from the base: a model given by `use` is
            # loaded in this dtype, too.
            "dtype": self.config.model.dtype.name,
            "engine": engine_of(self.config, stage).name,
        }
        samples = stage in ("best_of", "ppo", "eval")
        if samples and self.config.model.cache is not CacheName.slots:
            common["cache"] = self.config.model.cache.name
        generation = self.config.ppo.generation
        # PPO and best-of-n have it among their own values.
        if stage == "eval" and generation.engine is not RolloutEngineName.native:
            dtype = None if generation.dtype is None else generation.dtype.name
            common["sampler"] = {"engine": generation.engine.name, "dtype": dtype}
        return key_of(common | content)

    def _model(self) -> dict[str, Any]:
        section: ModelConfig = self.config.model
        if section.path is None:
            content = key_content(section)
            content.pop("cache", None)  # SFT and the reward model sample nothing: see `_key`
            return content
        content = {"dtype": section.dtype.name}
        folder = Path(section.path)
        if folder.is_dir():
            return content | {"digest": self.digests.folder(folder, model_files(folder))}
        return content | {"path": section.path, "revision": section.revision}

    def _eval(self) -> dict[str, Any]:
        """Return the values of the evaluation's section that count."""
        section: dict[str, Any] = key_content(self.config.eval)
        judge = section.get("judge", {})
        # The content of model and labels counts, not their paths.
        if "model" in judge:
            judge["model"] = self.given(judge["model"])
        if "labels" in judge:
            judge["labels"] = self.digests.file(Path(judge["labels"]))
        parts, scorer = parts_of(self.config.eval), self.config.eval.toxicity.scorer
        if TOXICITY in parts:
            section["toxicity"] = self._toxicity()
        elif PREFERENCE in parts and scorer != PROFANITY:
            names = ("scorer_revision", "label")
            scorer_values = {name: section["toxicity"][name] for name in names}
            section["toxicity"] = scorer_values | {"scorer": self._scorer()}
        else:
            del section["toxicity"]
        if HARNESS not in parts:
            section.pop("harness", None)
        elif "harness" in section:
            tasks = self.config.eval.harness.tasks
            section["harness"]["tasks"] = [task_content(task, self.digests.file) for task in tasks]
        return section

    def _judge(self) -> dict[str, Any]:
        """Return the values of scoring that count, besides the reward model's key."""
        reward = self.config.ppo.reward
        reference = reward.function
        if reward.terms:
            length = {"judge_length": self._judge_length()} if self._models_score() else {}
            return {"terms": [self._term(term) for term in reward.terms]} | length
        if reward.url is not None:
            return {"server": {"name": reward.name} if reward.name else {"url": reward.url}}
        if reference is None:
            # The length at which the reward model cuts, which need not be in its own key.
            return {"judge_length": self._judge_length()}
        return {"function": self._function(reference)}

    def _judge_length(self) -> int:
        return max(self.config.reward.seq_length, self.config.ppo.seq_length)

    def _models_score(self) -> bool:
        return any(term.specs for term in self.config.ppo.reward.terms)

    def _function(self, reference: str) -> dict[str, str]:
        """Return the content of a function's file, and the function's name."""
        file, name = function_source(reference)
        return {"source": self.digests.file(file), "name": name}

    def _term(self, term: RewardTermConfig) -> dict[str, Any]:
        """Return the values of one of several rewards that count.

        Its reward models are named by their roles among the result's parents. A name counts where
        it stands for a server's reward alone.
        """
        roles = {spec: role for role, spec in self.config.ppo.reward.term_models.items()}
        content: dict[str, Any] = {"weight": term.weight}
        if term.specs:
            content["models"] = [roles.get(spec, "reward") for spec in term.specs]
        if term.models:
            content["combine"] = term.combine.name
        if term.combine is Combine.uncertainty:
            content["coef"] = term.coef
        if term.function is not None:
            content["function"] = self._function(term.function)
        if term.url is not None:
            content["server"] = {"name": term.name} if term.name else {"url": term.url}
        if term.length is not None:
            content["length"] = key_content(term.length)
        return content

    def _toxicity(self) -> dict[str, Any]:
        section = self.config.eval.toxicity
        content: dict[str, Any] = key_content(section)
        if self.config.eval.samples is not None:
            # The prompts are those of the samples.
            for name in ("data", "revision", "prompts", "seed", "max_new_tokens", "format"):
                del content[name]
            for name in ("temperature", "top_p", "top_k"):
                content.pop(name, None)  # left out where they are neutral
        else:
            content["data"] = self._content(section.data)
        content["scorer"] = self._scorer()
        return content

    def _scorer(self) -> Any:  # noqa: ANN401 - JSON
        """Return the toxicity scorer's content or name."""
        section = self.config.eval.toxicity
        if section.scorer_kind is not ScorerKind.function:
            return self._content(section.scorer)
        return self._function(section.scorer)

    def _content(self, source: str) -> str:
        """Return the digest of a file or folder; a hub id unchanged."""
        path = Path(source).expanduser()
        if path.is_dir():
            return self.digests.folder(path)
        return self.digests.file(path) if path.is_file() else source

    def _data(self, section: DataConfig, stage: str) -> dict[str, Any]:
        """Return the values of the data section, and the files, that a stage depends on."""
        content: dict[str, Any] = {"source": section.source.name, "format": section.format.name}
        if self.chosen is not None and stage in ("sft", "reward"):
            content["chosen"] = self.chosen
        if section.source == DataSource.toy:
            return content | {"toy": key_content(section.toy)}
        if section.source == DataSource.arithmetic:
            return content | {"arithmetic": key_content(section.arithmetic)}
        whole = key_content(section)
        for name in ("validation_fraction", "test_fraction", "limit", "path", "revision"):
            content[name] = whole[name]
        if "columns" in whole:
            content["columns"] = whole["columns"]
        if section.path is not None and Path(section.path).is_dir():
            content["files"] = {"path": self.digests.folder(Path(section.path))}
        if section.reader is not None:
            content["reader"] = self._function(section.reader)
        if section.source == DataSource.jsonl:
            # A reward model's scores are normalised on held-out demonstrations. Where no file has
            # prompts, those of all rows are asked.
            imitated = stage in ("sft", "reward") or (
                stage in ("best_of", "ppo", "eval") and section.prompts is None
            )
            files = {
                "preferences": section.preferences,
                "test": section.test,
                "demonstrations": section.demonstrations
                if imitated and section.chosen_by is None
                else None,
                # A new tokenizer learns from all texts, prompts included.
                "prompts": section.prompts
                if stage in ("best_of", "ppo", "eval")
                or (stage == "sft" and self.config.model.path is None)
                else None,
            }
            content["files"] = {name: self._content(path) for name, path in files.items() if path}
        return content
