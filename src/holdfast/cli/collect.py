"""`holdfast collect`: free what nothing needs any more."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, line
from holdfast.cli.words import bytes_, count
from holdfast.run import Run

__all__ = ["collect"]


def collect(
    path: RunPath,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="DURATION",
            help="Free all that has been in the trash for so long, such as '1h'; 0s empties it.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Free what nothing refers to: trash whose grace has ended, attempts of writers that died, half-made files, and
    uploads that were given up.

    What a listed checkpoint, another one in the trash, or a reader needs is never freed. A run that is being trained
    is left to its training process, which does the same by itself.
    """
    run = Run(path)
    freed = run.collect(grace=grace)
    left = len(run.trash())
    if json:
        emit(
            {
                "run": run.store.url,
                "trashed": freed.trashed,
                "older_states": freed.states,
                "files": freed.files,
                "freed_bytes": freed.nbytes,
                "left_in_trash": left,
            }
        )
        return
    line(
        (f"freed {bytes_(freed.nbytes)}", "green"),
        f" in {count(freed.files, 'data file')}; {count(freed.trashed, 'checkpoint')} left the trash for good, "
        f"{left} {'remains' if left == 1 else 'remain'} in it",
    )
