from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.toxicity.prompts import (
    ScoredText,
    ToxicityPrompt,
    load_prompts,
    parse_prompt,
    sample_prompts,
)


def row(text: str, toxicity: float | None = 0.25, **other: Any) -> dict[str, Any]:
    return {"filename": "x", "prompt": {"text": text, "toxicity": toxicity, "insult": 0.9}, **other}


def test_a_row_of_the_data_set() -> None:
    after = {"text": " and so on.", "toxicity": None, "threat": 0.1}
    assert parse_prompt(row("Once", 0.5, continuation=after)) == ToxicityPrompt(
        ScoredText("Once", 0.5), ScoredText(" and so on.", None)
    )
    assert parse_prompt({"prompt": "Once"}) == ToxicityPrompt(ScoredText("Once", None), None)


def test_unusable_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        row("fine"),
        row("too toxic", 1.5),
        "no json",
        {"text": "of another kind"},
        row(" "),
        row("not a number", True),
    ]
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    with pytest.raises(UserError) as caught:
        load_prompts(str(path))
    message = str(caught.value).splitlines()
    assert message[0] == f"eval.toxicity.data={path}: 5 of 6 rows are unusable; mend them"
    assert message[1].endswith(":2: prompt.toxicity is 1.5; expected a number from 0 to 1, or null")
    assert message[2].endswith(":3: not JSON: Expecting value at column 1")
    assert ":4: found text; expected" in message[3]
    assert message[4].endswith(":5: the prompt is empty, so there is nothing to continue")
    assert ":6: prompt.toxicity is True" in message[5]


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n"))
    with pytest.raises(UserError, match=r"none\.jsonl\.gz: holds no rows"):
        load_prompts(str(path))


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, revision: str | None) -> dict[str, list[Any]]:
        asked.append((path, revision))
        return {"train": [row("one"), row("two", None)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_prompts("org/set", "abc")
    assert asked == [("org/set", "abc")]
    assert [one.prompt for one in found] == [ScoredText("one", 0.25), ScoredText("two", None)]


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, revision: str | None) -> None:
        raise ConnectionError("no route to host\nfurther lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load_prompts("org/set")
    message = str(caught.value)
    assert message.startswith("eval.toxicity.data=org/set: cannot be loaded from the hub")
    assert "no route to host)" in message
    assert "eval.toxicity.data=prompts.jsonl" in message
    assert "rlhf-exp fetch" in message


ROWS = [ToxicityPrompt(ScoredText(f"text {number}", None), None) for number in range(200)]


def test_the_sample_goes_by_seed_and_not_by_order() -> None:
    drawn = sample_prompts(ROWS, 20, seed=3)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert sample_prompts(shuffled, 20, seed=3) == drawn
    assert sample_prompts(ROWS, 50, seed=3)[:20] == drawn
    assert sample_prompts(ROWS, 20, seed=4) != drawn
    assert drawn != ROWS[:20]


def test_a_sample_holds_no_prompt_twice_and_at_most_all() -> None:
    other = ToxicityPrompt(ScoredText("text 0", 0.9), None)
    drawn = sample_prompts([*ROWS, other], 1000, seed=0)
    assert sorted(drawn, key=ROWS.index) == ROWS


def test_every_row_is_as_likely() -> None:
    """Each of 200 rows is drawn with probability 1/10 in each of 300 samples: 30 times, sd 5.2."""
    counts = dict.fromkeys((one.prompt.text for one in ROWS), 0)
    for seed in range(300):
        for one in sample_prompts(ROWS, 20, seed):
            counts[one.prompt.text] += 1
    assert sum(counts.values()) == 6000
    assert min(counts.values()) > 30 - 4 * 5.2
    assert max(counts.values()) < 30 + 4 * 5.2


def test_the_real_data(shared_data: Path) -> None:
    path = shared_data / "rtp" / "prompts.jsonl.gz"
    found = load_prompts(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    assert [one.prompt.text for one in found] == [one["prompt"]["text"] for one in records]
    for one, record in zip(found, records, strict=True):
        assert one.continuation is not None
        assert one.prompt.toxicity == record["prompt"]["toxicity"]
        assert one.continuation.toxicity == record["continuation"]["toxicity"]
    assert sum(one.prompt.toxicity is None for one in found) == 12
