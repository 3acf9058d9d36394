"""Runs as a person asks about them: where they are, how large, which way their metrics go, what a deletion
would free.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from holdfast.catalog.keys import RUN
from holdfast.catalog.lease import LeaseDoc, writer_of
from holdfast.checkpoint import Checkpoint
from holdfast.core.errors import HoldfastError
from holdfast.core.records import CheckpointRecord
from holdfast.policies import Mode, Rule
from holdfast.policies.best import Best
from holdfast.run import Run
from holdfast.stores import find_below

__all__ = ["RunSummary", "data_bytes", "directions", "find_runs", "freed_bytes", "stored_bytes", "summarize"]

_NUMBER = r"([-+.\d]+(?:e[-+]?\d+)?)"
_IMPROVED = re.compile(rf"(.+) improved to {_NUMBER} \(was {_NUMBER}\)", re.ASCII)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in one line. `error` says why it could not be read, and then the rest is empty."""

    path: str
    checkpoints: int = 0
    broken: int = 0
    newest_step: int | None = None
    newest_time: float | None = None
    size_bytes: int = 0
    writer: LeaseDoc | None = None
    error: HoldfastError | None = None


def find_runs(directory: str, depth: int) -> Iterator[str]:
    """Yield the paths of the runs in a directory and up to `depth` levels below, sorted; links are not followed. Of the
    URL of an object store, yield the URLs of the runs there.

    Raises:
        StoreError: an object store cannot be listed.
    """
    if "://" in directory:
        yield from find_below(directory, RUN, depth) or ()
        return
    try:
        entries = sorted(os.scandir(directory), key=lambda e: e.name)
    except OSError:  # a directory that may not be read holds no run for us
        return
    if any(e.name == RUN and e.is_file(follow_symlinks=False) for e in entries):
        yield directory
        return
    for entry in entries:
        if depth > 0 and entry.is_dir(follow_symlinks=False):
            yield from find_runs(entry.path, depth - 1)


def summarize(path: str) -> RunSummary:
    """Return a run in one line; what is wrong with it is part of the answer."""
    try:
        run = Run(path)
        newest = run.history.plain_record(run.steps[-1]) if run.steps else None
        return RunSummary(
            path,
            checkpoints=len(run),
            broken=len(run.broken),
            newest_step=None if newest is None else newest.step,
            newest_time=None if newest is None else newest.time,
            size_bytes=stored_bytes(run),
            writer=writer_of(run.store, time.time()),
        )
    except HoldfastError as e:
        return RunSummary(path, error=e)


def stored_bytes(run: Run) -> int:
    """Return the size in bytes of a run's manifests and of the data that they need, each file once.

    What a save that failed has left behind is not counted; the next writer frees it.
    """
    return run.history.stored_bytes


def data_bytes(checkpoint: Checkpoint, part: str | None = None) -> int:
    """Return the bytes of tensor data in the files that a checkpoint, or one part of it, refers to."""
    parts = checkpoint.seen.parts.items()
    files = {f.key: f.size - f.header_size for name, p in parts if part in (None, name) for f in p.files}
    return sum(files.values())


def freed_bytes(run: Run, steps: Collection[int]) -> int:
    """Return the bytes of the data files that only these checkpoints of a run refer to."""
    sizes: dict[str, int] = {}
    kept: set[str] = set()
    for step in run.steps:
        needed = run.history.summary(step).sizes()
        if step in steps:
            sizes |= needed
        else:
            kept |= needed.keys()
    return sum(size for key, size in sizes.items() if key not in kept)


def directions(records: Iterable[CheckpointRecord], rule: Rule | None = None) -> dict[str, Mode]:
    """Return, for the metrics of which it is known, whether less or more is better.

    It is known from the rule, and from the reasons that the run's own trigger gave when it saved; a metric's
    name says nothing.
    """
    known: dict[str, Mode] = {}
    for record in records:
        for reason in record.reasons:
            found = _IMPROVED.fullmatch(reason)
            with contextlib.suppress(ValueError):  # a reason is data: "1.2.3" matches as well
                if found is not None and (new := float(found[2])) != (old := float(found[3])):
                    known[found[1]] = "min" if new < old else "max"
    for leaf in rule.leaves() if rule is not None else ():
        if isinstance(leaf, Best):
            known[leaf.metric] = leaf.mode
    return known
