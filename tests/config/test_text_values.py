"""Text that looks like a number stays text, on every way into a config and out of it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.types import Override

from rlhf_exp.config.compose import compose, from_dict, to_dict
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.overrides import parse_override, sweep_points
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.config.search_space import overrides_between
from rlhf_exp.config.study import Axis
from rlhf_exp.config.text_values import keep_text, literal, override_of
from rlhf_exp.errors import UserError

TYPED = ["2024_01_02", "1e5", "12e4567890123456", "on", "007", "1.0", "1.10", "+5", "nan", "True"]


@pytest.mark.parametrize("text", TYPED)
def test_text_is_taken_as_it_is_typed(text: str) -> None:
    overrides = [f"name={text}", f"++data.revision={text}", f"tracking.tags=[{text},b]"]
    config = compose([*overrides, f"ppo.reward={{name:{text},timeout_s:1e1}}"]).config
    assert (config.name, config.data.revision, config.tracking.tags) == (text, text, [text, "b"])
    assert (config.ppo.reward.name, config.ppo.reward.timeout_s) == (text, 10.0)


def read(override: str) -> object:
    parsed = parse_override(override)
    assert isinstance(parsed, Override)
    return parsed.value()


@pytest.mark.parametrize("text", TYPED)
def test_text_in_a_sweep(text: str) -> None:
    for sweep in ("{0},b", "choice({0},b)", "shuffle({0},b)", "tag(t,choice({0},b))"):
        (override,) = keep_text([f"sft.use={sweep.format(text)}"])
        assert {read(point) for (point,) in sweep_points([override])} == {text, "b"}
    (override,) = keep_text([f"tracking.tags=[{text}],[b]"])
    assert [read(point) for (point,) in sweep_points([override])] == [[text], ["b"]]


def test_null_is_null_and_numbers_stay_numbers() -> None:
    config = compose(
        ["name=null", "ppo.lr=1e-4", "seed=1_0", "study.space=[{key:ppo.lr,low:1e-5}]"]
    )
    assert (config.config.name, config.config.ppo.lr, config.config.seed) == (None, 1e-4, 10)
    assert config.config.study.space == [Axis("ppo.lr", low=1e-5)]
    assert compose(["name='null'"]).config.name == "null"


def test_options_of_groups_are_names(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "2024_01.yaml").write_text("# Dated.\nlr: 0.5\n")
    assert compose(["ppo=2024_01"], [CONF, tmp_path]).config.ppo.lr == 0.5


def test_a_sites_text_is_kept() -> None:
    given = [
        "hydra/launcher=slurm",
        "hydra.launcher.account=1e5",
        "+hydra.launcher.sbatch.nice=1_0",
    ]
    site = compose(given).site
    assert site is not None
    assert (site.account, site.sbatch) == ("1e5", {"nice": "1_0"})


def test_arguments_of_functions_stay_numbers() -> None:
    assert keep_text(["name=range(1,3)", "name=sort(2,1,reverse=true)"]) == [
        "name=range(1,3)",
        "name=sort('2','1',reverse=true)",
    ]


ODD = [
    *TYPED,
    "null",
    "",
    " a ",
    "it's",
    'a "b"',
    "a,b",
    "a=b",
    "[a]",
    "a\\",
    "\\'",
    "${seed}",
    "${",
    "\\${x}",
    "é\n",
]


@pytest.mark.parametrize("text", ODD)
def test_an_override_that_is_written_reads_back(text: str) -> None:
    assert read(override_of("name", text)) == literal(text)
    assert read(override_of("tracking.tags", [text, "b"])) == [literal(text), "b"]


def test_the_command_line_of_a_trial_has_the_texts_of_its_study() -> None:
    before = Config()
    data = replace(before.data, revision="12e4567890123456", path="a (1), ${b}")
    after = replace(before, data=data, tracking=replace(before.tracking, tags=ODD))
    config = compose(overrides_between(before, after)).config
    assert (config.data.revision, config.data.path) == (data.revision, data.path)
    assert config.tracking.tags == ODD


def test_stored_text_reads_back() -> None:
    before = Config()
    for text in ("a${seed}", "\\\\${", "1e5"):
        config = replace(before, name=text, tracking=replace(before.tracking, tags=ODD))
        read_back = from_dict(to_dict(config))
        assert (read_back.name, read_back.tracking.tags) == (text, ODD)


@pytest.mark.parametrize(
    ("yaml", "complaint"),
    [
        ("name: 2024_01_02", r"mine\.yaml:2: name=2024_01_02: YAML reads 20240102; .*'2024_01_02'"),
        ("name: on", "mine.yaml:2: name=on: YAML reads True"),
        ("seed: 1\nsft: {use: 1e5}", r"mine\.yaml:3: sft\.use=1e5: YAML reads 100000\.0"),
        (
            "tracking:\n  tags:\n    - a\n    - 0123",
            r"mine\.yaml:5: tracking\.tags=0123: YAML reads 83",
        ),
        ("data: {revision: 1:30}", "data.revision=1:30: YAML reads 90"),
        ("study:\n  space: [{key: 1e5}]", "study.space.key=1e5"),
        ("hydra: {sweeper: {params: {name: 1_0}}}", r"hydra\.sweeper\.params\.name=1_0"),
    ],
)
def test_a_file_that_needs_quotes_is_refused(tmp_path: Path, yaml: str, complaint: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml}\n")
    with pytest.raises(UserError, match=complaint):
        compose(["experiment=mine"], [CONF, tmp_path])


def test_a_file_whose_text_yaml_leaves_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "name: '1e5'\ndata: {revision: 12}\nppo: {lr: 1e-4}\nsft: {use: null}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    config = compose(["experiment=mine"], [CONF, tmp_path]).config
    assert (config.name, config.data.revision, config.ppo.lr) == ("1e5", "12", 1e-4)
    assert config.sft.use is None
