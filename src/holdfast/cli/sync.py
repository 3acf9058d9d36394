"""`holdfast sync`: bring the mirrors of a run up to date, by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.exits import BEHIND, INTEGRITY
from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, growing_progress, line
from holdfast.cli.words import bytes_, count
from holdfast.core.clock import SystemTime
from holdfast.core.errors import PolicyError
from holdfast.policies.parse import parse_rule
from holdfast.replication import Mirror
from holdfast.replication.syncing import Synced, remembered_mirrors
from holdfast.replication.syncing import sync as sync_mirrors
from holdfast.stores import name_of, open_store

__all__ = ["sync"]


def sync(
    path: RunPath,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="URL", help="This mirror; by default those that the run remembers."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", metavar="RULE", help="With --to: what the mirror keeps; by default what the run does."
        ),
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="With --to: pack data files on the way.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="With --to: read each copy back.")] = False,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate", metavar="SIZE", help="With --to: move at most this much a second, such as 50MB."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Copy to mirrors what they lack, and remove there what they are not to keep.

    Works while the run is being written. Exits with 4 when a manifest of the run does not verify, and with 8 when
    something else is not where it must be afterwards.
    """
    primary = open_store(path)
    if to is None and (keep is not None or compress or verify or rate is not None):
        raise PolicyError(
            "--keep, --compress, --verify and --rate belong to --to: a remembered mirror has its own"
        )
    if to is None:
        mirrors = remembered_mirrors(primary)
    else:
        mirrors = [Mirror(to, None if keep is None else parse_rule(keep), compress, rate, verify)]
    with growing_progress("copying") as (expect, advance):
        done = sync_mirrors(primary, mirrors, SystemTime(), expect=expect, advance=advance)
    broken = sorted({step for one in done for step in one.broken})
    if json:
        emit({"run": primary.url, "broken": broken, "mirrors": [_document(one) for one in done]})
    else:
        for step in broken:
            why = f"the manifest of step {step} does not verify; mend it with holdfast repair {path}"
            line(("not copied: ", "bold red"), why)
        for one in done:
            _print(one)
    if broken:
        raise typer.Exit(INTEGRITY)
    if any(one.error is not None for one in done):
        raise typer.Exit(BEHIND)


def _print(one: Synced) -> None:
    if one.outcome is not None:
        copied, removed = one.outcome.placed, one.outcome.removed
        written = one.outcome.copied.bytes
        idle = not (copied or written or removed or one.error)
        what = "up to date" if idle else f"{count(len(copied), 'checkpoint')} copied, {bytes_(written)}"
        if removed:
            what += f"; {len(removed)} removed"
        newest = "" if one.outcome.newest is None else f"; newest: step {one.outcome.newest}"
        line((name_of(one.url), "bold"), f"  {what}{newest}")
    if one.error is not None:
        line((name_of(one.url), "bold"), "  ", ("not up to date: ", "bold red"), one.error)


def _document(one: Synced) -> dict[str, object]:
    outcome = one.outcome
    return {
        "url": one.url,
        "copied": [] if outcome is None else outcome.placed,
        "removed": [] if outcome is None else outcome.removed,
        "missing": [] if outcome is None else [h.step for h in outcome.missing],
        "written_bytes": 0 if outcome is None else outcome.copied.bytes,
        "newest": None if outcome is None else outcome.newest,
        "error": one.error,
    }
