"""`holdfast verify`: read every byte and say what is wrong."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from holdfast.analysis.runs import data_bytes
from holdfast.catalog.verify import Problem
from holdfast.cli.exits import INTEGRITY
from holdfast.cli.options import Json, Trusted
from holdfast.cli.output import emit, line, progress
from holdfast.cli.targets import open_target
from holdfast.cli.words import bytes_, count
from holdfast.core.errors import NoCheckpoint, Untrusted
from holdfast.core.units import format_seconds
from holdfast.run import Run

__all__ = ["verify"]


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PATH[@STEP|@TAG]", help="A run, or one of its checkpoints.", show_default=False
        ),
    ],
    trust: Trusted = None,
    json: Json = False,
) -> None:
    """Read every byte and compare it with what was committed.

    Exits with 4 when anything is wrong, and names it.
    """
    run, which = open_target(target, trust)
    steps = sorted({*run.steps, *run.broken}) if which is None else [_step(run, which)]
    if not steps:
        raise NoCheckpoint(f"{run.store.url} has no checkpoint, so there is nothing to verify")
    begun = time.monotonic()
    done = 0
    with progress("verifying", sum(_size(run, s) for s in steps if s in run.steps)) as advance:

        def read(size: int) -> None:
            nonlocal done
            done += size
            advance(size)

        found = {step: run.verify([step], read)[step] for step in steps}
    beside = run.verify_beside() if which is None else []
    seconds = time.monotonic() - begun
    bad = sum(1 for problems in found.values() if problems)
    if json:
        emit(_document(run, found, beside, done, seconds))
    else:
        _print_problems(run.store.url, found, beside)
        rate = f"{bytes_(done)} read in {format_seconds(seconds)}, {bytes_(int(done / max(seconds, 1e-9)))}/s"
        if bad or beside:
            line((f"{bad} of {count(len(steps), 'checkpoint')} wrong", "bold red"), f"  {rate}")
        else:
            line((f"{count(len(steps), 'checkpoint')} verified", "bold green"), f"  {rate}")
    if bad or beside:
        raise typer.Exit(INTEGRITY)


def _size(run: Run, step: int) -> int:
    try:
        return data_bytes(run[step])
    except Untrusted:
        return 0


def _step(run: Run, which: int | str) -> int:
    return which if isinstance(which, int) and which in run.broken else run.history.resolve(which)[1].step


def _print_problems(url: str, found: dict[int, list[Problem]], beside: list[Problem]) -> None:
    for step, problems in found.items():
        for problem in problems:  # what is said of the whole checkpoint begins with its step
            line((f"step {step}: ", "bold red"), problem.message.removeprefix(f"step {step} of {url} "))
    for problem in beside:
        line((f"{problem.key.partition('/')[0]}: ", "bold red"), problem.message)


def _document(
    run: Run, found: dict[int, list[Problem]], beside: list[Problem], done: int, seconds: float
) -> dict[str, object]:
    problems = [{"step": s, "key": p.key, "message": p.message} for s, each in found.items() for p in each]
    problems += [{"step": None, "key": p.key, "message": p.message} for p in beside]
    return {
        "run": run.store.url,
        "verified": [s for s, each in found.items() if not each],
        "problems": problems,
        "read_bytes": done,
        "seconds": seconds,
    }
