"""`holdfast trash`: what was deleted and can be brought back."""

from __future__ import annotations

from holdfast.catalog.trash import Deleted
from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, line, text
from holdfast.cli.table import Column, show_table
from holdfast.cli.words import age, bytes_, count, date
from holdfast.run import Run

__all__ = ["trash"]


def trash(path: RunPath, json: Json = False) -> None:
    """List the checkpoints that were deleted and not yet freed: when, why, until when, and what each frees."""
    run = Run(path)
    found = run.trash()
    if json:
        emit({"run": run.store.url, "trash": [_document(one) for one in found]})
        return
    if not found:
        line("the trash is empty")
        return
    columns = [
        Column("step", right=True),
        Column("deleted", leaves=1),
        Column("until"),
        Column("frees", right=True),
        Column("tags", leaves=2),
        Column("why", elastic=True),
    ]
    show_table(columns, [_row(one) for one in found])
    total = bytes_(sum(one.freed_bytes for one in found))
    line(f"{count(len(found), 'checkpoint')} in the trash, about {total}")


def _row(one: Deleted) -> list[object]:
    return [
        text((one.step, "bold")),
        text((age(one.time), "dim")),
        date(one.until),
        bytes_(one.freed_bytes),
        text((", ".join(one.tags), "cyan")),
        text((one.problem, "red")) if one.problem else "; ".join(one.reasons),
    ]


def _document(one: Deleted) -> dict[str, object]:
    return {
        "step": one.step,
        "attempt": one.attempt,
        "deleted": one.time,
        "until": one.until,
        "reasons": one.reasons,
        "tags": one.tags,
        "stored_bytes": one.stored_bytes,
        "freed_bytes": one.freed_bytes,
        "demoted": one.demoted,
        "problem": one.problem,
    }
