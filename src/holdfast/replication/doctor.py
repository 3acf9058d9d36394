"""What state a run is in, in words, and what to do about it. Nothing is changed, and no tensor is read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from holdfast.catalog.beside import verify_beside
from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import CHECKPOINTS, DATA, RUN, is_data_key, plain_key
from holdfast.catalog.lease import holder, is_held
from holdfast.catalog.proofs import Proofs
from holdfast.catalog.tags import read_tags
from holdfast.catalog.trash import list_trash
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import HoldfastError, IntegrityError
from holdfast.core.units import format_bytes, format_count, format_seconds
from holdfast.replication.looking import location_of, without_data
from holdfast.replication.record import read_mirrors
from holdfast.replication.status import run_status
from holdfast.stores import LocalStore, Store, name_of

__all__ = ["Finding", "diagnose"]

Level = Literal["good", "note", "warning", "wrong"]

SKEW_SECONDS = 60.0
SCRUB_SECONDS = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is so: `level` says how bad it is, `remedy` is the command that helps, or what to do."""

    topic: str
    level: Level
    text: str
    remedy: str = ""


def diagnose(store: Store, time: TimeSource | None = None) -> list[Finding]:
    """Return what is to be said of a run.

    Raises:
        NotARun: there is none.
        StoreError: the store does not answer.
    """
    now = (time or SystemTime()).now()
    name = shlex.quote(name_of(store.url))
    try:
        run = read_identity(store).run
    except IntegrityError as e:
        return [Finding(RUN, "wrong", str(e), f"holdfast repair {name} --from COPY")]
    history = History(store, run)
    found = [
        Finding(
            "run",
            "good",
            f"{name_of(store.url)} is run {run}, with {format_count(len(history.steps), 'checkpoint')}",
        )
    ]
    found += _writer(store, now)
    found += _checkpoints(store, history, name, now)
    found += _beside(store, history, name)
    found += _proofs(store, history, name, now)
    found += _left_overs(store, history, name, now)
    found += _room(store, history, name)
    found += _mirrors(store, run, name, time or SystemTime())
    found += _rights(store)
    return found


def _writer(store: Store, now: float) -> Iterator[Finding]:
    try:
        doc = holder(store)
    except IntegrityError as e:
        yield Finding(
            "writer", "warning", str(e), "the next writer takes the run over; nothing is to be done"
        )
        return
    if doc is None or doc.released:
        yield Finding("writer", "good", "nobody writes it now")
    elif is_held(doc, now):
        yield Finding(
            "writer", "good", f"it is being written by {doc.owner}, for {format_seconds(now - doc.acquired)}"
        )
    else:
        yield Finding(
            "writer", "note", f"{doc.owner} wrote it last and has ended without a word",
            "start training again: it takes the run over and goes on from the newest checkpoint",
        )  # fmt: skip


def _checkpoints(store: Store, history: History, name: str, now: float) -> Iterator[Finding]:
    mend = f"holdfast repair {name} --from COPY"
    for step, (entry, error) in sorted(history.broken.items()):
        yield Finding(entry.key, "wrong", str(error), f"{mend}, or holdfast rm {name} {step}")
    location = without_data(location_of(history, history.marks(history.tags())), store.list(DATA))
    for step in sorted(location.incomplete):
        yield Finding(
            f"step {step}", "wrong", f"step {step} is listed, and data of it is missing or cut off", mend
        )
    newest = location.newest_whole
    if newest is None:
        yield Finding("newest", "note", "there is no checkpoint to resume from")
        return
    age = now - newest.record.time
    yield Finding(
        "newest",
        "good",
        f"the newest checkpoint is step {newest.step}, saved {format_seconds(max(0.0, age))} ago",
    )
    ahead = max((o.modified for o in store.list(CHECKPOINTS)), default=now) - now
    if max(-age, ahead) > SKEW_SECONDS:
        ahead_by = format_seconds(max(-age, ahead))
        yield Finding(
            "clock", "warning", f"the newest checkpoint is {ahead_by} in the future: a clock is wrong, here or there",
            "set the clocks (timedatectl set-ntp true); leases and retention by time go by them",
        )  # fmt: skip


def _beside(store: Store, history: History, name: str) -> Iterator[Finding]:
    for problem in verify_beside(store):
        yield Finding(problem.key, "wrong", problem.message, f"holdfast repair {name} --from COPY")
    sound, trashed = history.tags(), {t.attempt for t in list_trash(store)}
    for tag, told in sorted(read_tags(store, lambda e: None).items()):
        if tag not in sound:
            text = f"the tag {tag!r} points to step {told.step}, attempt {told.attempt}, which is not there"
            back = f"undo {name} {told.step}" if told.attempt in trashed else f"repair {name} --from COPY"
            yield Finding(f"tag {tag}", "warning", text, f"holdfast {back}, or holdfast untag {name} {tag}")


def _proofs(store: Store, history: History, name: str, now: float) -> Iterator[Finding]:
    proofs = Proofs.of(store, history.run)
    there = {o.key for o in store.list(DATA)}
    needed = {key for step in history.steps for key in history.summary(step).sizes()}
    for key, problem in proofs.bad.items():
        if key in there and plain_key(key) in needed:
            yield Finding(
                key, "wrong", f"{problem} (as of the last scrub)", f"holdfast repair {name} --from COPY"
            )
    scrub = f"holdfast scrub {name} --older-than 7d"
    if not proofs.ended:
        begun = " in full" if proofs.objects else ""
        yield Finding("scrub", "note", f"it was never scrubbed{begun}", scrub)
        return
    age = now - proofs.ended
    level: Level = "note" if age > SCRUB_SECONDS else "good"
    yield Finding(
        "scrub",
        level,
        f"it was last scrubbed {format_seconds(max(0.0, age))} ago",
        scrub if level == "note" else "",
    )


def _left_overs(store: Store, history: History, name: str, now: float) -> Iterator[Finding]:
    known = history.known
    if known.complete(store):
        idle = [
            o for o in store.list(DATA) if is_data_key(plain_key(o.key)) and not known.needs(plain_key(o.key))
        ]
        if idle:
            size = format_bytes(sum(o.size for o in idle))
            files = format_count(len(idle), "data file")
            text = f"{files} of no checkpoint, {size}: saves that are under way or never ended"
            yield Finding("left-overs", "note", text, f"holdfast collect {name}, when nobody writes the run")
    trash = list_trash(store)
    if trash:
        due = sum(t.until <= now for t in trash)
        text = f"{format_count(len(trash), 'deleted checkpoint')} in the trash, {due} due to be freed"
        yield Finding(
            "trash",
            "note",
            text,
            f"holdfast trash {name} shows them; holdfast collect {name} frees what is due",
        )


def _room(store: Store, history: History, name: str) -> Iterator[Finding]:
    room, steps = store.room(), history.steps
    if room is None or not steps:
        return
    needed = max(history.summary(step).new_bytes for step in steps[-3:])
    if room < 2 * needed:
        text = f"{format_bytes(room)} are free, and a save takes about {format_bytes(needed)}"
        yield Finding(
            "room", "wrong" if room < needed else "warning", text,
            f"make room, or let go of checkpoints: holdfast prune {name} --keep RULE --dry-run",
        )  # fmt: skip


def _mirrors(store: Store, run: str, name: str, time: TimeSource) -> Iterator[Finding]:
    try:
        read_mirrors(store, run)
        places = run_status(store, time).locations[1:]
    except HoldfastError as e:
        yield Finding(
            "mirrors", "warning", f"how its mirrors stand is not known: {e}",
            f"training with mirrors= writes their list anew; until then name each: holdfast sync {name} --to MIRROR",
        )  # fmt: skip
        return
    for place in places:
        missing = f", {format_count(len(place.missing), 'checkpoint')} to come" if place.missing else ""
        text = f"the mirror {name_of(place.url)} is {place.state}{missing}{f': {place.error}' if place.error else ''}"
        level: Level = "good" if place.state == "ok" else "note" if place.state == "behind" else "warning"
        sync = {"good": "", "note": f"holdfast sync {name}"}
        remedy = sync.get(level, f"see to that place, then holdfast sync {name}")
        yield Finding(f"mirror {place.url}", level, text, remedy)
        if place.only_here:
            lost = format_count(len(place.only_here), "checkpoint")
            text = (
                f"{lost}, the newest of step {max(place.only_here)}, only in the mirror {name_of(place.url)}: lost by "
                "the run without a word"
            )
            back = f"holdfast repair {name} brings back those that training did not leave behind"
            yield Finding(f"only in {place.url}", "note", text, back)


def _rights(store: Store) -> Iterator[Finding]:
    if not isinstance(store, LocalStore):
        return
    needed, allows = os.R_OK | os.X_OK, "read"
    if os.statvfs(store.root).f_flag & os.ST_RDONLY:  # there nobody may write, whatever the rights are
        yield Finding(
            "rights", "warning", f"{store.root} lies on a file system that is mounted read-only",
            "find out why (dmesg) and mount it for writing; until then nothing is saved, mended or deleted there",
        )  # fmt: skip
    else:
        needed, allows = needed | os.W_OK, "read and written"
    for folder, _, names in os.walk(store.root):
        if not os.access(folder, needed):
            yield Finding(
                "rights",
                "warning",
                f"{folder} may not be {allows} by this user",
                f"chmod u+rwx {shlex.quote(folder)}",
            )
        for file in names:
            path = os.path.join(folder, file)
            if not os.access(path, os.R_OK):
                yield Finding(
                    "rights",
                    "wrong",
                    f"{path} may not be read by this user",
                    f"chmod u+r {shlex.quote(path)}",
                )
