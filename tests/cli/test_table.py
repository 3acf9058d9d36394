"""Tables on a narrow terminal: what is cut, what goes, and that every row fits."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from holdfast.cli.table import Column, show_facts, show_table

ROWS = [
    [i, "a" * 30, f"model/layers.{i}.weight", "shown", "because of this and that and many other things"]
    for i in range(3)
]
COLUMNS = [
    Column("step", right=True),
    Column("first to go", leaves=2),
    Column("name", elastic=True, keep_end=True),
    Column("second to go", leaves=1),
    Column("why", elastic=True),
]


def test_wide_enough(screen) -> None:
    shown = screen(200)
    assert show_table(COLUMNS, ROWS) == []
    assert "because of this and that and many other things" in shown()[1]


def test_the_last_elastic_column_is_cut_first(screen) -> None:
    shown = screen(120)
    assert show_table(COLUMNS, ROWS) == []
    assert "model/layers.0.weight" in shown()[1]
    assert shown()[1].endswith("…")


@pytest.mark.parametrize(
    ("width", "gone"), [(100, []), (85, ["first to go"]), (50, ["first to go", "second to go"])]
)
def test_columns_go_in_their_order(screen, width: int, gone: list[str]) -> None:
    shown = screen(width)
    assert show_table(COLUMNS, ROWS) == gone
    assert max(map(cell_len, shown())) <= width
    assert len(shown()) == 4


def test_the_end_of_a_name_stays(screen) -> None:
    shown = screen(40)
    show_table(COLUMNS, ROWS)
    assert "…layers.0.weight" in shown()[1]


def test_wide_characters_count_twice(screen) -> None:
    shown = screen(30)
    show_table(
        [Column("a", elastic=True), Column("b", elastic=True, keep_end=True)], [["値" * 20, "値" * 20]]
    )
    assert max(map(cell_len, shown())) <= 36  # two columns of the least width, and the gap


def test_without_a_terminal_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_table(COLUMNS, ROWS) == []
    assert "many other things" in capsys.readouterr().out


def test_empty_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([Column("a"), Column("b"), Column("c")], [["1", "", "3"], ["4", "", ""]])
    assert capsys.readouterr().out == "a  c\n1  3\n4\n"


def test_facts_go_on_below_their_place(screen) -> None:
    shown = screen(40)
    show_facts([("one", "word " * 12), ("nothing", ""), ("three", "3")])
    assert shown() == [
        "  one    word word word word word word",
        "         word word word word word word",
        "  three  3",
    ]
