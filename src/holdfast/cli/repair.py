"""`holdfast repair`: mend a run from copies of it that verify."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.exits import HELD, INTEGRITY
from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, growing_progress, line, note
from holdfast.cli.words import bytes_, count
from holdfast.replication.known_copies import known_copies
from holdfast.replication.mending import RepairReport
from holdfast.replication.repair import repair as repair_run
from holdfast.stores import name_of, open_store

__all__ = ["repair"]


def repair(
    path: RunPath,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="A copy of the run; may be given several times. By default its mirrors.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show what would happen and change nothing.")
    ] = False,
    damaged_only: Annotated[
        bool,
        typer.Option("--damaged-only", help="Bring no checkpoint or tag back that is gone here."),
    ] = False,
    json: Json = False,
) -> None:
    """Find what is wrong with a run, and mend it from copies that verify.

    Nothing that is whole is touched. What is whole nowhere is named and stays as it is; then the exit code is 4.
    """
    store = open_store(path)
    sources = [open_store(one) for one in source] if source else known_copies(store)
    with growing_progress("checking") as (expect, advance):
        report = repair_run(
            store,
            sources,
            dry_run=dry_run,
            bring_back=not damaged_only,
            planned=expect,
            progress=advance,
        )
    if json:
        emit(_document(report))
    else:
        _print(report)
    if report.lost or (report.dry_run and report.mended):
        raise typer.Exit(INTEGRITY)
    if report.left:
        raise typer.Exit(HELD)


def _print(report: RepairReport) -> None:
    for mended in report.mended:
        line(
            ("would mend: " if report.dry_run else "mended: ", "green"),
            _of(mended.key, mended.was),
            ("  from ", "dim"),
            ", ".join(map(name_of, mended.origin.split(", "))),
        )
    for problem in report.left:
        line(("waits: ", "yellow"), _of(problem.key, problem.message))
    for problem in report.lost:
        line(("lost: ", "bold red"), _of(problem.key, problem.message))
    checked = f"{count(report.checked, 'file')} checked, {bytes_(report.checked_bytes)}"
    if report.whole and not report.mended:
        line(("nothing is wrong", "bold green"), f"  {checked}")
        return
    done = f"{count(len(report.mended), 'object')} {'to mend' if report.dry_run else 'mended'}"
    line((done, "bold"), f", {len(report.lost)} lost  {checked}")
    if report.left:
        note("run it again when training has ended, for what waits")


def _of(key: str, message: str) -> str:
    """Return what is said of an object, with its key in front where the words do not begin with it."""
    return message if message.startswith(key) else f"{key}: {message}"


def _document(report: RepairReport) -> dict[str, object]:
    return {
        "run": report.run,
        "dry_run": report.dry_run,
        "mended": [{"key": m.key, "was": m.was, "from": m.origin} for m in report.mended],
        "lost": [{"key": p.key, "message": p.message} for p in report.lost],
        "left": [{"key": p.key, "message": p.message} for p in report.left],
        "checked_files": report.checked,
        "checked_bytes": report.checked_bytes,
    }
