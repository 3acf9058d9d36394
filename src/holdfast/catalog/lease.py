"""Who writes a run: a lease by generations, with fencing.

The holder is the creator of the highest-numbered object under `lease/`. Taking a run over is creating the next number,
which only one rival can do. A holder looks for a higher number before and after each commit, so a holder that was
paused past its lease and then woke up cannot have a commit acknowledged.
Source of the idea: Litestream's lease file and Kleppmann, "How to do distributed locking" (fencing tokens).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import weakref
from typing import Annotated

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.catalog.keys import LEASES, is_lease_key, lease_key
from holdfast.catalog.last_room import create_in_last_room
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import (
    AlreadyExists,
    HoldfastError,
    IntegrityError,
    LeaseHeld,
    LeaseLost,
    NotFound,
    StoreError,
)
from holdfast.core.processes import has_ended, namespace, process_start
from holdfast.format.documents import Moment, Name, StepNumber, decode_document
from holdfast.format.sealed import seal, unseal
from holdfast.stores import ObjectInfo, Store

__all__ = ["Lease", "LeaseDoc", "acquire", "holder", "is_held", "writer_of"]

logger = logging.getLogger("holdfast")

LEASE_SECONDS = 60.0

_Process = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # what the system takes for a process


class LeaseDoc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One generation of a run's lease. `namespace` names the machine boot and process namespace that `pid` is in.

    `writer` is the process that makes the holder's snapshots durable, 0 when the holder does that itself; it may
    outlive the holder to finish the last one.
    """

    generation: StepNumber
    host: Name
    pid: _Process
    started: Name
    namespace: Name
    acquired: Moment
    expires: Moment
    released: bool = False
    writer: _Process = 0
    writer_started: Name = ""

    @property
    def owner_let_go(self) -> bool:
        """Whether it was released, by an owner that is known."""
        return self.released and self.pid > 0

    @property
    def owner(self) -> str:
        return f"process {self.pid} on {self.host}"


def _holder_has_ended(doc: LeaseDoc) -> bool:
    """Return True only when the holder is known to be gone: same process namespace, and no such process; or this
    very process, which has let go of it."""
    if doc.namespace != namespace():
        return False
    if doc.pid == os.getpid() and process_start(doc.pid) in ("", doc.started):
        return not any(lease.is_of(doc) for lease in list(_leases))
    return has_ended(doc.pid, doc.started)


def _is_finishing(doc: LeaseDoc, now: float) -> bool:
    """Return whether the holder is gone and its writer still makes the last snapshot durable."""
    return (
        not doc.released
        and doc.writer != 0
        and doc.expires > now
        and _holder_has_ended(doc)
        and not has_ended(doc.writer, doc.writer_started)
    )


def _held_message(store: Store, doc: LeaseDoc, advice: str, time: TimeSource) -> str:
    here, now = doc.namespace == namespace(), time.now()
    if here and doc.pid == os.getpid():
        return f"{store.url} is being written by another Checkpointer of this process; close() that one first"
    message = f"{store.url} is being written by {doc.owner} (for {now - doc.acquired:.0f} s). {advice}"
    gone = f"; if that machine is gone, its lease ends in {doc.expires - now:.0f} s"
    return message if here else message + gone


def holder(store: Store) -> LeaseDoc | None:
    """Return the newest lease of a run, held or released, or None when nobody ever wrote it."""
    found = _leases_in(store)
    while found:
        key = found.pop().key
        try:
            body = unseal(read_document(store, key), key)
        except NotFound:  # its holder cleaned up while we looked
            continue
        return decode_document(body, LeaseDoc, key, "a lease")
    return None


def _leases_in(store: Store) -> list[ObjectInfo]:
    return [o for o in store.list(LEASES) if is_lease_key(o.key)]


def _holder_or_lapsed(store: Store, now: float) -> LeaseDoc | None:
    """Like `holder`; a damaged lease counts as ended when nobody has renewed it for a term."""
    try:
        return holder(store)
    except IntegrityError as e:
        newest = _leases_in(store)[-1]
        remaining = newest.modified + LEASE_SECONDS - now
        if remaining > 0:
            raise LeaseHeld(f"{e}; if nobody writes this run, it can be taken in {remaining:.0f} s") from e
        logger.warning("%s; nobody has renewed it for a while, so the run is taken over", e)
        generation = int(newest.key.removeprefix(f"{LEASES}/").partition(".")[0])
        return LeaseDoc(generation, "unknown", 0, "", "", newest.modified, newest.modified, released=True)


def is_held(doc: LeaseDoc, now: float) -> bool:
    """Return whether a lease is in force: its process, or the writer that finishes for it, lives on this machine, or it
    is elsewhere and has not expired."""
    if doc.released:
        return False
    if _holder_has_ended(doc):
        return _is_finishing(doc, now)
    return doc.namespace == namespace() or doc.expires > now


def writer_of(store: Store, now: float) -> LeaseDoc | None:
    """Return who writes a run now, for a look at it, or None. A lease that does not verify names nobody, and is
    reported."""
    try:
        found = holder(store)
    except IntegrityError as e:
        logger.warning("who writes %s is not known: %s", store.url, e)
        return None
    return found if found is not None and is_held(found, now) else None


def acquire(
    store: Store,
    time: TimeSource | None = None,
    *,
    heartbeat: bool = True,
    wait: bool = False,
    writer: int = 0,
    above: int = 0,
    advice: str = "Stop that process, or use another directory",
) -> Lease:
    """Take the run's lease; `writer` is the process that commits for this one. In a copy of a run the generation is
    to be `above` those that its log speaks of already. `advice` is what to do when another process holds it.

    A lease whose process is gone from this machine is taken at once, or as soon as its writer has finished the last
    checkpoint; one from elsewhere when it has expired. With `wait` that end is waited for: a job that was moved to
    another machine starts, unless the old one still renews.

    Raises:
        LeaseHeld: another living process holds it; the message says who and until when.
    """
    time = time or SystemTime()
    present = _holder_or_lapsed(store, time.now())
    if present is not None:
        present = _awaited(store, present, time, wait=wait)
    if present is not None and is_held(present, time.now()):
        raise LeaseHeld(_held_message(store, present, advice, time))
    generation = max(present.generation if present is not None else 0, above) + 1
    doc = _new_doc(generation, time.now(), writer)
    lease = Lease(store, doc, time)
    lease.displaced = present is not None and not (present.owner_let_go or _holder_has_ended(present))
    try:
        create_in_last_room(store, lease_key(generation), seal(msgspec.json.encode(doc)))
        lease.check()  # a rival that deleted what was seen here has left its number, or a lower one, free
        store.delete([o.key for o in _leases_in(store) if o.key < lease_key(generation)])
    except (AlreadyExists, LeaseLost):
        lease.forget()
        rival = holder(store)
        raise LeaseHeld(
            f"{store.url} was just taken by {rival.owner if rival else 'another process'}"
        ) from None
    except BaseException:
        with contextlib.suppress(HoldfastError):
            if holder(store) == doc:  # it may be there although the store said that it failed
                lease.release()
        lease.forget()
        raise
    if heartbeat:
        lease.start_heartbeat()
    return lease


def _new_doc(generation: int, now: float, writer: int) -> LeaseDoc:
    pid = os.getpid()
    return LeaseDoc(
        generation,
        socket.gethostname(),
        pid,
        process_start(pid),
        namespace(),
        acquired=now,
        expires=now + LEASE_SECONDS,
        writer=writer,
        writer_started=process_start(writer) if writer else "",
    )


def _awaited(store: Store, present: LeaseDoc, time: TimeSource, *, wait: bool) -> LeaseDoc | None:
    """Wait for a lease whose end is in sight: that of a writer which finishes, and with `wait` one from elsewhere.

    Return the newest lease.
    """
    now = time.now()
    if _is_finishing(present, now):
        logger.warning(
            "waiting for writer %d of %s: it finishes the last checkpoint", present.writer, store.url
        )
        return _outwait(store, present, time, every_seconds=0.02)
    if wait and present.namespace != namespace() and is_held(present, now):
        logger.warning(
            "%s is held by %s; waiting up to %.0f s for that lease to end",
            store.url, present.owner, min(present.expires - now, LEASE_SECONDS),
        )  # fmt: skip
        return _outwait(store, present, time, every_seconds=1.0)
    return present


def _outwait(store: Store, present: LeaseDoc, time: TimeSource, *, every_seconds: float) -> LeaseDoc | None:
    """Wait for a lease to end; return the newest lease, at once when its holder proves alive.

    One that was not renewed for a term by this machine's clock has ended, whatever a clock that is ahead had made of
    it.
    """
    seen = time.monotonic()
    while is_held(present, time.now()):
        if time.monotonic() - seen > LEASE_SECONDS:
            return msgspec.structs.replace(present, expires=time.now())
        time.sleep(every_seconds)
        now = holder(store)
        if now is None or (now.generation, now.released) != (present.generation, present.released):
            return now  # released or taken
        if now != present and not _is_finishing(now, time.now()):
            return now  # renewed by a living holder
        if now != present:
            present, seen = now, time.monotonic()
    return present


class Lease:
    """The right to write a run; renewed in the background, once the heartbeat is started, until `release`."""

    def __init__(self, store: Store, doc: LeaseDoc, time: TimeSource) -> None:
        self._store = store
        self._doc = doc
        self._time = time
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.displaced = False  # the holder before may still live: its time was over
        _leases.add(self)

    def start_heartbeat(self) -> None:
        """Renew from now on, on a thread of its own."""
        beat = threading.Thread(
            target=_beat, args=(weakref.ref(self), self._stop), name="holdfast-lease", daemon=True
        )
        beat.start()

    def forget(self) -> None:
        """Hold the run no longer, without a word to the store."""
        self._stop.set()

    def is_of(self, doc: LeaseDoc) -> bool:
        """Return whether `doc` is what this lease wrote, and it is held."""
        mine = self._doc
        return not self._stop.is_set() and (mine.generation, mine.acquired) == (doc.generation, doc.acquired)

    @property
    def doc(self) -> LeaseDoc:
        """What the store holds of this lease."""
        return self._doc

    def change_writer(self, pid: int) -> None:
        """Say that another process commits for this one from now on."""
        with self._lock:
            self._doc = msgspec.structs.replace(
                self._doc, writer=pid, writer_started=process_start(pid) if pid else ""
            )
        self.renew()

    @property
    def generation(self) -> int:
        """The fencing token: it grows with every taking of the run."""
        return self._doc.generation

    def check(self) -> None:
        """Raise LeaseLost when another process has taken the run over, or it is no longer there."""
        newest = max((o.key for o in _leases_in(self._store)), default="")
        mine = lease_key(self.generation)
        if newest < mine:
            raise LeaseLost(
                f"{self._store.url}: the lease of this process is no longer there, so the run was moved, removed or "
                "put back while it was written; nothing more is committed from this one"
            )
        if newest > mine:
            taker = holder(self._store)
            raise LeaseLost(
                f"{self._store.url} was taken over by {taker.owner if taker else 'another process'}; "
                "nothing more is committed from this one. Its earlier checkpoints are intact"
            )

    def renew(self) -> None:
        """Put the lease's end off by another term."""
        with self._lock:
            if self._stop.is_set():
                return
            self._doc = msgspec.structs.replace(self._doc, expires=self._time.now() + LEASE_SECONDS)
            self._store.replace(lease_key(self.generation), seal(msgspec.json.encode(self._doc)))

    def store_time(self) -> float:
        """Renew, and return the time by the store's own clock, which dates everything that lies there."""
        self.check_and_renew()
        return self._store.info(lease_key(self.generation)).modified

    def release(self) -> None:
        """Give the run up, so that another process may take it at once."""
        with self._lock:
            if self._stop.is_set():
                return
            self._stop.set()
            if os.getpid() not in (self._doc.pid, self._doc.writer):
                return  # a forked child never held it
            doc = msgspec.structs.replace(self._doc, released=True)
            with contextlib.suppress(StoreError):  # it expires by itself
                self._store.replace(lease_key(self.generation), seal(msgspec.json.encode(doc)))

    def check_and_renew(self) -> None:
        """Renew, unless the run was taken over."""
        try:
            self.check()
        except LeaseLost:
            self._stop.set()
            return
        self.renew()


_leases: weakref.WeakSet[Lease] = weakref.WeakSet()  # that this process holds


def _beat(lease: weakref.ref[Lease], stop: threading.Event) -> None:
    """Renew until the lease is released or forgotten."""
    while not stop.wait(LEASE_SECONDS / 3):
        held = lease()
        if held is None:
            return
        with contextlib.suppress(StoreError):  # a store that is away: the next commit will say so
            held.check_and_renew()
        del held
