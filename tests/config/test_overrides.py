from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.config.compose import compose
from rlhf_exp.config.overrides import MAX_POINTS, override_problems, prepare, sweep_points
from rlhf_exp.config.schema_keys import CONF, read_groups
from rlhf_exp.errors import UserError

GROUPS = read_groups()


def complaints(*overrides: str) -> list[str]:
    return [str(problem) for problem in override_problems(overrides, GROUPS)]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("ppo.lrr=1", "ppo.lrr=1: there is no such key. Did you mean ppo.lr"),
        ("+ppo.lrr=1", "ppo.lrr=1: there is no such key. Did you mean ppo.lr"),
        ("++ppo.lrr=1", "ppo.lrr=1: there is no such key. Did you mean ppo.lr"),
        ("lr=1", "lr=1: there is no such key. Did you mean sft.lr or reward.lr or dpo.lr?"),
        ("modle=tiny", "modle=tiny: there is no such key. Did you mean model?"),
        ("zzz=1", "zzz=1: there is no such key."),
        ("model=tinny", "model=tinny: there is no such option. Did you mean tiny? The options: "),
        ("distributed=zero2_bf61", "no such option. Did you mean zero2_bf16"),
        ("+ppo.lr=1", "+ppo.lr=1: the key exists: write ppo.lr=1 without the +."),
        ("+experiment=demo", "the group exists: write experiment=demo without the +."),
        ("~ppo.lr", "~ppo.lr=: a key cannot be removed"),
        ("ppo.lr=abc", "ppo.lr=abc: expected number."),
        ("ppo.steps=1.5", "ppo.steps=1.5: expected integer."),
        ("ppo.steps=null", "ppo.steps=null: expected integer."),
        ("sft.steps=many", "sft.steps=many: expected integer or null."),
        ("plan=maybe", "plan=maybe: expected true|false."),
        ("ppo.betas=[1,x]", "expected [number,...]."),
        ("ppo.kl=3", "ppo.kl=3: this is a section; set the keys in it, such as ppo.kl.coef."),
        ("ppo.kl={coef:1,foo:2}", "ppo.kl.foo={coef:1,foo:2}: there is no such key."),
        ("ppo.select=bets", "ppo.select=bets: expected one of best, last."),
        ("cache=trus", "cache=trus: expected one of trust, strict."),
        ("ppo.lr", "ppo.lr=: expected key=value."),
        ("ppo.lr=[1", "ppo.lr=[1: cannot be read"),
        ("ppo.lr=1e-4,b", "ppo.lr=b: expected number."),
        ("model=tiny,tinny", "model=tinny: there is no such option."),
        ("eval=null", "eval=null: the group needs an option. eval=none evaluates nothing."),
        ("tracking=null", "tracking=disabled records nothing at W&B."),
        ("engine=null", "engine=native is the default."),
        ("stage=null", "stage=null: the group needs an option. The options: "),
        ("model=tiny,null", "model=null: the group needs an option."),
        ("experiment=demo,null", "experiment=null: the group needs an option."),
        ("~eval", "~eval=: the group needs an option."),
        ("hydra/launcher=null", "hydra/launcher=null: the group needs an option."),
        ("hydra/sweeper=null", "hydra/sweeper=null: a group needs an option."),
        ("rerun=null", "rerun=null: expected [text,...]."),
        ("ppo.kl=null", "ppo.kl=null: this is a section"),
        ("ppo.kl=${seed}", "ppo.kl=${seed}: this is a section"),
        (f"seed={'9' * 5000}", "cannot be read (Exceeds the limit"),
        (f"ppo.betas={'[' * 5000}", "cannot be read ("),
        ("experiment=dmo", "experiment=dmo: there is no such option. Did you mean demo? The"),
        ("hydra/launcher=submitit_slurm", "this project's own launcher is hydra/launcher=slurm."),
        (
            "hydra/launcher=slrum",
            "Did you mean slurm? The options: joblib, local, parallel, slurm.",
        ),
        ("hydra/launcher=local,slurm", "a multirun has one value of it; give one."),
        ("model=glob(tinny*)", "model=glob(tinny*): matches no option. The options: gpt_neox_20b"),
        ("ppo.lr=glob(*)", "ppo.lr=glob(*): glob chooses options of a group; list the values"),
        ("eval.models=choice(sft,ppo)", "eval.models=sft: expected [text,...]."),
    ],
)
def test_one_mistake_one_complaint(override: str, complaint: str) -> None:
    message, *_ = complaints(override)
    assert complaint in message


def test_all_mistakes_are_reported_together() -> None:
    assert len(complaints("ppo.lrr=1", "model=tinny", "ppo.lr=abc", "sft.lr=1e-3")) == 3


@pytest.mark.parametrize(
    "override",
    [
        "ppo.lr=1e-4",
        "++ppo.lr=1e-4",
        "ppo.lr=1e-4,3e-4",
        "ppo.seed=range(0,3)",
        "ppo.lr=interval(1e-5,1e-3)",
        "ppo.seed=${seed}",
        "sft.steps=null",
        "ppo.reward.function=rewards.py:score",
        "ppo.kl={coef:0.1,target:null}",
        "experiment=null",
        "~experiment",
        "model=tiny,pythia_160m",
        "hydra.verbose=true",
        "hydra/launcher=slurm",
        "stage=ppo",
    ],
)
def test_valid_overrides(override: str) -> None:
    assert complaints(override) == []


def test_a_list_key_takes_a_plain_value() -> None:
    overrides = ["rerun=ppo", "tracking.tags=a,b", "rerun=[sft]", "ppo.lr=1", "rerun="]
    expected = ["rerun=[ppo]", "tracking.tags=[a,b]", "rerun=[sft]", "ppo.lr=1", "rerun="]
    assert prepare(overrides, GROUPS) == expected
    assert prepare(["eval.models=choice([sft],[ppo])"], GROUPS) == [
        "eval.models=choice([sft],[ppo])"
    ]


def test_points_are_the_product_and_the_last_value_of_a_key_counts() -> None:
    assert sweep_points(["ppo.lr=1,2", "seed=3", "ppo.seed=0,1", "seed=4"]) == [
        ["ppo.lr=1", "seed=4", "ppo.seed=0"],
        ["ppo.lr=1", "seed=4", "ppo.seed=1"],
        ["ppo.lr=2", "seed=4", "ppo.seed=0"],
        ["ppo.lr=2", "seed=4", "ppo.seed=1"],
    ]
    with pytest.raises(UserError, match="only a search has intervals"):
        sweep_points(["ppo.lr=interval(0,1)"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ppo:\n  lrr: 1\n", r"mine.*ppo\.lrr: there is no such key\. Did you mean ppo\.lr"),
        ("ppo:\n  lr: fast\n", r"mine.*ppo\.lr: expected number"),
        ("defaults:\n  - override /model: tinny\n", r"model=tinny: .* Did you mean tiny\?"),
        ("ppo: [1\n", "mine.yaml"),
        ("ppo:\n  seed: ${sed}\n", "ppo.seed: Interpolation key 'sed' not found"),
    ],
)
def test_mistakes_in_a_yaml_file_of_the_users(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(UserError, match=f"(?s){complaint}"):
        compose(["experiment=mine"], [CONF, tmp_path])


def test_null_for_a_group_without_a_default_chooses_nothing() -> None:
    assert prepare(["experiment=null", "seed=1", "sft.steps=null"], GROUPS) == [
        "seed=1",
        "sft.steps=null",
    ]


@pytest.mark.parametrize(
    ("glob", "options"),
    [
        ("glob(pythia*)", ["pythia_160m", "pythia_1b", "pythia_6_9b"]),
        ("glob([g*,t*],exclude=gptj*)", ["gpt_neox_20b", "tiny"]),
        ("glob(include=*,exclude=[*_*])", ["tiny"]),
    ],
)
def test_a_glob_is_the_choice_of_what_it_matches(glob: str, options: list[str]) -> None:
    prepared = prepare([f"model={glob}"], GROUPS)
    assert complaints(*prepared) == []
    assert sweep_points(prepared) == [[f"model={option}"] for option in options]


@pytest.mark.parametrize(
    ("sweep", "complaint"),
    [
        ("ppo.seed=range(5,1)", "has no value; the end of a range is not in it"),
        ("ppo.seed=range(0,5,0)", "cannot be counted up"),
        ("ppo.lr=range(0,1,0.0)", "cannot be counted up"),
        ("ppo.seed=range(0,1000000000)", "has more than 10000 values"),
    ],
)
def test_sweeps_that_cannot_be_run(sweep: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        sweep_points([sweep])
    with pytest.raises(UserError, match="the sweep has 10201 points"):
        sweep_points(["ppo.seed=range(0,101)", "sft.seed=range(0,101)"])
    assert len(sweep_points([f"ppo.seed=range(0,{MAX_POINTS})"])) == MAX_POINTS


def test_a_further_folder_adds_options(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "bold.yaml").write_text("# Large steps.\nlr: 0.5\n")
    assert read_groups([CONF, tmp_path])["ppo"].options["bold"] == "Large steps."
    assert compose(["ppo=bold"], [CONF, tmp_path]).config.ppo.lr == 0.5
