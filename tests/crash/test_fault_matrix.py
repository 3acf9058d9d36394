"""The published page is in step with what the tests try."""

from __future__ import annotations

from crash.fault_matrix import PAGE, cells, rows_of
from crash.planted import DEFECTS


def test_the_page_has_the_rows_and_columns_of_the_code() -> None:
    page = rows_of(PAGE.read_text())
    written = {(fault, operation) for fault, row in page.items() for operation in row}
    assert written == cells(), "run `make campaign`"
    for fault, row in page.items():
        for operation, number in row.items():
            assert int(number.replace(",", "")) > 0, (fault, operation)


def test_the_page_names_every_planted_defect() -> None:
    text = PAGE.read_text()
    for defect in DEFECTS:
        assert f"| {defect} |" in text
