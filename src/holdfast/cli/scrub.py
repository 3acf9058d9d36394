"""`holdfast scrub`: read again what was proven longest ago, and record what was proven."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from holdfast.cli.exits import INTEGRITY
from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, growing_progress, line
from holdfast.cli.words import bytes_, count
from holdfast.core.units import format_seconds, format_steps, parse_bytes, parse_seconds
from holdfast.replication.scrub import ScrubLimits, ScrubReport
from holdfast.replication.scrub import scrub as scrub_store
from holdfast.stores import name_of, open_store
from holdfast.stores.wrappers import Throttled

__all__ = ["scrub"]


def scrub(
    path: RunPath,
    max_duration: Annotated[
        str | None,
        typer.Option(
            "--max-duration",
            metavar="TIME",
            help="Begin no further file after this long, such as 30m.",
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="SIZE", help="Read at most this much a second, such as 50MB."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="TIME", help="Read only what was not proven for this long, such as 7d."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Read everything that the checkpoints need, what was proven longest ago first, and record what was proven.

    A scrub that is stopped goes on next time. Works while the run is being written. Exits with 4 when anything is
    wrong, and names it.
    """
    store = open_store(path)
    limits = ScrubLimits(
        None if max_duration is None else parse_seconds(max_duration),
        None if older_than is None else parse_seconds(older_than),
    )
    read_from = store if rate is None else Throttled(store, parse_bytes(rate))
    with growing_progress("scrubbing") as (expect, advance):
        report = scrub_store(read_from, limits, planned=expect, progress=advance)
    if json:
        emit(_document(report))
    else:
        _print(report)
    if report.problems:
        raise typer.Exit(INTEGRITY)


def _print(report: ScrubReport) -> None:
    for problem in report.problems:
        line(("wrong: ", "bold red"), problem.message)
    if report.damaged:
        line(("damaged: ", "bold red"), format_steps(report.damaged))
        name = shlex.quote(name_of(report.run))
        line(f"holdfast repair {name} --from COPY mends what is whole in a copy or mirror")
    read = f"{count(report.files, 'file')} read, {bytes_(report.bytes)} in {format_seconds(report.seconds)}"
    style = "" if report.problems else "bold green"
    line((f"{count(len(report.verified), 'checkpoint')} proven", style), f"  {read}")
    if report.left:
        line(f"{count(report.left, 'file')} left, {bytes_(report.left_bytes)}: the next scrub goes on there")


def _document(report: ScrubReport) -> dict[str, object]:
    return {
        "run": report.run,
        "files": report.files,
        "read_bytes": report.bytes,
        "left_files": report.left,
        "left_bytes": report.left_bytes,
        "problems": [{"key": p.key, "message": p.message} for p in report.problems],
        "damaged": report.damaged,
        "proven": report.verified,
        "recorded": report.recorded,
        "seconds": report.seconds,
    }
