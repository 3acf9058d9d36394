"""`holdfast ls`: the checkpoints of a run, or the runs below a directory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from holdfast.analysis.runs import RunSummary, directions, find_runs, stored_bytes, summarize
from holdfast.catalog.lease import LeaseDoc, writer_of
from holdfast.cli.options import Json
from holdfast.cli.output import emit, line, plain, stdout, text
from holdfast.cli.table import Column, show_table
from holdfast.cli.words import age, bytes_, clock_document, count, number
from holdfast.core.errors import NotARun
from holdfast.core.records import CheckpointRecord
from holdfast.policies import Decision, best_of
from holdfast.policies.parse import parse_rule
from holdfast.run import Run
from holdfast.stores import name_of
from holdfast.stores.address import shown

__all__ = ["ls"]

METRICS_SHOWN = 4
NEWEST_SHOWN = 50
ACTION_STYLES = {"keep": "green", "drop": "red", "demote": "yellow"}


def ls(
    path: Annotated[
        str, typer.Argument(help="A run, or a directory or URL with runs below it.", show_default=False)
    ] = ".",
    keep: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Also show what this retention rule would keep, and why."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Show this metric; may be given several times.")
    ] = None,
    depth: Annotated[
        int, typer.Option(min=0, help="How many levels below a directory to look for runs.")
    ] = 4,
    all_: Annotated[
        bool, typer.Option("--all", help="On a terminal, show old checkpoints too, however many there are.")
    ] = False,
    json: Json = False,
) -> None:
    """List the checkpoints of a run, or the runs below a directory or the URL of an object store.

    The best value of a metric is marked where the run itself, or --keep, says which way is better.
    """
    try:
        run = Run(path)
    except NotARun:
        directory = name_of(path)
        if "://" not in directory and not os.path.isdir(directory):
            raise
        _list_runs(directory, depth, json=json)
        return
    rule = None if keep is None else parse_rule(keep)
    plan = {} if rule is None else {d.step: d for d in run.plan(rule)}
    records = run.records()
    if json:
        emit(_document(run, records, plan))
        return
    ways = directions(records, rule)
    best = {name: winners[0].step for name, mode in ways.items() if (winners := best_of(records, name, mode))}
    _print_head(run, path)
    chosen = metric or _relevant_metrics(records, list(ways))
    shown = records if all_ or not stdout().is_terminal else _of_interest(records, best.values())
    columns, rows = _table(shown, chosen, best, plan)
    if rows:
        line()
        hidden = show_table(columns, rows)
        if len(shown) < len(records):
            line((f"and {count(len(records) - len(shown), 'older one')}; --all shows them", "dim"))
        if hidden:
            line((f"not shown for want of width: {', '.join(hidden)}", "dim"))
    for step, error in run.broken.items():
        line((f"step {step} is broken: ", "bold red"), (error, "red"))


def _print_head(run: Run, path: str) -> None:
    writer = writer_of(run.store, time.time())
    line(
        (path, "bold"),
        f"  {count(len(run), 'checkpoint')}",
        (f", {len(run.broken)} broken", "bold red") if run.broken else "",
        f"  {bytes_(stored_bytes(run))} on disk",
        ("  written now by " + writer.owner, "yellow") if writer else "",
    )


def _of_interest(records: Sequence[CheckpointRecord], best: Collection[int]) -> Sequence[CheckpointRecord]:
    """Return what a person looks for in a long list: the newest, and of the older ones the tagged and the best."""
    if len(records) <= 2 * NEWEST_SHOWN:
        return records
    older = [r for r in records[:-NEWEST_SHOWN] if r.tags or r.step in best]
    return [*older, *records[-NEWEST_SHOWN:]]


def _table(
    records: Sequence[CheckpointRecord],
    metrics: Sequence[str],
    best: Mapping[str, int],
    plan: Mapping[int, Decision],
) -> tuple[list[Column], list[list[object]]]:
    columns = [
        Column("step", right=True),
        Column("epoch", right=True, leaves=5),
        Column("saved", leaves=1),
        *(_metric_column(name, i) for i, name in enumerate(metrics)),
        Column("size", right=True, leaves=2),
        Column("new", right=True, leaves=8),
        Column("tags"),
        Column("kept" if plan else ""),
        Column("why saved", elastic=True, leaves=9 if plan else 0),
        Column("why kept" if plan else "", elastic=True),
    ]
    rows = [_row(r, metrics, best, plan.get(r.step)) for r in reversed(records)]
    return columns, rows


def _metric_column(name: str, place: int) -> Column:
    return Column(plain(name), right=True, leaves=place + 3 if place else 0, elastic=True, keep_end=True)


def _row(
    record: CheckpointRecord, metrics: Sequence[str], best: Mapping[str, int], decision: Decision | None
) -> list[object]:
    return [
        (record.step, "bold"),
        record.clock.epoch or "",
        (age(record.time), "dim"),
        *(_value(record.metrics.get(m), is_best=best.get(m) == record.step) for m in metrics),
        bytes_(record.stored_bytes),
        (bytes_(record.new_bytes) if record.new_bytes != record.stored_bytes else "", "dim"),
        [(", ".join(sorted(record.tags)), "cyan"), (" weights only" if record.demoted else "", "yellow")],
        (decision.action, ACTION_STYLES[decision.action]) if decision else "",
        "; ".join(record.reasons),
        "; ".join(decision.reasons) if decision else "",
    ]


def _value(value: float | None, *, is_best: bool) -> tuple[str, str]:
    if value is None:
        return "", ""
    style = "bold green" if is_best else "" if math.isfinite(value) else "red"
    return number(value) + ("*" if is_best else ""), style


def _relevant_metrics(records: Sequence[CheckpointRecord], directed: list[str]) -> list[str]:
    """Return the metrics whose better side is known, then those that most checkpoints have."""
    seen: dict[str, int] = {}
    for record in records:
        for name in record.metrics:
            seen[name] = seen.get(name, 0) + 1
    first = [name for name in directed if name in seen]
    others = sorted((name for name in seen if name not in first), key=lambda name: -seen[name])
    return (first + others)[:METRICS_SHOWN]


def _document(
    run: Run, records: Sequence[CheckpointRecord], plan: Mapping[int, Decision]
) -> dict[str, object]:
    return {
        "run": run.store.url,
        "id": run.id,
        "size_bytes": stored_bytes(run),
        "writer": _writer(writer_of(run.store, time.time())),
        "tags": run.tags,
        "checkpoints": [_record(r, plan.get(r.step)) for r in records],
        "broken": [{"step": step, "error": str(error)} for step, error in run.broken.items()],
    }


def _record(record: CheckpointRecord, decision: Decision | None) -> dict[str, object]:
    found: dict[str, object] = {
        "step": record.step,
        "attempt": record.attempt,
        "time": record.time,
        "clock": clock_document(record.clock),
        "metrics": record.metrics,
        "tags": sorted(record.tags),
        "reasons": record.reasons,
        "stored_bytes": record.stored_bytes,
        "new_bytes": record.new_bytes,
        "verified": record.verified,
        "demoted": record.demoted,
    }
    if decision is not None:
        found["plan"] = {"action": decision.action, "reasons": decision.reasons}
    return found


def _writer(writer: LeaseDoc | None) -> dict[str, object] | None:
    return None if writer is None else {"host": writer.host, "pid": writer.pid, "since": writer.acquired}


def _list_runs(directory: str, depth: int, *, json: bool) -> None:
    runs = [summarize(path) for path in find_runs(directory, depth)]
    if json:
        place = directory if "://" in directory else os.path.abspath(directory)
        emit({"directory": place, "runs": [_summary(r) for r in runs]})
        return
    if not runs:
        place = shown(directory) if "://" in directory else directory
        raise NotARun(f"{place} is not a run and holds none within {depth} levels; --depth N looks deeper")
    columns = [
        Column("run"),
        Column("checkpoints", right=True),
        Column("newest", right=True),
        Column("saved", leaves=1),
        Column("size", right=True),
        Column("written now by", elastic=True, leaves=2),
        Column(""),
    ]
    sound = [r for r in runs if r.error is None]
    if sound:
        show_table(columns, [_run_row(r, directory) for r in sound])
    for r in runs:
        if r.error is not None:
            line((f"{_below(r.path, directory)} is broken: ", "bold red"), (r.error, "red"))
    line((f"{count(len(runs), 'run')}, {bytes_(sum(r.size_bytes for r in runs))} on disk", "dim"))


def _below(path: str, directory: str) -> str:
    """Return where a run lies as seen from the directory or URL that was looked through."""
    if "://" in path:
        return os.path.relpath(urlsplit(path).path or "/", urlsplit(directory).path or "/")
    return os.path.relpath(path, directory)


def _run_row(run: RunSummary, directory: str) -> list[object]:
    return [
        text((_below(run.path, directory), "bold")),
        run.checkpoints,
        "" if run.newest_step is None else f"step {run.newest_step}",
        text(("" if run.newest_time is None else age(run.newest_time), "dim")),
        bytes_(run.size_bytes),
        text((run.writer.owner if run.writer else "", "yellow")),
        text((f"{run.broken} broken" if run.broken else "", "red")),
    ]


def _summary(run: RunSummary) -> dict[str, object]:
    return {
        "run": run.path if "://" in run.path else Path(os.path.abspath(run.path)).as_uri(),
        "checkpoints": run.checkpoints,
        "broken": run.broken,
        "newest_step": run.newest_step,
        "newest_time": run.newest_time,
        "size_bytes": run.size_bytes,
        "writer": _writer(run.writer),
        "error": None if run.error is None else str(run.error),
    }
