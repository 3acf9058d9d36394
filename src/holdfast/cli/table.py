"""Aligned columns that fit the terminal: the least important columns go first, one long column is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from holdfast.cli.output import line, lines, plain, stdout, text, write

__all__ = ["Column", "show_facts", "show_table"]

GAP = 2
SHORTEST = 16


@dataclass(frozen=True, slots=True)
class Column:
    """A column. `right` aligns numbers; `leaves` says how early it goes on a narrow terminal (0: never).

    An `elastic` one is cut before any goes, the last first, with an ellipsis at its end, or in front where
    `keep_end`.
    """

    title: str
    right: bool = False
    leaves: int = 0
    elastic: bool = False
    keep_end: bool = False


def show_table(columns: Sequence[Column], rows: Sequence[Sequence[object]], indent: str = "") -> list[str]:
    """Print rows under their titles. Columns without content are left out.

    A cell is a value, a pair of value and style, or a list of both. Returns the titles of the columns that the terminal
    had no room for.
    """
    if not stdout().is_terminal:
        write(_without_terminal(columns, rows, indent))
        return []
    cells = [[_styled(cell) for cell in row] for row in rows]
    filled = [i for i in range(len(columns)) if any(row[i].plain for row in cells)]
    shown, widths = _fit(columns, cells, filled, stdout().width - cell_len(indent))
    head = [text((columns[i].title, "dim")) for i in shown]
    if any(columns[i].title for i in shown):
        line(indent, _joined(head, shown, columns, widths))
    lines(text(indent, _joined([row[i] for i in shown], shown, columns, widths)) for row in cells)
    return [columns[i].title for i in filled if i not in shown]


def _styled(cell: object) -> Text:
    return text(*cell) if isinstance(cell, list) else text(cell)


def _unstyled(cell: object) -> str:
    if isinstance(cell, tuple):
        return plain(cell[0])
    if isinstance(cell, list):
        return "".join(map(_unstyled, cell))
    return cell.plain if isinstance(cell, Text) else plain(cell)


def _without_terminal(columns: Sequence[Column], rows: Sequence[Sequence[object]], indent: str) -> str:
    """Return the whole table as text with nothing cut."""
    cells = [[_unstyled(cell) for cell in row] for row in rows]
    filled = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    if any(columns[i].title for i in filled):
        cells.insert(0, [column.title for column in columns])
    aligned = [_aligned([row[i] for row in cells], right=columns[i].right) for i in filled]
    return "".join(f"{indent}{(GAP * ' ').join(row)}".rstrip() + "\n" for row in zip(*aligned, strict=True))


def _aligned(column: list[str], *, right: bool) -> list[str]:
    if all(map(str.isascii, column)):
        width = max(map(len, column))
        return [cell.rjust(width) if right else cell.ljust(width) for cell in column]
    widths = [cell_len(cell) for cell in column]
    padding = [" " * (max(widths) - width) for width in widths]
    return [pad + cell if right else cell + pad for cell, pad in zip(column, padding, strict=True)]


def _fit(
    columns: Sequence[Column], cells: Sequence[Sequence[Text]], filled: list[int], room: int
) -> tuple[list[int], dict[int, int]]:
    """Return the columns to show and their widths."""
    shown = list(filled)
    natural = {
        i: max([cell_len(columns[i].title), *(cell_len(row[i].plain) for row in cells)]) for i in shown
    }
    while True:
        widths = {i: natural[i] for i in shown}
        excess = sum(widths.values()) + GAP * (len(shown) - 1) - room
        for i in (i for i in reversed(shown) if columns[i].elastic and excess > 0):
            cut = min(excess, max(0, widths[i] - SHORTEST))
            widths[i] -= cut
            excess -= cut
        leaving = [i for i in shown if columns[i].leaves]
        if excess <= 0 or not leaving:
            return shown, widths
        shown.remove(max(leaving, key=lambda i: columns[i].leaves))


def _joined(
    row: Sequence[Text], shown: Sequence[int], columns: Sequence[Column], widths: dict[int, int]
) -> Text:
    out = Text()
    for position, (cell, i) in enumerate(zip(row, shown, strict=True)):
        out.append(" " * GAP if position else "")
        fitted = _cut(cell, widths[i], keep_end=columns[i].keep_end)
        padding = " " * (widths[i] - cell_len(fitted.plain))
        out.append(padding if columns[i].right else "")
        out.append_text(fitted)
        out.append("" if columns[i].right else padding)
    return out


def _cut(cell: Text, width: int, *, keep_end: bool) -> Text:
    """Return the cell, with an ellipsis for what does not fit."""
    if cell_len(cell.plain) <= width:
        return cell
    if keep_end:
        start = next(i for i in range(len(cell)) if cell_len(cell.plain[i:]) < width)
        return Text("…") + cell[start:]
    kept = cell.copy()
    kept.truncate(width - 1)
    kept.rstrip()
    return kept.append("…")


def show_facts(facts: Sequence[tuple[str, object]], indent: str = "  ") -> None:
    """Print labels and what belongs to them; long ones go on below. Those without content are left out."""
    told = [(label, said if isinstance(said, Text) else text(said)) for label, said in facts]
    told = [(label, said) for label, said in told if said.plain]
    width = max(len(label) for label, _ in told) + GAP
    console = stdout()
    room = max(SHORTEST, console.width - len(indent) - width)
    for label, said in told:
        rows = said.wrap(console, room) if console.is_terminal else [said]
        for i, row in enumerate(rows):
            line(indent, ((label if i == 0 else "").ljust(width), "dim"), row)
