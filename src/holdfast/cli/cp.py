"""`holdfast cp`: copy a run or one checkpoint to another place."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from holdfast.cli.exits import INTEGRITY
from holdfast.cli.options import Json
from holdfast.cli.output import emit, growing_progress, line
from holdfast.cli.targets import split_target
from holdfast.cli.words import bytes_, count
from holdfast.core.errors import PolicyError
from holdfast.core.units import format_seconds, parse_bytes
from holdfast.format.packed import Pack
from holdfast.replication.transfer import Transferred, transfer
from holdfast.stores import name_of, open_store, real_place
from holdfast.stores.wrappers import Throttled

__all__ = ["cp"]


def cp(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC[@STEP|@TAG]", help="A run, or one of its checkpoints.", show_default=False
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="DST", help="Where the copy goes: a directory or URL.", show_default=False),
    ],
    compress: Annotated[bool, typer.Option("--compress", help="Pack the data files on the way.")] = False,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="SIZE", help="Write at most this much a second, such as 50MB."),
    ] = None,
    json: Json = False,
) -> None:
    """Copy a run, or one checkpoint, between any two places. Every byte is verified on the way.

    The copy is the same run. A second call copies what is missing. Exits with 4 when something at the source does not
    verify: that is named, and the rest is copied.
    """
    path, which = split_target(source)
    here, there = open_store(path), open_store(target)
    if real_place(here.url) == real_place(there.url):
        raise PolicyError(f"{here.url} and {there.url} are one place; a copy goes to another one")
    begun = time.monotonic()
    with growing_progress("copying") as (expect, advance):
        done = transfer(
            here,
            there if rate is None else Throttled(there, parse_bytes(rate)),
            which,
            pack=Pack() if compress else None,
            planned=expect,
            progress=advance,
        )
    seconds = time.monotonic() - begun
    if json:
        emit(_document(here.url, there.url, done, seconds))
    else:
        _print(there.url, done, seconds)
    if done.problems:
        raise typer.Exit(INTEGRITY)


def _print(target: str, done: Transferred, seconds: float) -> None:
    for problem in done.problems:
        line(("not copied: ", "bold red"), problem.message)
    copied = done.copied
    written = (
        f"{count(copied.objects, 'object')} written, {bytes_(copied.bytes)} in {format_seconds(seconds)}"
    )
    line((f"{count(len(done.steps), 'checkpoint')} at {name_of(target)}", "green"), f"  {written}")


def _document(source: str, target: str, done: Transferred, seconds: float) -> dict[str, object]:
    return {
        "from": source,
        "to": target,
        "steps": done.steps,
        "written_objects": done.copied.objects,
        "written_bytes": done.copied.bytes,
        "problems": [{"key": p.key, "message": p.message} for p in done.problems],
        "seconds": seconds,
    }
