"""The table of slots, by hand."""

from __future__ import annotations

import torch

from rlhf_exp.rollout.decoder import SlotTable


def table_of_three(spare: int = 0) -> SlotTable:
    """Four slots for three new tokens; rows 7, 8 and 9 with prompts of 5, 2 and 4 tokens."""
    table = SlotTable(4, 3, torch.device("cpu"), spare)
    assert table.fill([7, 8, 9], [5, 2, 4], [5, 2, 4]) == slice(0, 3)
    return table


def state(table: SlotTable) -> list[list[int]]:
    active = slice(0, table.active)
    return [
        values[active].tolist() for values in (table.row, table.token, table.position, table.column)
    ]


def test_filling_starts_at_the_prompts_ends() -> None:
    table = table_of_three()
    assert (table.active, table.free, table.ended, table.longest) == (3, 1, 0, 5)
    assert state(table) == [[7, 8, 9], [0, 0, 0], [4, 1, 3], [0, 0, 0]]


def test_advancing_some_slots() -> None:
    table = table_of_three()
    table.advance(slice(0, 3), torch.tensor([40, 41, 42]))
    table.advance(slice(2, 3), torch.tensor([50]))
    table.count_step(slice(0, 3))
    table.count_step(slice(2, 3))
    assert state(table) == [[7, 8, 9], [40, 41, 50], [5, 2, 5], [1, 1, 2]]
    assert table.longest == 6


def test_running_on_stops_at_the_last_column_and_position() -> None:
    table = table_of_three()
    for _ in range(6):
        table.advance(slice(0, 3), torch.tensor([1, 1, 1]))
    # A prompt of 5 tokens with 3 new ones fills positions 0 to 7.
    assert state(table)[2:] == [[7, 4, 6], [3, 3, 3]]


def test_clearing_moves_the_last_slots_into_the_holes() -> None:
    table = SlotTable(5, 3, torch.device("cpu"))
    table.fill([10, 11, 12, 13, 14], [1, 9, 2, 3, 8], [1, 9, 2, 3, 8])
    table.advance(slice(0, 5), torch.tensor([20, 21, 22, 23, 24]))
    table.count_step(slice(0, 5))
    table.held[1] = table.held[4] = None
    assert table.ended == 2
    origins, targets = table.compact()
    assert (origins.tolist(), targets.tolist()) == ([3], [1])
    assert table.held == [10, 13, 12]
    assert state(table) == [[10, 13, 12], [20, 23, 22], [1, 3, 2], [1, 1, 1]]
    # The longest remaining is the prompt of 3 tokens, one further; not that of 9, which is gone.
    assert table.longest == 4
    assert table.fill([15], [6], [6]) == slice(3, 4)


def test_rows_that_have_ended_are_fed_what_closes_them() -> None:
    table = table_of_three(spare=2)
    table.advance(slice(0, 3), torch.tensor([40, 41, 42]))
    # Row 8, a prompt of 2 tokens, is closed at position 2; its state goes to column 20. Row 9 is
    # fed token 88 first.
    table.feed([1], [99], [2], remaining=1, state_column=20)
    table.feed([2], [88], [4], remaining=2)
    assert table.state_columns(slice(0, table.active), 20).tolist() == [5, 20, 4]
    assert state(table)[1:3] == [[40, 99, 88], [5, 2, 4]]
    assert (table.held, table.closing) == ([7, 8, 9], [0, 1, 2])
    for _ in range(2):
        table.advance(slice(0, 3), torch.tensor([1, 1, 1]))
        assert table.state_columns(slice(0, 3), 20)[1] == 21, "the column that nobody reads"
    assert table.count_fed() == [2]
    assert (table.held, table.closing) == ([7, None, 9], [0, 0, 1])
    table.compact()
    assert (table.held, table.closing) == ([7, 9], [0, 1]), "moved with its row"
    assert table.count_fed() == []
    table.compact()
    for _ in range(6):
        table.advance(slice(0, 1), torch.tensor([1]))
    assert table.state_columns(slice(0, table.active), 20).tolist() == [9], (
        "two positions after the prompt's 5 and 3 new ones"
    )
    # A new row in a used slot keeps its states where its tokens are.
    table.fill([10, 11], [6, 1], [6, 1])
    assert table.state_columns(slice(0, table.active), 20).tolist() == [9, 5, 0]


def test_slots_without_a_row_write_nowhere_that_is_read() -> None:
    table = SlotTable(4, 3, torch.device("cpu"), idle_row=9)
    table.fill([1, 2, 3], [5, 6, 7], [5, 6, 7])
    table.advance(slice(0, 4), torch.tensor([40, 41, 42, 43]))
    assert [table.row[3], table.position[3], table.column[3]] == [9, 0, 0]
    table.held[0] = None
    table.compact()
    table.advance(slice(0, 4), torch.tensor([40, 41, 42, 43]))
    assert table.row.tolist() == [3, 2, 9, 9]
    assert table.position.tolist() == [8, 7, 0, 0]
    assert table.column.tolist() == [2, 2, 0, 0]


def test_clearing_everything() -> None:
    table = table_of_three()
    table.held[:] = [None, None, None]
    origins, targets = table.compact()
    assert (len(origins), len(targets), table.active, table.free) == (0, 0, 0, 4)
