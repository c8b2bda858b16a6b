"""Tokenized sets: lengths, ends, cuts, and their cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_exp.data import tokenized
from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Turn
from rlhf_exp.data.tokenized import (
    RaggedArray,
    tokenize_demonstrations,
    tokenize_preferences,
    tokenize_prompts,
)
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.errors import UserError


@pytest.fixture(scope="module")
def codec() -> Codec:
    # 258 tokens: no merges, so that every ASCII letter is one token and lengths can be counted.
    return Codec(train_tokenizer(["x"], 258), "plain")


def question(text: str) -> tuple[Turn, ...]:
    return (Turn("human", text),)


def texts(codec: Codec, rows: RaggedArray) -> list[str]:
    return [codec.decode(row.tolist()) for row in rows]


def test_ragged_rows() -> None:
    rows = RaggedArray.of([[1, 2], [], [3]])
    assert [row.tolist() for row in rows] == [[1, 2], [], [3]]
    assert rows.offsets.tolist() == [0, 2, 2, 3]
    assert (rows.flat.dtype, rows.offsets.dtype) == (np.int32, np.int64)
    assert rows.lengths().tolist() == [2, 0, 1]
    with pytest.raises(IndexError):
        rows[3]


def test_demonstrations_end_with_eos_and_prompts_are_cut_on_the_left(codec: Codec) -> None:
    rows = [
        Demonstration(question("abcdef"), "xy", ""),  # 6 + (1 space + 2 + 1 end) = 10: fits
        Demonstration(question("abcdefg"), "xy", ""),  # 11: one too many
        Demonstration(question("abc"), "qrstuvwxyz", ""),  # 1 + 10 + 1 = 12 alone: cut to 9
    ]
    tokenized = tokenize_demonstrations(rows, codec, 10)
    end = "<|endoftext|>"
    assert texts(codec, tokenized.prompt_ids) == ["abcdef", "bcdefg", "c"]
    assert texts(codec, tokenized.response_ids) == [f" xy{end}", f" xy{end}", " qrstuvwx"]
    assert (tokenized.cut, tokenized.cut_responses, len(tokenized)) == (2, 1, 3)


def test_both_sides_of_a_pair_keep_the_same_prompt(codec: Codec) -> None:
    # The longer side takes 1 + 4 + 1 = 6 of 10 tokens, which leaves 4 for the prompt of both.
    tokenized = tokenize_preferences([Preference(question("abcdef"), "wxyz", "q", "")], codec, 10)
    assert texts(codec, tokenized.prompt) == ["cdef"]
    assert texts(codec, tokenized.chosen) == [" wxyz<|endoftext|>"]
    assert texts(codec, tokenized.rejected) == [" q<|endoftext|>"]
    assert (tokenized.cut, tokenized.cut_responses) == (1, 0)


def test_prompts_leave_room_for_the_response(codec: Codec) -> None:
    rows = [
        Prompt(question("abcdef"), "wxyz", ""),
        Prompt(question("a"), None, ""),
        Prompt(question("b"), "", ""),
    ]
    tokenized = tokenize_prompts(rows, codec, seq_length=8, max_new_tokens=4)
    assert texts(codec, tokenized.prompt) == ["cdef", "a", "b"]
    # No original is no token; an empty one is a space and the end.
    assert texts(codec, tokenized.original) == [" wxy", "", " <|endoftext|>"]
    assert (tokenized.cut, tokenized.cut_responses) == (1, 1)


def test_a_beginning_of_sequence_token_survives_the_cut() -> None:
    tokenizer = train_tokenizer(["x"], 258)
    tokenizer.add_special_tokens({"bos_token": "<b>"})
    tokenizer.chat_template = "<b>{% for m in messages %}{{ m.content }}{% endfor %}"
    codec = Codec(tokenizer, "chat_template")
    tokenized = tokenize_prompts([Prompt(question("abcdef"), None, "")], codec, 5, 1)
    assert texts(codec, tokenized.prompt) == ["<b>def"]


@pytest.mark.parametrize(("seq_length", "new"), [(8, 8), (8, 9), (8, 0)])
def test_no_room_for_a_prompt_is_an_error(codec: Codec, seq_length: int, new: int) -> None:
    with pytest.raises(UserError, match=f"max_new_tokens is {new}"):
        tokenize_prompts([Prompt(question("a"), None, "")], codec, seq_length, new)


def test_a_sequence_of_one_token_is_an_error(codec: Codec) -> None:
    with pytest.raises(UserError, match="seq_length is 1"):
        tokenize_demonstrations([Demonstration(question("a"), "b", "")], codec, 1)


class TestCache:
    """Sets are found again by what they hold."""

    rows = (
        Demonstration(question("abcdef"), "xy", "a:1"),
        Demonstration(question("b"), "z", "a:2"),
    )

    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Counts tokenizations."""
        calls: list[int] = []
        real = Codec.encode_responses

        def counted(self: Codec, responses: list[str]) -> list[list[int]]:
            calls.append(len(responses))
            return real(self, responses)

        monkeypatch.setattr(Codec, "encode_responses", counted)
        return calls

    def test_same_content_is_read_back(
        self, codec: Codec, tmp_path: Path, built: list[int]
    ) -> None:
        first = tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        moved = [Demonstration(row.history, row.response, "elsewhere:7") for row in self.rows]
        again = tokenize_demonstrations(moved, codec, 8, tmp_path)
        assert built == [2]
        fresh = tokenize_demonstrations(self.rows, codec, 8)
        for tokenized_rows in (first, again):
            assert isinstance(tokenized_rows.prompt_ids.flat, np.memmap)
            assert texts(codec, tokenized_rows.prompt_ids) == texts(codec, fresh.prompt_ids)
            assert texts(codec, tokenized_rows.response_ids) == texts(codec, fresh.response_ids)
            assert (tokenized_rows.cut, tokenized_rows.cut_responses) == (1, 0)  # 6 + 4 tokens in 8

    def test_any_change_builds_anew(self, codec: Codec, tmp_path: Path, built: list[int]) -> None:
        tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        tokenize_demonstrations(self.rows[::-1], codec, 8, tmp_path)
        tokenize_demonstrations(self.rows, codec, 9, tmp_path)
        tokenize_demonstrations(self.rows, Codec(codec.tokenizer, "hh"), 8, tmp_path)
        assert len(built) == 4
        assert len(list(tmp_path.iterdir())) == 4

    def test_kinds_of_equal_rows_do_not_meet(self, codec: Codec, tmp_path: Path) -> None:
        assert len(tokenize_demonstrations([], codec, 8, tmp_path)) == 0
        assert len(tokenize_preferences([], codec, 8, tmp_path)) == 0
        assert len(tokenize_demonstrations([], codec, 8, tmp_path)) == 0

    @pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "missing"])
    @pytest.mark.parametrize(
        "name", ["counts.json", "prompt_ids.flat.npy", "response_ids.offsets.npy", "digests.json"]
    )
    def test_a_damaged_set_is_built_again_with_a_word(
        self,
        codec: Codec,
        tmp_path: Path,
        built: list[int],
        caplog: pytest.LogCaptureFixture,
        name: str,
        damage: str,
    ) -> None:
        whole = tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        (place,) = tmp_path.iterdir()
        path, content = place / name, bytearray((place / name).read_bytes())
        expected = texts(codec, whole.prompt_ids)
        del whole  # it is mapped from the file
        path.unlink()
        if damage == "flipped":
            content[-2] ^= 1  # of the last token, offset or count
        if damage != "missing":
            kept = {"empty": 0, "truncated": len(content) // 2, "flipped": len(content)}[damage]
            path.write_bytes(content[:kept])
        again = tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        # Sets of earlier versions have no digests: that is no damage to be reported.
        assert (name in caplog.text) is ((name, damage) != ("digests.json", "missing"))
        assert texts(codec, again.prompt_ids) == expected
        tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        assert len(built) == 2

    def test_nothing_half_written_is_left(
        self, codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(np, "save", full)
            with pytest.raises(UserError, match=r"No space left.*free some space"):
                tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_another_way_of_tokenizing_finds_nothing_old(
        self, codec: Codec, tmp_path: Path, built: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        monkeypatch.setattr(tokenized, "_CACHE_FORMAT", -1)
        tokenize_demonstrations(self.rows, codec, 8, tmp_path)
        assert len(built) == 2
