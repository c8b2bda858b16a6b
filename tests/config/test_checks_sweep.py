from __future__ import annotations

import itertools

from rlhf_exp.config.checks_sweep import check_points
from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.overrides import point_labels, sweep_points
from rlhf_exp.errors import UserError


def compose_config(overrides: object) -> Config:
    assert isinstance(overrides, list)
    return compose(overrides).config


def check_sweep(*overrides: str) -> tuple[int, list[str]]:
    configs, wrong = check_points(sweep_points(["name=a", *overrides]), compose_config)
    return len(configs), wrong


def test_points_without_mistakes() -> None:
    assert check_sweep("ppo.seed=range(0,3)", "ppo.lr=choice(1e-4,3e-4)") == (6, [])


def test_mistakes_of_several_points_are_told_together_and_where() -> None:
    count, wrong = check_sweep("ppo.lr=1e-4,0", "ppo.kl.coef=0.1,-1")
    assert count == 4
    assert sorted(wrong) == [
        "ppo.kl.coef=-1.0: must be at least 0. (2 of 4 points: all with ppo.kl.coef=-1)",
        "ppo.lr=0.0: must be a number above 0. (2 of 4 points: all with ppo.lr=0)",
    ]


def test_a_mistake_of_all_points_is_told_once() -> None:
    assert check_sweep("ppo.lr=0", "ppo.seed=0,1")[1] == ["ppo.lr=0.0: must be a number above 0."]


def test_what_only_a_combination_does_wrong_names_the_points() -> None:
    def fails(overrides: object) -> Config:
        assert isinstance(overrides, list)
        # Wrong where both are b or both are c; neither value alone is the cause.
        if overrides[1].partition("=")[2] == overrides[2].partition("=")[2]:
            raise UserError("two of a kind")
        return compose_config(["name=a"])

    listed = [["name=a", f"x={x}", f"y={y}"] for x, y in itertools.product("bc", "bc")]
    configs, (wrong,) = check_points(listed, fails)
    assert len(configs) == 2
    assert wrong == "two of a kind (2 of 4 points: x=b y=b; x=c y=c)"


def test_a_point_that_cannot_be_composed_does_not_hide_the_others() -> None:
    count, wrong = check_sweep(r"ppo.lr='${ppo.oops}',0,1e-4")
    assert count == 2
    assert len(wrong) == 2
    assert "ppo.oops" in wrong[0]
    assert wrong[1] == "ppo.lr=0.0: must be a number above 0. (1 of 3 points: all with ppo.lr=0)"


def test_many_points_are_not_all_named() -> None:
    def fails(overrides: object) -> Config:
        assert isinstance(overrides, list)
        if overrides[1][2:] != overrides[2][2:]:
            raise UserError("odd")
        return compose_config(["name=a"])

    listed = [["name=a", f"x={x}", f"y={y}"] for x, y in itertools.product("bcd", "bcd")]
    wrong = check_points(listed, fails)[1]
    assert wrong == ["odd (6 of 9 points: x=b y=c; x=b y=d; x=c y=b; and 3 more)"]


def test_differences() -> None:
    assert point_labels([]) == []
    assert point_labels([["name=a", "x=1"]]) == [""]
    assert point_labels([["name=a", "x=1"], ["name=a", "x=2"]]) == ["x=1", "x=2"]
