"""`holdfast status`: how a run stands, and what is not yet where."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.exits import BEHIND
from holdfast.cli.options import Json
from holdfast.cli.output import emit, line, text
from holdfast.cli.table import Column, show_table
from holdfast.cli.words import age, bytes_, count
from holdfast.core.clock import SystemTime
from holdfast.core.units import format_steps
from holdfast.replication import MirrorStatus
from holdfast.replication.status import RunStatus, run_status
from holdfast.stores import name_of, open_store

__all__ = ["status"]

_STYLES = {"ok": "green", "behind": "yellow", "degraded": "bold red", "unreachable": "bold red"}


def status(
    path: Annotated[
        str, typer.Argument(metavar="RUN", help="A run: a directory or URL.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Show who writes a run, its newest checkpoint, and how each of its places stands.

    Exits with 8 when something is not where it must be.
    """
    found = run_status(open_store(path), SystemTime())
    if json:
        emit(_document(found))
    else:
        _print(found)
    if not found.is_well:
        raise typer.Exit(BEHIND)


def _print(found: RunStatus) -> None:
    writer = f"written by {found.writer.owner}" if found.writer is not None else "nobody writes it now"
    line((name_of(found.url), "bold"), f"  {count(found.checkpoints, 'checkpoint')}, {writer}")
    if found.newest is None or found.newest_time is None:
        line("no checkpoint yet")
    else:
        line(f"newest: step {found.newest}, saved {age(found.newest_time)}")
    columns = [
        Column("place", elastic=True, keep_end=True),
        Column("state"),
        Column("newest", right=True),
        Column("to come", right=True, leaves=2),
        Column("bytes", right=True, leaves=1),
        Column("note", elastic=True),
    ]
    show_table(columns, [_row(place) for place in found.locations])


def _row(place: MirrorStatus) -> list[object]:
    return [
        text(name_of(place.url)),
        text((place.state, _STYLES.get(place.state, ""))),
        "" if place.newest is None else str(place.newest),
        str(len(place.missing)) if place.missing else "",
        bytes_(place.missing_bytes) if place.missing_bytes else "",
        place.error or _only_here(place),
    ]


def _only_here(place: MirrorStatus) -> str:
    return f"{format_steps(place.only_here)} only here" if place.only_here else ""


def _document(found: RunStatus) -> dict[str, object]:
    writer = found.writer
    return {
        "run": found.url,
        "id": found.run,
        "writer": None
        if writer is None
        else {"host": writer.host, "pid": writer.pid, "since": writer.acquired},
        "newest": found.newest,
        "newest_time": found.newest_time,
        "checkpoints": found.checkpoints,
        "well": found.is_well,
        "places": [
            {
                "url": place.url,
                "state": place.state,
                "newest": place.newest,
                "missing": place.missing,
                "missing_bytes": place.missing_bytes,
                "only_here": place.only_here,
                "note": place.error,
            }
            for place in found.locations
        ],
    }
