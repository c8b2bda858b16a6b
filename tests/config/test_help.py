from __future__ import annotations

from rlhf_exp.config.help import REFERENCE_PATH, help_text, reference
from rlhf_exp.config.schema_keys import all_keys


def test_every_key_is_documented() -> None:
    assert [name for name, key in all_keys().items() if not key.doc.endswith(".")] == []


def test_the_reference_is_current() -> None:
    message = "out of date: run python -m rlhf_exp.config.help"
    assert REFERENCE_PATH.read_text(encoding="utf-8") == reference(), message


def test_help_names_every_group_and_section() -> None:
    text = help_text()
    for name in ("model", "tiny", "hydra/launcher", "ppo_grid", "output_dir=outputs", "tracking"):
        assert name in text


def test_help_on_a_section_names_all_below_it() -> None:
    text = help_text("ppo")
    values = [n for n, k in all_keys().items() if n.startswith("ppo.") and k.section is None]
    assert len(values) > 30
    assert [name for name in values if f"  {name}=" not in text] == []
    assert "  reward.lr=" not in text
    assert "recipe" in text


def test_help_on_one_key_is_about_that_key() -> None:
    text = help_text("ppo.clip_range")
    assert "  ppo.clip_range=0.2\n" in text
    assert "clip_range_value" not in text
