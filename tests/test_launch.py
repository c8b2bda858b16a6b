from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.errors import UserError
from rlhf_exp.hydra_app import main

LAUNCH = Path(__file__).parents[1] / "launch.py"


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCH), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


class Pipeline:
    """Stands in for `rlhf_exp.experiment`: notes what it is asked to run."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.overrides: list[list[str]] = []
        self.behaviour: Callable[[], float | None] = lambda: None

    def run(self, config: Config, overrides: list[str]) -> float | None:
        self.configs.append(config)
        self.overrides.append(overrides)
        return self.behaviour()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    stand_in, module = Pipeline(), ModuleType("rlhf_exp.experiment")
    module.UNNAMED = "unnamed"  # type: ignore[attr-defined]
    module.run = stand_in.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_exp.experiment", module)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_help_from_any_folder(tmp_path: Path) -> None:
    ended = launch(tmp_path, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "hh_gptj_6b" in ended.stdout
    ended = launch(tmp_path, "--help", "ppo.kl")
    assert "ppo.kl.target=6.0" in ended.stdout
    assert "ppo.lr" not in ended.stdout
    ended = launch(tmp_path, "--help", "pppo")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: --help pppo: there is no such group or key. Did you")


def test_cfg_shows_the_whole_config(tmp_path: Path) -> None:
    ended = launch(tmp_path, "experiment=smoke", "ppo.lr=0.5", "--cfg", "job")
    assert (ended.returncode, ended.stderr) == (0, "")
    shown = yaml.safe_load(ended.stdout)
    assert shown["ppo"]["lr"] == 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ppo.lrr=1", "error: ppo.lrr=1: there is no such key. Did you mean ppo.lr"),
        ("ppo.lr=0 data.limit=0", "error: 2 problems in the config:\n  data.limit=0: "),
        ("-m ppo.lr=1,2", "error: name=null: a multirun needs a name"),
        ("-m name=a ppo.lr=1,0", "error: ppo.lr=0.0: must be a number above 0. (1 of 2 points"),
        ("-m name=a ppo.lr=1,0 ppo.gamma=1,2", "error: 2 problems in the config:\n  ppo.gamma=2"),
        ("ppo.lr=1e-4,1e-3", "error: ppo.lr=1e-4,1e-3: several values need -m"),
        ("-m name=a ppo.lr=interval(1,2)", "error: ppo.lr=interval(1,2): only a search has"),
        ("-m name=a study.trials=2", "error: study.space=[]: is empty"),
        ("study.trials=2 ppo.lr=1e-4,1e-3", "error: study.trials=2: a study is a multirun"),
        ("hydra/launcher=slrum", "error: hydra/launcher=slrum: there is no such option."),
        ("hydra.foo=1", "error: hydra.foo: Key 'foo' not in 'HydraConf'"),
        ("--config-name other", "error: --config-path and --config-name: add a folder"),
        ("--config-dir nowhere", "error: --config-dir: there is no folder /"),
        ("hydra.searchpath=[file:///nowhere]", "error: hydra.searchpath: file:///nowhere: there"),
        ("--experimental-rerun a.pickle", "error: --experimental-rerun: give the run's own"),
        ("hydra/sweeper=optuna", "error: hydra/sweeper=optuna: a search is sweep=ppo_optuna"),
        ("hydra.job.chdir=true", "error: hydra.job.chdir=true: relative paths start where"),
        ("eval=null", "error: eval=null: the group needs an option. eval=none"),
        ("experiment=glob(*)", "error: experiment=choice(arithmetic,demo,hh_125m,"),
        ("eval.judge.criterion=a,b", "quoted twice: eval.judge.criterion=\\'...\\'."),
    ],
)
def test_mistakes_end_with_2_and_a_short_message(
    arguments: str, message: str, tmp_path: Path
) -> None:
    ended = launch(tmp_path, *arguments.split())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written before everything is checked"


def test_an_argument_that_is_no_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    """As the system hands over a file's name in Latin-1."""
    assert main(["data.path=caf\udce9.jsonl"]) == 2
    assert r"'data.path=caf\udce9.jsonl': holds bytes that are no UTF-8" in capsys.readouterr().err


def test_one_run(pipeline: Pipeline, tmp_path: Path) -> None:
    assert main(["stage=ppo", "rerun=ppo", "output_dir=results"]) == 0
    (config,) = pipeline.configs
    assert isinstance(config, Config)
    assert (config.stage, config.rerun) == (StageName.ppo, ["ppo"])
    assert pipeline.overrides == [["stage=ppo", "rerun=[ppo]", "output_dir=results"]]
    assert Path.cwd() == tmp_path
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["hydra"]
    assert list(tmp_path.iterdir()) == [tmp_path / "results"]


def test_a_multirun(pipeline: Pipeline) -> None:
    # Flags between overrides: Hydra alone takes them only before or after.
    assert main(["name=a", "-m", "ppo.lr=1e-4,1e-3", "seed=0,1"]) == 0
    assert [(c.ppo.lr, c.ppo.seed) for c in pipeline.configs] == [
        (1e-4, 0),
        (1e-4, 1),
        (1e-3, 0),
        (1e-3, 1),
    ]


def test_a_sweep_that_is_a_multirun_by_itself(pipeline: Pipeline) -> None:
    assert main(["sweep=ppo_grid", "ppo.lr=1e-4", "ppo.kl.coef=0.3"]) == 0
    assert [(c.name, c.ppo.lr, c.ppo.kl.coef, c.ppo.seed) for c in pipeline.configs] == [
        ("ppo_grid", 1e-4, 0.3, 0),
        ("ppo_grid", 1e-4, 0.3, 1),
    ]


@pytest.mark.parametrize(
    ("folder", "given"),
    [
        ("mine", ["--config-dir", "mine"]),
        ("mine", ["hydra.searchpath=[file://mine]"]),
        ("conf", []),
    ],
)
def test_an_option_of_the_users_own(
    pipeline: Pipeline, tmp_path: Path, folder: str, given: list[str]
) -> None:
    (tmp_path / folder / "ppo").mkdir(parents=True)
    (tmp_path / folder / "ppo" / "bold.yaml").write_text("lr: 0.5\n")
    assert main([*given, "ppo=bold"]) == 0
    assert pipeline.configs[0].ppo.lr == 0.5


def test_a_config_of_the_users_own_is_not_read_and_the_run_says_so(
    pipeline: Pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 5\n")
    assert main(["seed=3"]) == 0
    assert pipeline.configs[0].seed == 3
    assert f"note: {tmp_path}/conf/config.yaml is not read; write" in capfd.readouterr().err


def test_help_with_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "ppo").mkdir(parents=True)
    (tmp_path / "mine" / "ppo" / "bold.yaml").write_text("# Large steps.\nlr: 0.5\n")
    assert main(["--config-dir", "mine", "ppo=bold", "--help", "ppo"]) == 0
    shown = capsys.readouterr().out
    assert "  * bold            Large steps." in shown.replace("   * ", "  * ")
    assert "  ppo.lr=0.5\n" in shown
    assert main(["experiment=dmo", "--help"]) == 2
    assert "Did you mean demo?" in capsys.readouterr().err


def test_tab_completion(tmp_path: Path) -> None:
    assert "complete -o nospace" in launch(tmp_path, "-sc", "install=bash").stdout


def test_sweeps_of_options_and_texts(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    sweep = 'hydra: {sweeper: {params: {data.revision: "1e5,choice_"}}}\n'
    text = f"# @package _global_\n{sweep}data: {{source: hub, path: a/b}}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    given = ["-m", "name=2024_01_02", "stage=sft", "experiment=mine", "model=glob(pythia_1?)"]
    assert main([*given, "tracking.tags=choice([1e5])"]) == 0
    found = [(c.name, c.model.name, c.data.revision, c.tracking.tags) for c in pipeline.configs]
    assert found == [
        ("2024_01_02", "pythia_1b", "1e5", ["1e5"]),
        ("2024_01_02", "pythia_1b", "choice_", ["1e5"]),
    ]


def test_the_earlier_name_of_a_launcher(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["hydra/launcher=joblib", "stage=sft"]) == 0
    assert "note: hydra/launcher=joblib is called `parallel` now" in capfd.readouterr().err


def test_an_error_of_the_users_while_running(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise UserError("data.jsonl:17: not JSON")

    pipeline.behaviour = refuse
    assert main([]) == 2
    assert capfd.readouterr().err == "error: data.jsonl:17: not JSON\n"


def test_an_error_of_the_users_in_one_point_of_a_multirun(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse_one() -> float:
        if pipeline.configs[-1].ppo.seed == 0:
            raise UserError("data.jsonl:17: not JSON")
        return 0.5

    pipeline.behaviour = refuse_one
    assert main(["-m", "name=a", "ppo.seed=0,1"]) == 1
    assert len(pipeline.configs) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2].startswith("error: 1 of 2 points failed; the same command runs what")
    assert lines[-1] == "  ppo.seed=0: data.jsonl:17: not JSON"


def test_ctrl_c(pipeline: Pipeline) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    pipeline.behaviour = interrupt
    assert main([]) == 130


def test_a_bug_keeps_its_traceback(pipeline: Pipeline) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    pipeline.behaviour = fail
    with pytest.raises(ZeroDivisionError):
        main([])


def test_arguments_of_the_process_are_left_for_hydra(pipeline: Pipeline) -> None:
    assert main(["stage=sft"]) == 0
    assert sys.argv == ["launch.py", "stage=sft"]
