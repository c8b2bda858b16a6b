"""Data files of any content: each row is used, or counted with a reason, without a traceback.

Random bytes alone are all refused in the same place. So rows are made of what rows are made of
(markers, line ends, fields, odd characters), and then damaged.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis, of the dev extra")

from hypothesis import given
from hypothesis import strategies as st

from rlhf_exp.annotation.campaign import read_pairs
from rlhf_exp.data.layouts import LAYOUTS, parse_row, read_rows
from rlhf_exp.data.parsing import end_of_response
from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Row, Turn, responses_of
from rlhf_exp.data.sources import LoadOptions, load_jsonl
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.human_agreement import read_judged_pairs
from rlhf_exp.evaluation.toxicity.prompts import load_prompts
from tests.fuzz.lab import fuzz

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
T = TypeVar("T")


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """Return what an action gives, or the words in which it refuses; anything else is a fault."""
    try:
        return action(), ""
    except (UserError, ValueError) as error:
        return None, str(error)


PIECES = st.one_of(
    st.sampled_from(
        [
            *[
                "Human:",
                "Assistant:",
                "human:",
                "ASSISTANT :",
                "Human",
                "\n\nHuman: ",
                "\n\nAssistant: ",
            ],
            *[
                "\n\nAssistant:",
                "\nHuman:",
                "\nAssistant:",
                "\r\n\r\nHuman:",
                "\r\rAssistant:",
                "\n \n",
            ],
            *[
                "\n",
                "\n\n",
                "\r\n",
                "\t",
                " ",
                "",
                "hi",
                "x²",
                "x2",
                "Hi there",
                "Be kind.",
                ".",
                "\ufeff",
            ],
            *[
                "\0",
                "\u2028",
                "\u0085",
                "\ud83d",
                "\ude00",
                "<|endoftext|>",
                "</s>",
                "[INST]",
                "é",
                "🙂",
            ],
        ]
    ),
    st.text(max_size=8),
)
TEXTS = st.lists(PIECES, max_size=9).map("".join)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = ["prompt", "chosen", "rejected", "response", "dialogue", "text"]
RECORDS = st.dictionaries(
    st.sampled_from([*NAMES, "toxicity", "x"]),
    st.one_of(TEXTS, TEXTS, TEXTS, VALUES, st.fixed_dictionaries({"text": VALUES})),
    max_size=5,
)
PAIRS = st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS})


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line of a file: a row, some JSON, or either damaged."""
    value = draw(st.one_of(PAIRS, PAIRS, RECORDS, VALUES))
    line = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    line = line.replace(b"\n", b"")
    damage = draw(
        st.sampled_from(["none"] * 6 + ["cut", "byte", "bytes", "digits", "deep", "twice"])
    )
    if damage == "cut":
        return line[: draw(st.integers(0, len(line)))]
    if damage == "byte" and line:
        place = draw(st.integers(0, len(line) - 1))
        return line[:place] + draw(st.binary(max_size=2)).replace(b"\n", b"") + line[place + 1 :]
    if damage == "bytes":
        return draw(st.binary(max_size=20)).replace(b"\n", b"")
    if damage == "digits":
        return b'{"prompt": ' + b"7" * draw(st.sampled_from([40, 4300, 4301, 9000])) + b"}"
    if damage == "deep":
        return draw(st.sampled_from([b"[", b'{"a":', b"[{}, "])) * draw(
            st.sampled_from([99, 101, 900, 3000])
        )
    if damage == "twice" and line.startswith(b'{"'):
        return b'{"prompt": "p", ' + line[1:]
    return line


FILES = st.lists(lines(), max_size=12)
FRACTIONS = st.sampled_from([0.0, 0.05, 0.5, 1.0])
OPTIONS = st.builds(LoadOptions, FRACTIONS, FRACTIONS, st.just(1.0), st.just(None), st.booleans())


def write(path: Path, content: Sequence[bytes], zipped: bool = False) -> set[str]:
    """Write lines; return the origins of those that are not blank."""
    whole = b"".join(line + b"\n" for line in content)
    path.write_bytes(gzip.compress(whole) if zipped else whole)
    return {f"{path}:{number}" for number, line in enumerate(content, 1) if line.strip()}


@fuzz(3000)
@given(content=FILES, options=OPTIONS, zipped=st.booleans())
def test_each_row_of_a_file_is_used_or_listed(
    tmp_path_factory: pytest.TempPathFactory,
    content: list[bytes],
    options: LoadOptions,
    zipped: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    origins = write(path, content, zipped)
    corpus, refusal = attempt(lambda: load_jsonl(preferences=path, options=options))
    if corpus is None:
        known = "no usable row", "held out for validation or test", "give JSON lines in UTF-8"
        # A file that begins as gzip does, and is none.
        assert any(words in refusal for words in (*known, "is it complete?"))
        return
    used = [row.origin for _, rows in corpus.preferences.all() for row in rows]
    unusable = [row.origin for row in corpus.unusable]
    assert len(used) == len(set(used))
    assert sorted(used + unusable) == sorted(origins)
    assert all(row.reason for row in corpus.unusable)
    assert corpus.dropped == 0
    histories = {row.history for _, rows in corpus.preferences.all() for row in rows}
    assert histories == {row.history for _, rows in corpus.prompts.all() for row in rows}
    imitated = sum(len(rows) for _, rows in corpus.demonstrations.all())
    empty = corpus.counts.get("pairs with an empty chosen side: nothing to imitate", 0)
    assert imitated + empty == len(used)


@fuzz(1000)
@given(
    content=FILES,
    tested=FILES,
    options=OPTIONS,
    kind=st.sampled_from(["demonstrations", "prompts"]),
)
def test_rows_that_are_tested_are_left_out_and_counted(
    tmp_path_factory: pytest.TempPathFactory,
    content: list[bytes],
    tested: list[bytes],
    options: LoadOptions,
    kind: str,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    # Rows of its own, so that there is something to train on.
    own = [json.dumps({"prompt": f"own {n}", "response": "yes"}).encode() for n in range(30)]
    read = write(folder / "train.jsonl", [*own, *content])
    test = write(folder / "test.jsonl", [own[0], *tested])
    files = {kind: folder / "train.jsonl", "test": folder / "test.jsonl"}
    corpus, refusal = attempt(lambda: load_jsonl(**files, options=options))
    if corpus is None:
        assert "held out for validation or test" in refusal
        return
    rows = getattr(corpus, kind)
    used = len(rows.train) + len(rows.validation)
    repeated = corpus.counts.get(
        "rows with the prompt of another row: each prompt is asked once", 0
    )
    unusable = {row.origin for row in corpus.unusable}
    assert len(unusable) == len(corpus.unusable)
    assert unusable <= read | test
    left = len(read - unusable) - corpus.dropped - used
    assert 0 <= left <= (repeated if kind == "prompts" else 0)
    histories = {row.history for row in rows.train} | {row.history for row in rows.validation}
    assert not histories & {row.history for row in corpus.prompts.test}


@fuzz(3000)
@given(record=RECORDS)
def test_any_record_is_a_row_or_says_why_not(record: dict[str, Any]) -> None:
    row, refusal = attempt(lambda: parse_row(record, "here"))
    if row is None:
        assert refusal
        return
    assert row.history[-1].role == "human"
    assert row.history[-1].text.strip()
    responses = {
        Preference: lambda: (row.chosen, row.rejected),
        Demonstration: lambda: (row.response,),
        Prompt: tuple,
    }[type(row)]()
    for text in (*responses, *(turn.text for turn in row.history)):
        text.encode()
    for response in responses:
        assert not response.lower().startswith("assistant:")
    # What was read is the same when it is read again.
    if isinstance(row, Demonstration):
        again = {"prompt": row.history[-1].text, "response": row.response}
        if not any(marker in str(again).lower() for marker in ("human", "assistant")):
            assert parse_row(again, "here") == Demonstration(row.history[-1:], row.response, "here")


MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]),
                "content": st.one_of(
                    TEXTS, st.lists(st.fixed_dictionaries({"text": TEXTS})), VALUES
                ),
            }
        ),
        st.fixed_dictionaries(
            {"from": st.sampled_from(["human", "gpt", "system"]), "value": TEXTS},
            optional={"tool_calls": VALUES},
        ),
        VALUES,
    ),
    max_size=5,
)
COMPLETIONS = st.lists(
    st.one_of(TEXTS, st.fixed_dictionaries({"response": TEXTS, "rating": VALUES}), VALUES),
    max_size=4,
)
FIELD = st.one_of(TEXTS, TEXTS, MESSAGES, MESSAGES, COMPLETIONS, VALUES, st.integers(0, 4))
OF_A_LAYOUT = st.sampled_from(LAYOUTS).flatmap(
    lambda layout: st.lists(
        st.fixed_dictionaries(
            dict.fromkeys(layout.required, FIELD), optional=dict.fromkeys(layout.optional, FIELD)
        ),
        min_size=1,
        max_size=6,
    )
)


@fuzz(4000)
@given(records=OF_A_LAYOUT, kind=st.sampled_from([None, Preference, Demonstration, Prompt]))
def test_records_of_any_layout_are_rows_or_say_why_not(
    records: list[dict[str, Any]], kind: type[Row] | None
) -> None:
    origins = [f"f:{number}" for number in range(len(records))]
    result, refusal = attempt(lambda: read_rows(zip(origins, records, strict=True), "f", kind))
    assert result is not None, refusal
    assert result.read == len(records)
    unusable = {row.origin for row in result.unusable}
    assert len(unusable) == len(result.unusable)
    for row, _ in result.rows:
        assert row.origin in set(origins) - unusable
        assert row.history[-1].role == "human"
        assert all(turn.role != "system" for turn in row.history[1:])
        for text in (*responses_of(row), *(turn.text for turn in row.history)):
            text.encode()
        if isinstance(row, Preference):
            assert row.chosen != row.rejected


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n:", exclude_categories=["Z", "C"]),
    min_size=1,
    max_size=12,
).map(str.strip)


@fuzz(2000)
@given(
    texts=st.lists(WORDS.filter(bool), min_size=2, max_size=7),
    gap=st.sampled_from(["\n\n", "\n", "\r\n\r\n", "\r\n", "\n \n", "\n\n\n"]),
    upper=st.booleans(),
    space=st.sampled_from(["", " "]),
    lead=st.booleans(),
    cue=st.booleans(),
)
def test_a_dialogue_in_any_spelling_is_the_same_dialogue(
    texts: list[str], gap: str, upper: bool, space: str, lead: bool, cue: bool
) -> None:
    names = ("Human", "Assistant") if upper else ("human", "assistant")
    spelled = [f"{gap}{names[n % 2]}{space}: {text}" for n, text in enumerate(texts)]
    if not lead:
        spelled[0] = spelled[0].lstrip()
    turns = tuple(
        Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(texts)
    )
    asked = len(texts) - 1 + len(texts) % 2
    prompt = "".join(spelled[:asked]) + (f"{gap}{names[1]}{space}:" if cue else "")
    assert parse_row({"prompt": prompt}, "here") == Prompt(turns[:asked], None, "here")
    if not len(texts) % 2:
        whole = Demonstration(turns[:-1], turns[-1].text, "here")
        assert parse_row({"dialogue": "".join(spelled)}, "here") == whole
        beside = {"prompt": prompt, "response": "".join(spelled)}
        assert parse_row(beside, "here") == whole


@fuzz(500)
@given(texts=st.lists(PIECES, max_size=40))
def test_where_a_response_ends_is_inside_it(texts: list[str]) -> None:
    text = "".join(texts)
    end = end_of_response(text)
    assert end is None or (0 <= end < len(text) and end_of_response(text[:end]) is None)


SCORED = st.fixed_dictionaries({"text": TEXTS, "toxicity": VALUES})
JUDGED = st.one_of(
    st.fixed_dictionaries(
        {
            "prompt": st.one_of(TEXTS, VALUES, SCORED),
            "answer_a": st.one_of(TEXTS, VALUES),
            "answer_b": TEXTS,
            "winner": st.one_of(st.sampled_from(["a", "b", "tie"]), VALUES),
            "annotator": st.one_of(st.sampled_from(["p", "q"]), VALUES),
            "criterion": st.one_of(st.just("overall"), VALUES),
        }
    ),
    st.fixed_dictionaries(
        {
            "instruction": st.one_of(TEXTS, VALUES),
            "input": st.one_of(TEXTS, VALUES),
            "response1": st.one_of(TEXTS, VALUES),
            "response2": TEXTS,
            "annotator1": st.one_of(st.sampled_from([0, 1, 2, None]), VALUES),
        }
    ),
    st.fixed_dictionaries({"prompt": SCORED, "continuation": st.one_of(SCORED, VALUES)}),
    PAIRS,
)


@st.composite
def other_lines(draw: st.DrawFn) -> bytes:
    record = dict(draw(JUDGED))
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=1)):
        del record[name]
    return json.dumps(record).encode()


@fuzz(1500)
@given(
    content=st.lists(st.one_of(other_lines(), lines()), min_size=1, max_size=4),
    as_list=st.booleans(),
)
def test_other_readers_of_files_read_them_or_name_the_row(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], as_list: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "other.jsonl"
    origins = write(path, content)
    if as_list:
        path.write_bytes(b"[" + b",".join(content) + b"]")
    for read in (lambda: read_judged_pairs(path, "--judgments"), lambda: read_pairs(path)):
        found, refusal = attempt(read)
        assert found is not None or str(path) in refusal
    prompts, refusal = attempt(lambda: load_prompts(str(path)))
    if prompts is None:
        assert str(path) in refusal
        return
    assert as_list or len(prompts) == len(origins)
    for prompt in prompts:
        prompt.prompt.text.encode()
        assert prompt.prompt.toxicity is None or math.isfinite(prompt.prompt.toxicity)
