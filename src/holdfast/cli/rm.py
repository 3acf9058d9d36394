"""`holdfast rm`: delete checkpoints by step."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.options import Grace, Json, Now, RunPath, Yes, grace_of
from holdfast.cli.output import emit, line, text
from holdfast.cli.prune import ask_first, way_back
from holdfast.cli.table import Column, show_table
from holdfast.cli.words import age, bytes_, count
from holdfast.run import GRACE, Run

__all__ = ["rm"]


def rm(
    path: RunPath,
    steps: Annotated[
        list[int], typer.Argument(metavar="STEP...", help="The steps to delete.", show_default=False)
    ],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also delete tagged ones and the last one.")
    ] = False,
    grace: Grace = GRACE,
    now: Now = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete checkpoints, and every byte that only they needed.

    A checkpoint with a tag and the last one of a run are deleted with --force only. What is deleted stays in the trash
    for a day (--grace), from where `holdfast undo` brings it back; one that does not verify is gone at once.
    """
    run, grace = Run(path), grace_of(grace, now=now)
    chosen = list(dict.fromkeys(steps))
    run.check_removal(chosen, force=force)
    if not json:
        _print_victims(run, chosen)
    ask_first(yes, f"Delete {count(len(chosen), 'checkpoint')}?")
    freed = run.remove(chosen, force=force, grace=grace)
    back = way_back(grace)
    if json:
        emit({"run": run.store.url, "removed": chosen, "freed_bytes": freed, "left": run.steps})
    else:
        line(
            (f"deleted {count(len(chosen), 'checkpoint')}", "green"),
            f", {bytes_(freed)} {'to be ' if back else ''}freed; {len(run)} left",
            *back,
        )


def _print_victims(run: Run, steps: list[int]) -> None:
    records = {r.step: r for r in run.records()}
    rows: list[list[object]] = []
    for step in steps:
        if step in records:
            record = records[step]
            tags = text((", ".join(sorted(record.tags)), "cyan"))
            rows.append([text((step, "bold")), age(record.time), bytes_(record.stored_bytes), tags])
        else:
            rows.append([text((step, "bold")), "", "", text(("broken", "red"))])
    show_table(
        [Column("step", right=True), Column("saved"), Column("size", right=True), Column("tags")], rows
    )
