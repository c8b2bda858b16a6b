"""The data of an experiment: what is said of rows that were not used as they stand."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rlhf_exp.config.experiment import DataConfig, DataSource, PromptFormat
from rlhf_exp.stages.data_module import DataModule


def module(folder: Path, records: list[dict[str, str]], **fields: object) -> DataModule:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    config = DataConfig(source=DataSource.jsonl, preferences=str(path))
    for name, value in {"test_fraction": 0.0, "validation_fraction": 0.0, **fields}.items():
        setattr(config, name, value)
    return DataModule(config)


def pairs(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"q {n}", "chosen": f"Assistant: {n}", "rejected": "no"} for n in range(count)
    ]


def test_rows_that_were_normalised_or_left_out_are_said_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = module(tmp_path, [*pairs(30), {"prompt": "q", "chosen": "", "rejected": ""}])
    with caplog.at_level(logging.WARNING):
        facts = data.facts()
    cues = "30: a cue (`Assistant:`) at the start of a response taken off"
    assert facts == {"rejected": 1, "dropped": 0, "data": cues}
    assert cues in caplog.text
    assert "pairs.jsonl:31: both responses are empty" in caplog.text


def test_only_hh_takes_pairs_that_part_early(tmp_path: Path) -> None:
    early = {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
        "rejected": "\n\nHuman: q\n\nAssistant: d",
    }
    for prompt_format, unusable in ((PromptFormat.hh, 0), (PromptFormat.chat_template, 1)):
        data = module(tmp_path, [early, *pairs(30)], format=prompt_format)
        assert len(data.corpus.unusable) == unusable
