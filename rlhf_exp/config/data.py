"""`data`: where demonstrations, preferences and prompts come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting


class Source(Enum):
    """Kinds of data sources."""

    toy = "toy"
    hub = "hub"
    jsonl = "jsonl"


class PromptFormat(Enum):
    """How a dialogue becomes text."""

    hh = "hh"
    chat_template = "chat_template"
    plain = "plain"


@dataclass
class ToyConfig:
    """Sizes of the bundled data."""

    seed: int = setting(0, "Seed of the generator.")
    demonstrations: int = setting(4000, "Demonstrations for SFT.")
    preferences: int = setting(4000, "Preference pairs.")
    prompts: int = setting(3000, "Prompts for PPO.")
    validation: int = setting(200, "Validation rows of each kind.")
    test: int = setting(200, "Test rows of each kind.")
    label_noise: float = setting(0.12, "Fraction of preference labels that are flipped.")


@dataclass
class DataConfig:
    """Sources, splits and the prompt format."""

    source: Source = setting(Source.toy, "Kind of source.")
    path: str | None = setting(None, "Hub id of a `hub` source.")
    revision: str | None = setting(None, "Revision of the hub id.")
    preferences: str | None = setting(None, "JSONL(.gz) file of preference pairs.", key=False)
    demonstrations: str | None = setting(
        None, "JSONL(.gz) file of demonstrations; null: prompt and chosen answer.", key=False
    )
    prompts: str | None = setting(
        None, "JSONL(.gz) file of prompts; null: those of the preferences.", key=False
    )
    test: str | None = setting(
        None, "JSONL(.gz) file of held-out pairs; null: split off by prompt.", key=False
    )
    format: PromptFormat = setting(PromptFormat.hh, "How a dialogue becomes text.")
    toy: ToyConfig = setting(factory=ToyConfig, doc="Sizes of the bundled data.")
    validation_fraction: float = setting(0.05, "Share of prompts split off for validation.")
    test_fraction: float = setting(0.05, "Share of prompts split off for test, if no test file.")
    limit: int | None = setting(None, "Use at most this many rows of each file.")
    max_bad_fraction: float = setting(
        0.05, "Stop when more than this share of rows cannot be used.", key=False
    )
