"""The session: a run that this process holds the lease of, with everything that writes to it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.catalog.history import History
from holdfast.catalog.identity import create_run
from holdfast.catalog.lease import acquire
from holdfast.catalog.runlog import LogWriter, timeline
from holdfast.catalog.tidiness import Tidiness
from holdfast.core.clock import Clock, TimeSource
from holdfast.core.errors import CommitUnknown, PolicyError
from holdfast.distributed.meeting import Meeting
from holdfast.format.events import Event, Resumed, Saved, Started, Verified
from holdfast.format.manifest import FORMAT_VERSION, Manifest, clock_to_doc, floats_to_doc
from holdfast.format.signing import SigningKey
from holdfast.loop.upkeep import Upkeep
from holdfast.policies import Rule
from holdfast.policies.best import Best
from holdfast.saving.committing import Here
from holdfast.saving.environment import fingerprint
from holdfast.saving.image import Image
from holdfast.saving.job import Base, Host, Job, entry_of, with_files
from holdfast.saving.persist import new_attempt
from holdfast.saving.rank_job import refuse
from holdfast.stores import Store, prove_create

__all__ = ["SaveOrder", "Session"]

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """What a checkpoint says besides the state: clock, metrics, reasons, tags to set once it is committed."""

    clock: Clock
    metrics: dict[str, float]
    reasons: tuple[str, ...]
    tags: tuple[str, ...] = ()
    loop: dict[str, int] | None = None
    exact: bool = True
    self_contained: bool = False
    derive: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """A save that the host has taken on."""

    job: Job
    image: Image


class Session:
    """A run held for writing. Opening takes the lease (`wait`: once one from elsewhere has expired) and frees what dead
    writers left behind. With a key every commit is signed. `behind` is as for `Upkeep`.

    Raises:
        LeaseHeld: another living process writes the run.
        StoreError: the store's server overwrites what was to be created only if absent.
    """

    def __init__(
        self,
        store: Store,
        time: TimeSource,
        *,
        wait: bool = False,
        host: Host | None = None,
        key: SigningKey | None = None,
        behind: bool = False,
    ) -> None:
        self.store = store
        self.time = time
        self.parent: str | None = None
        self.next_attempt: Callable[[int], str] = lambda step: new_attempt()
        self.meeting: Meeting | None = None  # of several ranks
        self._closed = False
        self._afresh = False
        self._host = host or Here()
        try:
            self._vouched = prove_create(store)
            self.identity = create_run(store, time.now())
            self.lease = acquire(store, time, wait=wait, writer=self._host.pid)
        except BaseException:
            self._host.close()
            raise
        self.history = History(store, self.identity.run)
        self._tidiness = Tidiness(self.history, self.identity.run, self.lease)
        self.log = LogWriter(store, f"g{self.lease.generation:012d}")
        self.upkeep = Upkeep(self.history, self.lease, self.log, self._tidiness, time, key=key, behind=behind)
        try:
            self._host.start(store, self.lease, key)
            self.upkeep.take_over()
        except BaseException:
            self._host.close()
            self.lease.release()
            raise
        for step, (_, error) in self.history.broken.items():
            logger.warning(
                "step %d does not verify; until it is repaired or removed (holdfast rm), no data is freed that it "
                "may need: %s", step, error,
            )  # fmt: skip
        self.log.record(Started(time.now(), self.lease.generation, socket.gethostname(), os.getpid()))

    @property
    def shares_memory(self) -> bool:
        """Whether images are read by another process."""
        return self._host.pid != 0

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that took the run: it does not hold it, and none of the threads
        that save are here."""
        return self.lease.doc.pid != os.getpid()

    def refuse_forked(self) -> None:
        """Raise PolicyError in a process that was forked from the one that took the run."""
        if self.forked:
            raise PolicyError(
                f"the checkpointer of {self.store.url} belongs to process {self.lease.doc.pid}, from which this one "
                "was forked; to save here, make one of its own for another place"
            )

    def events(self) -> list[Event]:
        """Return the run's whole log, what this session recorded included."""
        self.log.flush()
        return self.history.events()

    def events_until(self, step: int) -> list[Event]:
        """Return what the log says of the run up to a step, abandoned branches left out."""
        return timeline([*self.events(), Resumed(self.time.now(), step, "")])

    def newest(self) -> str:
        """Return a few words on the newest checkpoint, from what this session knows."""
        step = self.history.newest_step
        return f"the newest checkpoint is step {step}" if step is not None else "there is no checkpoint yet"

    def begin(self, image: Image, order: SaveOrder, *, attempt: str = "", wave: int = 0) -> Begun:
        """Hand an image, which may still be being copied, to the host: it becomes a checkpoint even if we die.

        `attempt` and `wave` are those of `ahead`, when this is the last of several waves.
        """
        job = self._job(order, attempt or self.next_attempt(order.clock.step), wave)
        self._tidiness.begin(job.manifest.attempt)
        self.log.record(
            Saved(job.manifest.time, job.manifest.clock, job.manifest.attempt, list(order.reasons))
        )
        key, lines = self.log.take()
        job = msgspec.structs.replace(
            job, log_key=key, log_lines=lines, tags=list(order.tags), agreement=image.agreement
        )
        self._host.begin(job, image)
        return Begun(job, image)

    def ahead(self, image: Image, order: SaveOrder, *, attempt: str, wave: int) -> None:
        """Make a wave durable, and return then: a part of a state that does not fit into memory as a whole."""
        self._tidiness.begin(attempt)
        job = msgspec.structs.replace(self._job(order, attempt, wave), more=True)
        self._host.begin(job, image)
        self._host.finish(job, image)

    def _job(self, order: SaveOrder, attempt: str, wave: int) -> Job:
        manifest = Manifest(
            format=FORMAT_VERSION,
            run=self.identity.run,
            step=order.clock.step,
            attempt=attempt,
            generation=self.lease.generation,
            time=self.time.now(),
            clock=clock_to_doc(order.clock),
            parts={},
            metrics=floats_to_doc(order.metrics),
            reasons=list(order.reasons),
            parent=self.parent,
            exact=order.exact,
            environment=fingerprint() | ({"single_writer": self._vouched} if self._vouched else {}),
            loop=order.loop or {},
        )
        return Job(manifest, "", b"", [], self._base(), order.self_contained, order.derive, wave)

    def give_up(self, attempt: str, error: BaseException) -> None:
        """Let the other ranks know, if there are any, that a save came to nothing before it was begun here."""
        if self.meeting is not None:
            self._afresh = True
            refuse(self.meeting, attempt, error)

    def complete(self, begun: Begun) -> Manifest:
        """Return the manifest of a save that was begun, once it is committed. Raises what it failed with."""
        job, image = begun.job, begun.image
        try:
            done = self._host.finish(job, image)
        except BaseException as e:
            self._afresh = self.meeting is not None
            self.log.give_back(job.log_key, job.log_lines)
            if isinstance(e, CommitUnknown):
                self.history.refresh()  # it may be there, and then what it needs must stay
            raise
        self._afresh = False
        self.log.wrote(job.log_key, job.log_lines)
        manifest = done.manifest or with_files(job, image, done.files, done.new_bytes, done.derived)
        self.parent = manifest.attempt
        with self._tidiness.freeing():
            self.history.take(entry_of(job, done), manifest)
        self._tidiness.end(manifest.attempt)
        return manifest

    def persist(self, image: Image, order: SaveOrder) -> Manifest:
        """Make an image a committed checkpoint, and return when it is durable."""
        return self.complete(self.begin(image, order))

    def _base(self) -> Base | None:
        """Return the checkpoint that the next one is built on: by default the newest. After a save that failed ranks
        may take another one for it, so they build on none."""
        if self._afresh:
            return None
        for step in reversed(self.history.steps):
            attempt = self.history.summary(step).attempt
            if self.parent in (None, attempt):
                return Base(self.history.entry(step).key, attempt)
        return None

    def note_verified(self, manifest: Manifest) -> None:
        """Record that every byte of a checkpoint was read and was right."""
        self.log.record(Verified(self.time.now(), manifest.step, manifest.attempt))

    def label_and_retain(self, best: Best | None, keep: Rule | None, grace_seconds: int = 0) -> None:
        """See `Upkeep.label_and_retain`."""
        self.upkeep.label_and_retain(best, keep, grace_seconds)

    def remove_steps(self, steps: Sequence[int], why: dict[int, list[str]], *, grace_seconds: int = 0) -> int:
        """See `Upkeep.remove_steps`."""
        return self.upkeep.remove_steps(steps, why, grace_seconds=grace_seconds)

    def abandon_after(self, step: int, why: str) -> list[int]:
        """See `Upkeep.abandon_after`."""
        return self.upkeep.abandon_after(step, why)

    def close(self) -> None:
        """Make the log durable and give the run up."""
        if self._closed:
            return
        self._closed = True
        try:
            self._host.close()
            if self.meeting is not None:
                self.meeting.leave()
            self.upkeep.settle()
            self.log.flush()
            self.history.index(self.lease, closing=True)
            self._tidiness.leave()
        finally:
            self.lease.release()
