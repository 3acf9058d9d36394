"""`holdfast tag` and `holdfast untag`: names for checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, line
from holdfast.cli.targets import open_target
from holdfast.core.errors import PolicyError
from holdfast.run import Run

__all__ = ["tag", "untag"]


def tag(
    path: Annotated[str, typer.Argument(metavar="RUN", help="A run, or RUN@STEP.", show_default=False)],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The tag, such as deployed.", show_default=False)
    ],
    which: Annotated[
        str | None,
        typer.Argument(metavar="[STEP|TAG]", help="What to tag; the newest by default.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Name a checkpoint, or move the name there. What is tagged is never pruned."""
    run, step = open_target(path)
    if step is not None and which not in (None, str(step)):
        raise PolicyError(f"what to tag is said twice: @{step}, and then {which}; name one of them")
    run.tag(name, which if which is not None else "latest" if step is None else step)
    _report(run, name, run.tags.get(name), json=json)


def untag(
    path: RunPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tag to remove.", show_default=False)],
    json: Json = False,
) -> None:
    """Remove a tag. The checkpoint stays."""
    run = Run(path)
    run.untag(name)
    _report(run, name, None, json=json)


def _report(run: Run, name: str, step: int | None, *, json: bool) -> None:
    if json:
        emit({"run": run.store.url, "tag": name, "step": step, "tags": run.tags})
    else:
        line((name, "cyan"), " is removed" if step is None else f" is step {step}")
