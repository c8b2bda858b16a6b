"""Every source: its rows, its splits, and what it does with bad rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_exp.data.rows import Corpus, Prompt, Turn, prompt_key
from rlhf_exp.data.sources import LoadOptions, load_hub, load_jsonl, load_toy
from rlhf_exp.errors import UserError

SMALL_TOY: dict[str, Any] = {
    "demonstrations": 300,
    "preferences": 300,
    "prompts": 300,
    "validation": 50,
    "test": 50,
}


def pair(n: int) -> dict[str, str]:
    return {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}


def write(path: Path, records: list[Any]) -> Path:
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def jsonl_corpus(folder: Path) -> Corpus:
    return load_jsonl(preferences=write(folder / "pairs.jsonl", [pair(n) for n in range(300)]))


def jsonl_corpus_with_test(folder: Path) -> Corpus:
    train = write(folder / "train.jsonl.gz", [pair(n) for n in range(300)])
    return load_jsonl(
        preferences=train, test=write(folder / "t.jsonl", [pair(n) for n in range(5)])
    )


def hub_corpus(folder: Path) -> Corpus:
    write(folder / "train.jsonl", [pair(n) for n in range(300)])
    write(folder / "test.jsonl", [pair(n) for n in range(295, 320)])
    return load_hub(str(folder))


def toy_corpus(folder: Path) -> Corpus:
    return load_toy(0, **SMALL_TOY)


@pytest.mark.parametrize("load", [toy_corpus, jsonl_corpus, jsonl_corpus_with_test, hub_corpus])
def test_splits_share_no_prompt(load: Callable[[Path], Corpus], tmp_path: Path) -> None:
    corpus = load(tmp_path)
    kinds = (corpus.demonstrations, corpus.preferences, corpus.prompts)
    keys = {
        name: {prompt_key(row.history) for kind in kinds for row in getattr(kind, name)}
        for name in ("train", "validation", "test")
    }
    assert all(keys.values())
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]


@pytest.mark.parametrize("load", [toy_corpus, jsonl_corpus])
def test_the_digest_is_of_the_content(load: Callable[[Path], Corpus], tmp_path: Path) -> None:
    corpus = load(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert load(tmp_path / "elsewhere").digest == corpus.digest
    assert load_toy(1, **SMALL_TOY).digest != corpus.digest


def test_pairs_serve_as_demonstrations_and_prompts(tmp_path: Path) -> None:
    corpus = load_jsonl(
        preferences=write(tmp_path / "a.jsonl", [pair(1), {**pair(1), "chosen": ""}, pair(2)]),
        options=LoadOptions(validation_fraction=0, test_fraction=0),
    )
    assert [row.chosen for row in corpus.preferences.train] == ["good 1", "", "good 2"]
    # An empty response is nothing to imitate; each prompt is asked once.
    assert [row.response for row in corpus.demonstrations.train] == ["good 1", "good 2"]
    assert [row.original for row in corpus.prompts.train] == ["good 1", "good 2"]
    assert corpus.preferences.train[2].origin == f"{tmp_path / 'a.jsonl'}:3"


def test_rows_given_for_a_kind_replace_those_made_of_pairs(tmp_path: Path) -> None:
    corpus = load_jsonl(
        preferences=write(tmp_path / "a.jsonl", [pair(1), pair(2)]),
        demonstrations=write(tmp_path / "b.jsonl", [{"prompt": "p", "response": "r"}]),
        prompts=[
            write(tmp_path / "c.jsonl", [{"prompt": "p2"}]),
            write(tmp_path / "d.jsonl", [{"prompt": "p3", "response": "r3"}]),
        ],
        options=LoadOptions(validation_fraction=0, test_fraction=0),
    )
    assert [row.response for row in corpus.demonstrations.train] == ["r"]
    assert [row.original for row in corpus.prompts.train] == [None, "r3"]
    assert len(corpus.preferences.train) == 2


def counted(corpus: Corpus, words: str) -> int:
    """Return the number that the corpus has counted under a reason with these words."""
    (number,) = [number for reason, number in corpus.counts.items() if words in reason]
    return number


def test_training_rows_whose_prompt_is_tested_are_dropped_and_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [pair(1), {**pair(2), "chosen": "x"}, pair(2), pair(3)])
    test = write(tmp_path / "b.jsonl", [{"prompt": "question 2"}])
    corpus = load_jsonl(preferences=train, test=test, options=LoadOptions(validation_fraction=0))
    assert [row.chosen for row in corpus.preferences.train] == ["good 1", "good 3"]
    assert corpus.dropped == counted(corpus, "their prompt is a test prompt") == 2
    assert corpus.prompts.test == [Prompt((Turn("human", "question 2"),), None, f"{test}:1")]


def test_prompts_that_differ_in_anything_are_different_prompts(tmp_path: Path) -> None:
    texts = ["What is x\u00b2?", "What is x2?", "what is x2?", "What is  x2?"]
    pairs = [{**pair(n), "prompt": text} for n, text in enumerate([*texts, texts[0], "Why?"])]
    none_held_out = LoadOptions(validation_fraction=0, test_fraction=0)
    train = write(tmp_path / "a.jsonl", pairs)
    corpus = load_jsonl(preferences=train, options=none_held_out)
    assert [row.history[0].text for row in corpus.prompts.train] == [*texts, "Why?"]
    assert corpus.counts == {"rows with the prompt of another row: each prompt is asked once": 1}
    test = write(tmp_path / "b.jsonl", [pair(0) | {"prompt": texts[1]}])
    corpus = load_jsonl(preferences=train, test=test, options=LoadOptions(validation_fraction=0.5))
    trained = [row.history[0].text for row in corpus.preferences.train]
    assert trained == [texts[0], texts[2], texts[3], texts[0], "Why?"]
    assert (corpus.dropped, len(corpus.preferences.test)) == (1, 1)
    assert counted(corpus, "differs from a test prompt in case, white space") == 4


def test_near_copies_are_held_out_together(tmp_path: Path) -> None:
    texts = [f"What is x\u00b2 + {n}?" for n in range(60)] + [
        f"what is x2 + {n}?" for n in range(60)
    ]
    pairs = [{**pair(n), "prompt": text} for n, text in enumerate(texts)]
    corpus = load_jsonl(
        preferences=write(tmp_path / "a.jsonl", pairs),
        options=LoadOptions(validation_fraction=0.3, test_fraction=0.3),
    )
    numbers = [
        sorted(int(row.chosen.removeprefix("good ")) for row in rows)
        for _, rows in corpus.preferences.all()
    ]
    assert all(numbers)
    for split in numbers:
        assert {number % 60 for number in split} == {number for number in split if number < 60}
        assert len(split) == 2 * len({number % 60 for number in split})


def test_every_row_is_a_test_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(7)])
    corpus = load_jsonl(preferences=path, test=path)
    assert len(corpus.prompts.test) == 7, "an evaluation needs no more"
    message = corpus.left_out
    assert message.startswith("data.preferences: all 7 rows are left out, because their prompts")
    assert "test prompts, those of data.test" in message
    # One of several inputs that lose all their rows: its place is not taken by another.
    own = write(tmp_path / "b.jsonl", [{"prompt": "question 1", "response": "yes"}])
    test = write(tmp_path / "c.jsonl", [pair(1)])
    corpus = load_jsonl(preferences=path, demonstrations=own, test=test)
    assert corpus.left_out.startswith("data.demonstrations: all 1 rows are left out")


def test_no_usable_row_in_one_of_several_inputs(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", [pair(n) for n in range(99)])
    bad = write(tmp_path / "b.jsonl", [{"prompt": "p", "response": ""}])
    for name in ("demonstrations", "test"):
        with pytest.raises(
            UserError, match=rf"data\.{name}: no usable row to \w+ on \(1 of 1 .*\n.*empty"
        ):
            load_jsonl(preferences=good, **{name: bad})


def test_every_row_of_a_kind_is_held_out(tmp_path: Path) -> None:
    prompts = [f"question {n}" for n in range(40)]
    lowest = min(prompts, key=lambda prompt: prompt_key((Turn("human", prompt),)))
    own = write(tmp_path / "b.jsonl", [{"prompt": lowest, "response": "yes"}])
    pairs = write(tmp_path / "a.jsonl", [pair(n) for n in range(40)])
    with pytest.raises(UserError, match="all 1 demonstrations are held out for validation or test"):
        load_jsonl(preferences=pairs, demonstrations=own)


def dialogue(*texts: str) -> str:
    return "".join(
        f"\n\n{'Assistant' if number % 2 else 'Human'}: {text}" for number, text in enumerate(texts)
    )


def test_responses_with_turns_of_their_own(tmp_path: Path) -> None:
    early = {"chosen": dialogue("q", "a", "b", "c"), "rejected": dialogue("q", "d")}
    path = write(tmp_path / "a.jsonl", [early, *(pair(n) for n in range(20))])
    none_held_out = LoadOptions(validation_fraction=0, test_fraction=0)
    corpus = load_jsonl(preferences=path, options=none_held_out)
    # The whole rest was judged; what is imitated, and what a sample is compared with, is one turn.
    assert corpus.preferences.train[0].chosen == "a\n\nHuman: b\n\nAssistant: c"
    assert corpus.demonstrations.train[0].response == corpus.prompts.train[0].original == "a"
    assert counted(corpus, "cut before a turn of its own") == 1
    single = replace(none_held_out, turns_in_responses=False)
    corpus = load_jsonl(preferences=path, options=single)
    assert [row.origin for row in corpus.unusable] == [f"{path}:1"]
    assert "`chosen` goes on with turns of its own" in corpus.unusable[0].reason


def test_a_file_whose_responses_are_whole_texts(tmp_path: Path) -> None:
    stories = [f"The {n}th tale begins" for n in range(12)]
    rows = [{"prompt": text, "response": f"{text} and ends."} for text in stories]
    none_held_out = LoadOptions(validation_fraction=0, test_fraction=0)
    path = write(tmp_path / "a.jsonl", rows)
    corpus = load_jsonl(demonstrations=path, options=none_held_out)
    assert {row.response for row in corpus.demonstrations.train} == {"and ends."}
    assert counted(corpus, "prompt repeated at the start of a response taken off") == 12
    # Where most do not, those that do mean it.
    mixed = write(tmp_path / "b.jsonl", [*rows[:3], *({**row, "response": "Yes"} for row in rows)])
    corpus = load_jsonl(demonstrations=mixed, options=none_held_out)
    assert corpus.demonstrations.train[0].response == f"{stories[0]} and ends."
    greetings = [{"prompt": "Hi", "response": "Hi there!"}] * 30
    corpus = load_jsonl(
        demonstrations=write(tmp_path / "c.jsonl", greetings), options=none_held_out
    )
    assert corpus.demonstrations.train[0].response == "Hi there!"


def test_limit_counts_rows_of_each_file(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", [pair(10 * n + k) for k in range(9)]) for n in (1, 2)]
    options = LoadOptions(limit=3, validation_fraction=0, test_fraction=0)
    assert len(load_jsonl(preferences=files, options=options).preferences.train) == 6


def test_bad_rows_are_listed_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(pair(n)).encode() for n in range(40)]
    lines[16] = b'{"prompt": "x", "chosen'
    lines[20] = b"\xff\xfe"
    path.write_bytes(b"\n\n".join(lines))
    corpus = load_jsonl(preferences=path, options=LoadOptions(max_bad_fraction=0.05))
    # Blank lines are skipped but counted: row 16 stands on line 33, row 20 on line 41.
    assert [row.origin for row in corpus.unusable] == [f"{path}:33", f"{path}:41"]
    assert corpus.unusable[0].reason.startswith("not JSON")
    assert corpus.unusable[1].reason.startswith("not UTF-8")


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(20)] + [{"prompt": "x"}] * 8)
    with pytest.raises(UserError) as error:
        load_jsonl(preferences=path)
    message = str(error.value)
    assert "8 of 28 rows" in message
    assert f"{path}:21: `chosen` and `rejected` expected, found a prompt" in message
    assert "and 3 more" in message
    assert "max_bad_fraction" in message


def test_not_json_on_line_17_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(16)])
    path.write_text(path.read_text() + "oops\n")
    with pytest.raises(UserError, match=r"a\.jsonl:17: not JSON"):
        load_jsonl(preferences=path, options=LoadOptions(max_bad_fraction=0))


def test_no_usable_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "y"}])
    with pytest.raises(UserError, match=r"no usable row.*\n.*a\.jsonl:1: .*identical"):
        load_jsonl(preferences=path, options=LoadOptions(max_bad_fraction=1))
    with pytest.raises(UserError, match="no usable row"):
        load_jsonl(preferences=write(tmp_path / "b.jsonl", []))


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.preferences: no such file: .*nowhere\.jsonl"):
        load_jsonl(preferences=tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="found a folder"):
        load_jsonl(preferences=tmp_path)


def test_a_torn_gzip_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", [pair(n) for n in range(500)])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be read after line"):
        load_jsonl(preferences=path)


def test_a_demonstration_is_no_pair_and_a_prompt_no_demonstration(tmp_path: Path) -> None:
    options = LoadOptions(max_bad_fraction=1)
    asked = write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "x", "response": "y"}])
    assert len(load_jsonl(demonstrations=asked, options=options).unusable) == 1
    with pytest.raises(UserError, match="found a demonstration"):
        load_jsonl(preferences=asked, options=options)


def test_hub_splits_and_origins(tmp_path: Path) -> None:
    corpus = hub_corpus(tmp_path)
    assert len(corpus.preferences.test) == 25
    assert corpus.dropped == 5  # questions 295 to 299 are in both files
    assert corpus.preferences.test[3].origin == f"{tmp_path}[test]:3"


def test_hub_gets_path_revision_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **named: Any) -> dict[str, list[Any]]:
        asked.append((path, named))
        dialogue = "\n\nHuman: {}\n\nAssistant: {}"
        return {
            "train": [
                {"chosen": dialogue.format(n, "a"), "rejected": dialogue.format(n, "b")}
                for n in range(9)
            ]
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = LoadOptions(validation_fraction=0.1, test_fraction=0.1, limit=8)
    corpus = load_hub("org/name", "abc123", data_dir="harmless-base", options=options)
    assert asked == [("org/name", {"revision": "abc123", "data_dir": "harmless-base"})]
    assert sum(len(rows) for _, rows in corpus.preferences.all()) == 8
    assert corpus.preferences.test  # no test split there: put aside by hash
    with pytest.raises(UserError, match="no split 'all'; it has train"):
        load_hub("org/name", train_split="all")


def test_hub_failures_name_the_data_set_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"org/name.*no route to host.*data=hh_local"):
        load_hub("org/name")


def test_real_hh(shared_data: Path) -> None:
    folder = shared_data / "hh"
    corpus = load_jsonl(
        preferences=folder / "harmless-train.jsonl.gz", test=folder / "harmless-test.jsonl.gz"
    )
    assert corpus.unusable == []
    assert corpus.dropped == 0  # the folder's README: the two files are disjoint
    assert len(corpus.preferences.train) + len(corpus.preferences.validation) == 1750
    assert len(corpus.preferences.test) == len(corpus.prompts.test) == 250
    # 4 of the 1750 have an empty chosen side, which is nothing to imitate.
    assert len(corpus.demonstrations.train) + len(corpus.demonstrations.validation) == 1746
    assert all(row.history[-1].role == "human" for row in corpus.prompts.train)


def test_real_prompts_with_scores(shared_data: Path) -> None:
    options = LoadOptions(validation_fraction=0, test_fraction=0, limit=200)
    corpus = load_jsonl(prompts=shared_data / "rtp" / "prompts.jsonl.gz", options=options)
    assert corpus.unusable == []
    assert len(corpus.prompts.train) > 190
