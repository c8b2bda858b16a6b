"""The Python interface: `run` starts what a command line would, `Run` and `Sweep` read results.

    import rlhf_exp

    run = rlhf_exp.run(["experiment=demo", "name=demo"])
    run.metrics("ppo").plot(x="global_step", y="eval/reward_mean")
    rlhf_exp.Sweep("lr").table()

All of them find results by an output folder, as `rlhf-exp` does. What the user can mend is raised
as `rlhf_exp.errors.UserError`; nothing here exits the process. See docs/reference/python.md.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.commands.runs import POLICIES, OutputFolder, composed_points
from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_exp.store.artifact import Artifact
    from rlhf_exp.store.run_records import RunRecord

_SHOWING = ("-h", "--help", "--version")


def run(
    overrides: Sequence[str],
    *,
    config_dir: str | Path | None = None,
    outputs: str | Path | None = None,
) -> Run | Sweep | None:
    """Run what `rlhf-exp run` runs with the same arguments, in this process, to its end.

    What is in the store is not made again, so that the same call a second time returns at once.

    Args:
        overrides: The arguments, such as `["experiment=smoke", "ppo.lr=1e-4"]`. With `-m` among
            them, values with commas are swept over.
        config_dir: A further folder of config files, as `--config-dir`.
        outputs: The folder of the results, as `output_dir=`.

    Returns:
        The run; of a multirun and of jobs on Slurm the sweep; `None` where nothing is to be found
        afterwards: of `plan=true`, `probe=true` and options that only show something.

    Raises:
        UserError: The arguments or the config are wrong (all problems are named), or a stage cannot
            run.
        JobsFailed: Points of a multirun failed; `Sweep(name).table()` has their errors.
        KeyboardInterrupt: The user stopped it; the same call goes on from the last checkpoint.
    """
    if isinstance(overrides, str):
        raise UserError(
            f"overrides={overrides!r}: expected a list of texts, such as [{overrides!r}]"
        )
    arguments = [str(text) for text in overrides]
    shown = [text for text in arguments if text in _SHOWING]
    if shown:
        raise UserError(f"{shown[0]}: is for the command line: rlhf-exp run {shown[0]}")
    if config_dir is not None:
        arguments = ["--config-dir", str(config_dir), *arguments]
    if outputs is not None:
        arguments.append(f"output_dir={_quoted(Path(outputs).absolute())}")

    from rlhf_exp.hydra_app import launch

    with _process_kept():
        jobs = launch(arguments)
    if jobs is None or jobs.config.plan or jobs.config.probe:
        return None
    config, folder = jobs.config, Path(jobs.config.output_dir).absolute()
    if jobs.multirun:
        assert config.name is not None, "a multirun needs a name"
        return Sweep(config.name, folder)

    from rlhf_exp.experiment import UNNAMED
    from rlhf_exp.pipeline.hub import pinned
    from rlhf_exp.pipeline.plan import plan
    from rlhf_exp.pipeline.precision import with_precision

    config, _ = with_precision(pinned(config))
    return Run(f"{config.name or UNNAMED}/{plan(config)[-1].key}", folder)


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Config:
    """Return the config that the arguments come to, checked as before a run. Nothing runs.

    Hydra's own `compose` knows neither the schema's checks nor a user's folders of configs.

    Args:
        overrides: As for `run`, without `-m` and without several values of a key.
        config_dir: A further folder of config files.

    Raises:
        UserError: Names all problems.
    """
    from rlhf_exp.config.checks import config_problems
    from rlhf_exp.config.problems import raise_problems

    folder = None if config_dir is None else Path(config_dir).expanduser().resolve()
    configs = list(composed_points(list(overrides), folder))
    if len(configs) != 1:
        raise UserError(f"{' '.join(overrides)}: {len(configs)} configs; compose one at a time")
    raise_problems(config_problems(configs[0]))
    return configs[0]


class Run:
    """One run and its results, which are read when they are asked for.

    Args:
        name: `latest`, a name, `NAME/KEY` for a point of a sweep, the beginning of a key, or a
            folder. Of several runs of one name, the newest that is done, which is printed.
        outputs: The folder of the results (`output_dir`).

    Raises:
        UserError: There is no such run (near names are listed), or several that fit (they are
            listed).
    """

    def __init__(self, name: str = "latest", outputs: str | Path = "outputs") -> None:
        self._folder = OutputFolder(Path(outputs).absolute())
        self._record: RunRecord = self._folder.run(name)

    def __repr__(self) -> str:
        return f"<Run {self.name}/{self.key}: {self.status}>"

    @property
    def name(self) -> str:
        """The name that the user gave it."""
        return self._record.name

    @property
    def key(self) -> str:
        """The key of its last stage; with the name it finds this run and no other."""
        return self._record.key

    @property
    def status(self) -> str:
        """How far it was when this object was made: `done`, `running`, `failed`, ..."""
        return str(self._record.status)

    @property
    def overrides(self) -> list[str]:
        """The arguments that it was started with."""
        return list(self._record.overrides)

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each stage's result in the store, as far as they are done."""
        return {stage: artifact.path for stage, artifact in self._artifacts().items()}

    @property
    def config(self) -> DictConfig:
        """The config that its last finished stage was made with, read-only: `config.ppo.lr`."""
        from omegaconf import OmegaConf

        config = OmegaConf.create(list(self._artifacts().values())[-1].manifest.config)
        OmegaConf.set_readonly(config, True)
        return config

    @property
    def results(self) -> dict[str, float]:
        """The final numbers of all finished stages, by stage and name: `ppo eval/reward_mean`."""
        return {
            f"{stage} {name}": value
            for stage, artifact in self._artifacts().items()
            for name, value in artifact.manifest.metrics.items()
        }

    @property
    def report(self) -> Path:
        """The page of the run, written anew."""
        from rlhf_exp.commands.inspect import write_run_report

        return write_run_report(self._folder, self._record, self._label)

    def figures(self, folder: str | Path) -> list[Path]:
        """Write its charts into a folder, an SVG file for each stage, and return their paths."""
        from rlhf_exp.commands.inspect import write_figures

        return write_figures(self._folder.path, self._label, Path(folder))

    def metrics(self, stage: str | None = None) -> DataFrame:
        """Return what was logged while training: a row for each step at which something was.

        Args:
            stage: `sft`, `reward`, `dpo` or `ppo`; all that were trained by default.

        Returns:
            Columns `stage`, `global_step` and the metrics (docs/reference/metrics.md), NaN where
            a row has none. Of a run under way, what is there so far.

        Raises:
            UserError: The run has no such stage.
        """
        from pandas import DataFrame

        from rlhf_exp.report.chart import STEP
        from rlhf_exp.report.sweep.gather import logged_metrics

        keys = self._record.keys
        stages = [name for name in keys if name != "eval"]
        if stage is not None and stage not in stages:
            raise UserError(f"{self._label} trains no {stage!r}, only {', '.join(stages)}")
        rows: list[dict[str, object]] = []
        for name in stages if stage is None else [stage]:
            artifact = self._folder.store.lookup(name, keys[name])
            folder = self._folder
            logged = logged_metrics(self._record, name, artifact, folder.store, folder.records)
            rows += [{"stage": name, **row} for row in logged]
        columns = ["stage", STEP, *sorted({name for row in rows for name in row} - {"stage", STEP})]
        return DataFrame(rows, columns=columns)

    def samples(self) -> DataFrame:
        """Return the answers of its evaluation: a row for each answer of each model.

        Returns:
            Columns `part`, `model`, `row` (the prompt's number), `sample`, `prompt`, `text`,
            `tokens`, `finish`, `score`, `kl` and others: the fields of
            `rlhf_exp.evaluation.answers.Answer`. `samples().pivot(index="row", columns="model",
            values="text")` has the models side by side, if there is one answer to each prompt.

        Raises:
            UserError: The run has no evaluation.
        """
        from pandas import DataFrame

        from rlhf_exp.config.evaluation import SAMPLES_FILE
        from rlhf_exp.evaluation.answers import read_answers

        artifact = self._artifacts().get("eval")
        path = None if artifact is None else artifact.file(SAMPLES_FILE)
        if path is None:
            raise UserError(
                f"{self._label} has no evaluation yet; expected stage=eval or stage=pipeline, done"
            )
        return DataFrame([asdict(answer) for answer in read_answers(path)])

    def model(self, stage: str | None = None) -> PreTrainedModel:
        """Return its policy on the processor, in evaluation mode: PPO's, else DPO's, else SFT's.

        Args:
            stage: `sft`, `dpo` or `ppo` for that one.

        Raises:
            UserError: The run has no such model, or its files are damaged.
        """
        from rlhf_exp.models.pretrained import load_causal_lm

        return load_causal_lm(self._model_folder(stage)).eval()

    def tokenizer(self, stage: str | None = None) -> PreTrainedTokenizerBase:
        """Return the tokenizer of its policy, as `model` chooses it."""
        from rlhf_exp.models.pretrained import load_tokenizer

        return load_tokenizer(self._model_folder(stage))

    @property
    def _label(self) -> str:
        return f"{self.name}/{self.key}"

    def _artifacts(self) -> dict[str, Artifact]:
        return self._folder.artifacts_of(self._record, self._label)

    def _model_folder(self, stage: str | None) -> Path:
        artifacts = self._artifacts()
        stages = POLICIES if stage is None else (stage,)
        found = [artifacts[name] for name in stages if name in artifacts and name in POLICIES]
        if not found:
            policies = [name for name in artifacts if name in POLICIES]
            raise UserError(
                f"{self._label} has no {' or '.join(stages)} model, only "
                f"{', '.join(policies) or 'no policy'}"
            )
        found[0].verify(lambda name: name.startswith("model/"))
        return found[0].path / "model"


class Sweep:
    """The runs of a name, or of several: a multirun, a study, or single runs.

    Args:
        name: A name; `NAME:KEY=VALUE,...` for those of its runs with these values.
        outputs: The folder of the results (`output_dir`).

    Raises:
        UserError: There are no such runs; near names are listed.
    """

    def __init__(self, name: str, outputs: str | Path = "outputs") -> None:
        self.name = name
        self._folder = OutputFolder(Path(outputs).absolute())
        self._records = self._folder.select(name)

    def __repr__(self) -> str:
        done = sum(record.status == "done" for record in self._records)
        return f"<Sweep {self.name}: {done} of {len(self._records)} runs done>"

    @property
    def runs(self) -> list[Run]:
        """Its runs, the oldest first."""
        return [Run(f"{one.name}/{one.key}", self._folder.path) for one in self._records]

    @property
    def report(self) -> Path:
        """The page of its runs, written anew."""
        from rlhf_exp.commands.inspect import report

        return Path(report(self._folder.path, [self.name], "page").rstrip("\n"))

    def table(self, kl_budget: float | None = None) -> DataFrame:
        """Return a row for each run, failed ones too, the oldest first.

        Args:
            kl_budget: Nats per answer: the objective is then the highest validation reward within.

        Returns:
            Columns `name`, `key`, `status`, `seed`, each config key that varies, `objective`,
            `seconds`, the final numbers of all stages, `error` and `log`; as `rlhf-exp report NAME
            --csv`, with numbers as numbers.
        """
        import pandas

        from rlhf_exp.commands.inspect import sweep_of
        from rlhf_exp.report.sweep.page import to_table

        sweep = sweep_of(self._folder, self.name, self._records, kl_budget)
        columns, rows = to_table(sweep)
        table = pandas.DataFrame(rows, columns=columns)
        for column in ("seed", *sweep.varied):
            numbers = pandas.to_numeric(table[column], errors="coerce")
            if numbers.notna().all():
                table[column] = numbers
        return table


def _quoted(path: Path) -> str:
    """Return a path as Hydra's grammar takes any text."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


@contextmanager
def _process_kept() -> Iterator[None]:
    """Let a run have the process, and put back afterwards what it sets of it for itself.

    Hydra reads `sys.argv`, holds one global config at a time and takes over the root logger.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from rlhf_exp.redaction import install

    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    hooks = sys.excepthook, threading.excepthook, logging.getLogRecordFactory()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    # A notebook's own `hydra.initialize` would be in the way.
    hydra, hydra_config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    sys.argv = ["rlhf-exp"]
    install()
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
        sys.excepthook, threading.excepthook = hooks[:2]
        logging.setLogRecordFactory(hooks[2])
        for handler in [one for one in root.handlers if one not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, hydra_config
