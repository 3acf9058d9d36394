"""`holdfast prune`: delete what a retention rule no longer keeps, after showing what that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from holdfast.analysis.runs import freed_bytes
from holdfast.cli.options import Grace, Json, Now, RunPath, Yes, grace_of
from holdfast.cli.output import confirm, emit, line, note, text
from holdfast.cli.table import Column, show_table
from holdfast.cli.words import age, bytes_, count
from holdfast.core.errors import StateError
from holdfast.core.units import format_seconds, parse_seconds
from holdfast.policies import Decision
from holdfast.policies.parse import parse_rule
from holdfast.run import GRACE, Run

__all__ = ["ask_first", "prune", "way_back"]

_STYLES = {"keep": "green", "drop": "bold red", "demote": "yellow"}


def prune(
    path: RunPath,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="RULE",
            help="What to keep, such as 'last(3) | every(steps=1000)'.",
            show_default=False,
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show what would happen and change nothing.")
    ] = False,
    grace: Grace = GRACE,
    now: Now = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete the checkpoints that a retention rule does not keep.

    The plan is shown first, with the reason for each. Tagged checkpoints, the newest, the newest verified one
    and the one the run resumed from are kept whatever the rule says. What is deleted stays in the trash for a
    day (--grace), from where `holdfast undo` brings it back.
    """
    run = Run(path)
    rule, grace = parse_rule(keep), grace_of(grace, now=now)
    plan = run.plan(rule)
    going = [d.step for d in plan if d.action == "drop"]
    idle = not going and not any(d.action == "demote" for d in plan)
    if not json:
        _print_plan(run, plan, going)
    if not dry_run and not idle:
        ask_first(yes, f"Delete {count(len(going), 'checkpoint')}?" if going else "Keep only their weights?")
        done = run.prune(rule, grace=grace)
        if [(d.step, d.action) for d in done] != [(d.step, d.action) for d in plan]:
            note(("the run changed meanwhile; what was done is what the rule says now", "yellow"))
        plan = done
        if not json:
            line(
                ("done", "green"),
                f": {count(len(run), 'checkpoint')} left",
                *(way_back(grace) if going else ()),
            )
    if json:
        emit(
            {
                "run": run.store.url,
                "rule": repr(rule),
                "dry_run": dry_run,
                "plan": [
                    {"step": d.step, "attempt": d.attempt, "action": d.action, "reasons": d.reasons}
                    for d in plan
                ],
            }
        )


def ask_first(yes: bool, question: str) -> None:
    """Return when the user agrees. Raises StateError when nobody can be asked, Exit when the answer is no."""
    if yes:
        return
    answer = confirm(question)
    if answer is None:
        raise StateError("nobody can be asked here, because this is not a terminal; give --yes to go ahead")
    if not answer:
        line("nothing was changed")
        raise typer.Exit(0)


def way_back(grace: str) -> tuple[str, ...]:
    """Return how what was deleted is brought back; nothing where it was freed at once."""
    seconds = parse_seconds(grace)
    return (
        (f"; `holdfast undo` brings back what was deleted, for {format_seconds(seconds)}",) if seconds else ()
    )


def _print_plan(run: Run, plan: Sequence[Decision], going: Sequence[int]) -> None:
    columns = [
        Column("step", right=True),
        Column("saved", leaves=1),
        Column("size", right=True, leaves=2),
        Column("tags", leaves=3),
        Column(""),
        Column("why", elastic=True),
    ]
    records = {r.step: r for r in run.records()}
    rows: list[list[object]] = []
    for d in reversed(plan):
        record = records[d.step]
        rows.append(
            [
                text((d.step, "bold")),
                text((age(record.time), "dim")),
                bytes_(record.stored_bytes),
                text((", ".join(sorted(record.tags)), "cyan")),
                text((d.action, _STYLES[d.action])),
                "; ".join(d.reasons),
            ]
        )
    if rows:
        show_table(columns, rows)
    demoted = sum(d.action == "demote" for d in plan)
    size = bytes_(freed_bytes(run, going))
    line(
        f"{count(len(going), 'checkpoint')} of {len(plan)} to delete, about {size}",
        f"; {demoted} to keep as weights only" if demoted else "",
    )
