"""The session of a rank that does not hold the run: it writes its share of every save, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import msgspec

from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.lease import Lease, LeaseDoc
from holdfast.catalog.runlog import LogWriter
from holdfast.catalog.tidiness import Tidiness
from holdfast.core.clock import TimeSource
from holdfast.core.errors import RanksDisagree
from holdfast.distributed.meeting import Meeting
from holdfast.format.events import Event
from holdfast.format.manifest import Manifest
from holdfast.loop.session import Begun, SaveOrder, Session
from holdfast.loop.upkeep import Upkeep
from holdfast.policies import Rule
from holdfast.policies.best import Best
from holdfast.saving.image import Image
from holdfast.saving.job import Base, Host
from holdfast.stores import Store

__all__ = ["Following"]


class _Unwritten(LogWriter):
    """A log that rank 0 keeps for all."""

    def record(self, event: Event) -> None:
        pass


class Following(Session):
    """A run that another process, rank 0 of the same launch, holds for this one too.

    Raises:
        RanksDisagree: rank 0 does not take the run up in time, or another one.
    """

    def __init__(self, store: Store, time: TimeSource, meeting: Meeting, host: Host) -> None:
        self.store = store
        self.time = time
        self.parent = None
        self._closed = self._afresh = False
        self._host = host
        self._vouched = ""
        self.meeting: Meeting | None = meeting
        self._newest: Base | None = None  # what the next checkpoint is built on
        meeting.writer = host.pid
        opening = meeting.join()
        self.identity = read_identity(store)
        if self.identity.run != opening.run:
            raise RanksDisagree(
                f"{store.url}: rank 0 holds the run {opening.run}, here is {self.identity.run}"
            )
        now = time.now()
        doc = LeaseDoc(opening.generation, socket.gethostname(), os.getpid(), "", "", now, now)
        self.lease = Lease(store, doc, time)
        self.history = History(store, self.identity.run)
        self._tidiness = Tidiness(self.history, self.identity.run, self.lease)
        self.log = _Unwritten(store, f"g{opening.generation:012d}")
        self.upkeep = Upkeep(self.history, self.lease, self.log, self._tidiness, time)
        host.start(store, self.lease, company=meeting.company)

    def begin(self, image: Image, order: SaveOrder, *, attempt: str = "", wave: int = 0) -> Begun:
        job = self._job(order, attempt or self.next_attempt(order.clock.step), wave)
        job = msgspec.structs.replace(job, agreement=image.agreement)
        self._host.begin(job, image)
        return Begun(job, image)

    def ahead(self, image: Image, order: SaveOrder, *, attempt: str, wave: int) -> None:
        job = msgspec.structs.replace(self._job(order, attempt, wave), more=True)
        self._host.begin(job, image)
        self._host.finish(job, image)

    def complete(self, begun: Begun) -> Manifest:
        try:
            done = self._host.finish(begun.job, begun.image)
        except BaseException:
            self._afresh = True
            raise
        self._afresh = False
        manifest = msgspec.structs.replace(begun.job.manifest, new_bytes=done.new_bytes)
        self.parent = manifest.attempt
        self._newest = Base(done.key, manifest.attempt)
        return manifest

    def _base(self) -> Base | None:
        if not self._afresh and self._newest is not None and self.parent in (None, self._newest.attempt):
            return self._newest
        return super()._base()

    def note_verified(self, manifest: Manifest) -> None:
        pass

    def label_and_retain(self, best: Best | None, keep: Rule | None, grace_seconds: int = 0) -> None:
        pass

    def remove_steps(self, steps: Sequence[int], why: dict[int, list[str]], *, grace_seconds: int = 0) -> int:
        return 0

    def abandon_after(self, step: int, why: str) -> list[int]:
        self.history.refresh()
        return []

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._host.close()
        if self.meeting is not None:
            self.meeting.leave()
        self.lease.forget()
