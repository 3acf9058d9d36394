"""`holdfast undo`: bring deleted checkpoints back from the trash."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.exits import code_of
from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, fail, line
from holdfast.cli.words import count
from holdfast.core.errors import HoldfastError, NoCheckpoint, PolicyError
from holdfast.run import Run

__all__ = ["undo"]


def undo(
    path: RunPath,
    steps: Annotated[
        list[int] | None,
        typer.Argument(metavar="[STEP...]", help="The steps to bring back.", show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Bring back all that is in the trash.")] = False,
    json: Json = False,
) -> None:
    """Bring deleted checkpoints back from the trash, whole, with their tags.

    Each is checked first: all of its data must be there. A step that has another checkpoint now is refused. Retention
    may drop it again at the next save: tag what is to stay.
    """
    run = Run(path)
    if bool(steps) == everything:
        raise PolicyError("say which: give the steps to bring back, or --all for everything in the trash")
    wanted = (
        list(dict.fromkeys(one.step for one in run.trash()))
        if everything
        else list(dict.fromkeys(steps or ()))
    )
    if not wanted:
        raise NoCheckpoint(f"the trash of {run.store.url} is empty")
    back: list[int] = []
    failed: dict[int, HoldfastError] = {}
    for step in wanted:
        try:
            back.append(run.undelete(step).step)
        except HoldfastError as e:
            failed[step] = e
    if json:
        emit({"run": run.store.url, "restored": back, "failed": {str(s): str(e) for s, e in failed.items()}})
    elif back:
        line((f"brought back {count(len(back), 'checkpoint')}", "green"), f": {', '.join(map(str, back))}")
    for error in failed.values():
        fail(error)
    if failed:
        raise typer.Exit(code_of(next(iter(failed.values()))))
