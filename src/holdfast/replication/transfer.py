"""Copy a run, or one of its checkpoints, from one store to another; a second call copies what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.catalog.checkpoints import Entry, entries
from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import CHECKPOINTS, DATA, packed_key
from holdfast.catalog.lease import acquire
from holdfast.catalog.verify import Problem
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import CommitConflict, IntegrityError, NoCheckpoint
from holdfast.format.manifest import Manifest
from holdfast.format.packed import Pack
from holdfast.replication.copying import (
    BY_TURNS,
    Copied,
    copy_checkpoint,
    copy_identity,
    copy_tags,
    read_manifest,
)
from holdfast.replication.segments import copy_log
from holdfast.stores import Store

__all__ = ["Transferred", "transfer"]


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a copy came to: the steps that the target holds whole now, what was written for it, and what could not be
    copied, by the key of its manifest."""

    steps: tuple[int, ...]
    copied: Copied
    problems: tuple[Problem, ...]


def transfer(
    source: Store,
    target: Store,
    which: int | str | None = None,
    *,
    pack: Pack | None = None,
    progress: Callable[[int], None] = lambda done: None,
    planned: Callable[[int], None] = lambda total: None,
    time: TimeSource | None = None,
) -> Transferred:
    """Copy a run, the newest checkpoint first, or one checkpoint of it, with its log and tags; every byte is verified.

    The target becomes the same run, or is it already; its lease is held meanwhile. What does not verify at the source
    is not copied, and does not stop the rest. `planned` is told how many bytes of tensors are missing, `progress` how
    many were copied.

    Raises:
        NoCheckpoint: the source has none, or not this one.
        StateError: the target holds another run.
        LeaseHeld: someone writes the target.
    """
    run = read_identity(source).run
    wanted = _wanted(source, run, which)
    copied = copy_identity(source, target)
    lease = acquire(target, time or SystemTime(), advice=BY_TURNS)
    try:
        found, problems = _read(source, wanted)
        planned(_missing_bytes(target, [manifest for _, manifest in found]))
        steps: list[int] = []
        attempts: set[str] = set()
        copied += Copied(*copy_log(source, target))
        for entry, manifest in found:
            lease.check()
            try:
                copied += copy_checkpoint(source, target, entry.key, pack=pack, progress=progress)
            except (IntegrityError, CommitConflict) as e:
                if entry.key in source.names(CHECKPOINTS):  # else it was removed meanwhile
                    problems.append(Problem(entry.key, str(e)))
                continue
            steps.append(entry.step)
            attempts.add(manifest.attempt)
        copied += copy_tags(source, target, None if which is None else attempts)
        return Transferred(tuple(sorted(steps)), copied, tuple(problems))
    finally:
        lease.release()


def _wanted(source: Store, run: str, which: int | str | None) -> list[Entry]:
    if which is not None:
        return [History(source, run).resolve(which)[0]]
    found = entries(source)
    if not found:
        raise NoCheckpoint(f"{source.url} has no checkpoint, so there is nothing to copy")
    return found[::-1]


def _read(source: Store, wanted: Sequence[Entry]) -> tuple[list[tuple[Entry, Manifest]], list[Problem]]:
    found: list[tuple[Entry, Manifest]] = []
    problems: list[Problem] = []
    for entry in wanted:
        try:
            found.append((entry, read_manifest(source, entry.key)[1]))
        except IntegrityError as e:
            if entry.key in source.names(CHECKPOINTS):
                problems.append(Problem(entry.key, str(e)))
    return found, problems


def _missing_bytes(target: Store, manifests: Sequence[Manifest]) -> int:
    """Return the bytes of tensors that the target has not, by its listing."""
    there = {o.key: o.size for o in target.list(DATA)}
    files = {f.key: f for m in manifests for part in m.parts.values() for f in part.files}
    missing = [f for f in files.values() if there.get(f.key) != f.size and packed_key(f.key) not in there]
    return sum(f.size - f.header_size for f in missing)
