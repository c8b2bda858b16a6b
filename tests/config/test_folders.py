from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_exp.config.compose import compose
from rlhf_exp.config.folders import config_folders
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.errors import UserError


def option(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_conf_comes_first_then_the_users_folders(here: Path) -> None:
    for name in ("conf", "given", "a", "b c"):
        (here / name).mkdir()
    overrides = ["seed=1", f"hydra.searchpath=[file://{here}/a,'b c']"]
    folders, others = config_folders(overrides, here / "given")
    assert folders == [CONF, *(here / name for name in ("given", "a", "b c", "conf"))]
    assert others == ["seed=1"]


def test_a_package_of_configs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option(here / "mine" / "configs", "ppo/bold", "lr: 0.5\n")
    (here / "mine" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(here)])
    folders, _ = config_folders(["hydra.searchpath=[pkg://mine.configs]"])
    assert compose(["ppo=bold"], folders).config.ppo.lr == 0.5


@pytest.mark.parametrize(
    ("search_path", "complaint"),
    [
        ("[file:///nowhere]", "file:///nowhere: there is no such folder"),
        ("[pkg://nowhere.at.all]", "pkg://nowhere.at.all: there is no such package"),
        ("[s3://bucket]", "s3://bucket: expected file://FOLDER or pkg://PACKAGE"),
        ("nowhere", r"expected a list, such as \[file:///my/conf\]"),
    ],
)
def test_a_search_path_that_is_not_there(search_path: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        config_folders([f"hydra.searchpath={search_path}"])


def test_an_option_that_another_would_hide_is_refused(here: Path) -> None:
    file = option(here / "conf", "ppo/default", "lr: 0.5\n")
    folders, _ = config_folders([])
    with pytest.raises(UserError, match=f"{file}: .*conf/ppo/default.yaml has the same name"):
        compose([], folders)
    # One that is not chosen, and one that says the same, do no harm.
    assert compose(["ppo=recipe", "model=pythia_1b"], folders).config.ppo.lr == 8e-6
    file.write_bytes((CONF / "ppo" / "default.yaml").read_bytes())
    assert compose([], folders).config.ppo.lr == compose().config.ppo.lr


def test_a_changed_working_directory_is_refused() -> None:
    message = "hydra.job.chdir=true: relative paths start where the command is given"
    with pytest.raises(UserError, match=message):
        compose(["hydra.job.chdir=true"])
