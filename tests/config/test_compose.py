from __future__ import annotations

import json

import pytest
import yaml

from rlhf_exp.config.compose import compose, from_dict, to_dict, to_yaml, unknown_keys
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.errors import UserError


def test_a_stored_config_comes_back() -> None:
    config = compose(["experiment=hh_20b", "seed=3", "ppo.kl.target=null", "rerun=[ppo]"]).config
    stored = json.loads(json.dumps(to_dict(config)))
    assert stored["model"]["architecture"]["type"] == "gpt_neox"
    assert stored["ppo"]["seed"] == 3
    assert from_dict(stored) == config
    assert unknown_keys(stored) == []


def test_yaml_is_the_same_content() -> None:
    config = compose(["stage=ppo"]).config
    assert yaml.safe_load(to_yaml(config))["stage"] == "ppo"
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_a_config_of_another_version_loads() -> None:
    stored = {"stage": "ppo", "seed": 9, "old": 1, "ppo": {"lr": 0.5, "gone": {"a": 1}, "kl": 3}}
    config = from_dict(stored)
    assert (config.stage, config.ppo.lr, config.ppo.seed) == (StageName.ppo, 0.5, 9)
    assert config.ppo.kl == Config().ppo.kl
    assert unknown_keys(stored) == ["old", "ppo.gone", "ppo.kl"]


def test_a_value_that_is_no_longer_valid() -> None:
    with pytest.raises(UserError, match=r"stored config, ppo\.select: .*median"):
        from_dict({"ppo": {"select": "median"}})
