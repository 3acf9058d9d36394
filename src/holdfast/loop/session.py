"""The session: a run that this process holds the lease of, with everything that writes to it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from holdfast.catalog.checkpoints import Entry, commit
from holdfast.catalog.deletion import Ages, Freed, collect
from holdfast.catalog.history import History
from holdfast.catalog.identity import create_run
from holdfast.catalog.lease import acquire
from holdfast.catalog.runlog import LogWriter, timeline
from holdfast.catalog.signatures import read_signatures
from holdfast.catalog.tags import Tag, delete_tag, set_tag
from holdfast.catalog.tidiness import HALF_MADE_SECONDS, Tidiness
from holdfast.catalog.trash import BROKEN
from holdfast.catalog.trust import Trust, TrustedKey
from holdfast.core.clock import Clock, TimeSource
from holdfast.core.errors import CommitUnknown, Untrusted
from holdfast.core.records import CheckpointRecord
from holdfast.format.events import Event, Removed, Resumed, Saved, Started, Verified
from holdfast.format.manifest import FORMAT_VERSION, Manifest, clock_to_doc, floats_to_doc
from holdfast.format.signing import SigningKey
from holdfast.policies import Decision, Rule, best_of, plan
from holdfast.policies.best import Best
from holdfast.saving.environment import fingerprint
from holdfast.saving.image import Image
from holdfast.saving.job import Base, Here, Host, Job, entry_of, with_files
from holdfast.saving.persist import new_attempt
from holdfast.stores import Store, prove_create

__all__ = ["SaveOrder", "Session"]

logger = logging.getLogger("holdfast")

WEIGHTS = "module"
ATTEMPT_SECONDS = 3600.0


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


@dataclass(frozen=True, slots=True)
class Begun:
    """A save that the host has taken on."""

    job: Job
    image: Image


class Session:
    """A run held for writing. Opening takes the lease (`wait`: once one from elsewhere has expired) and frees what dead
    writers left behind. With a key every commit is signed.

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
    ) -> None:
        self.store = store
        self.time = time
        self.parent: str | None = None
        self.owed: Callable[[], frozenset[str]] = frozenset  # attempts that a copy is still to be made of
        self.spares = False  # whether retention has just spared something for that
        self.freed = Freed()  # of what was found when the run was taken up
        self._closed = False
        self._host = host or Here()
        self._key = key
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
        try:
            self._host.start(store, self.lease, key)
            self._take_over()
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
        job = self._job(order, attempt or new_attempt(), wave)
        self._tidiness.begin(job.manifest.attempt)
        self.log.record(
            Saved(job.manifest.time, job.manifest.clock, job.manifest.attempt, list(order.reasons))
        )
        key, lines = self.log.take()
        job = msgspec.structs.replace(job, log_key=key, log_lines=lines, tags=list(order.tags))
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
        return Job(manifest, "", b"", [], self._base(), order.self_contained, wave)

    def complete(self, begun: Begun) -> Manifest:
        """Return the manifest of a save that was begun, once it is committed. Raises what it failed with."""
        job, image = begun.job, begun.image
        try:
            done = self._host.finish(job, image)
        except BaseException as e:
            self.log.give_back(job.log_key, job.log_lines)
            if isinstance(e, CommitUnknown):
                self.history.refresh()  # it may be there, and then what it needs must stay
            raise
        self.log.wrote(job.log_key, job.log_lines)
        manifest = with_files(job, image, done.files, done.new_bytes)
        self.parent = manifest.attempt
        with self._tidiness.freeing():
            self.history.take(entry_of(job, done), manifest)
        self._tidiness.end(manifest.attempt)
        return manifest

    def persist(self, image: Image, order: SaveOrder) -> Manifest:
        """Make an image a committed checkpoint, and return when it is durable."""
        return self.complete(self.begin(image, order))

    def _base(self) -> Base | None:
        """Return the checkpoint that the next one is built on: by default the newest."""
        for step in reversed(self.history.steps):
            attempt = self.history.summary(step).attempt
            if self.parent in (None, attempt):
                return Base(self.history.entry(step).key, attempt)
        return None

    def note_verified(self, manifest: Manifest) -> None:
        """Record that every byte of a checkpoint was read and was right."""
        self.log.record(Verified(self.time.now(), manifest.step, manifest.attempt))

    def label_and_retain(self, best: Best | None, keep: Rule | None, grace_seconds: int = 0) -> None:
        """Point the tag "best" at the best checkpoint, then delete and demote what the retention rule lets go."""
        if best is not None or keep is not None:
            self.log.flush()
            tags = self.history.tags()
            records = self.history.records(tags)
            if best is not None and self._publish_best(best, tags, records):
                records = self.history.records(tags)
            if keep is not None:
                self._retain(keep, tags, records, grace_seconds)
        self.history.index(self.lease)

    def _publish_best(self, best: Best, tags: dict[str, Tag], records: Sequence[CheckpointRecord]) -> bool:
        """Move the tag "best", in the store and in `tags`, unless it points there already. Return whether it moved."""
        found = best_of(records, best.metric, best.mode)
        if not found or ("best" in tags and tags["best"].attempt == found[0].attempt):
            return False
        tags["best"] = Tag("best", found[0].step, found[0].attempt, self.time.now(), automatic=True)
        set_tag(self.store, tags["best"])
        return True

    def retain(self, keep: Rule, grace_seconds: int = 0) -> tuple[Decision, ...]:
        """Delete and demote what the retention rule lets go; return what was decided."""
        self.log.flush()
        tags = self.history.tags()
        return self._retain(keep, tags, self.history.records(tags), grace_seconds)

    def _retain(
        self, keep: Rule, tags: dict[str, Tag], records: Sequence[CheckpointRecord], grace_seconds: int
    ) -> tuple[Decision, ...]:
        owed = self.owed()
        self.spares = bool(owed)
        spared = [replace(r, leased=True) if r.attempt in owed else r for r in records]
        decisions = plan(spared, keep, now=self.time.now(), stored_together=self.history.stored_together)
        if self.history.broken_tags:  # what they protect is unknown
            broken = "; ".join(self.history.broken_tags)
            logger.warning("nothing is deleted: %s. Remove that tag or set it again", broken)
            return ()
        drops = [d for d in decisions if d.action == "drop"]
        why = {d.step: list(d.reasons) for d in drops}
        self._remove_steps([d.step for d in drops], why, tags, grace_seconds)
        for d in decisions:
            if d.action == "demote" and not self.history.summary(d.step).demoted:
                self._demote(d)
        return decisions

    def remove_steps(self, steps: Sequence[int], why: dict[int, list[str]], *, grace_seconds: int = 0) -> int:
        """Delete checkpoints, their tags, and the bytes only they needed, by way of the trash if there is a grace.
        Return the bytes freed now, or when the grace has ended."""
        return self._remove_steps(steps, why, self.history.tags(), grace_seconds) if steps else 0

    def _remove_steps(
        self, steps: Sequence[int], why: dict[int, list[str]], tags: Mapping[str, Tag], grace_seconds: int
    ) -> int:
        if not steps:
            return 0
        self.lease.check()
        for name, tag in tags.items():
            if tag.step in steps:
                delete_tag(self.store, name)
        # One that does not verify is of no use in the trash, and would keep all data there with it.
        aside = [s for s in steps if grace_seconds and s not in self.history.broken]
        attempts = {s: BROKEN if s in self.history.broken else self.history.summary(s).attempt for s in steps}
        freed = self.history.only_of(aside) if aside else 0
        with self._tidiness.freeing():
            if aside:
                self.history.set_aside(
                    aside, now=self.time.now(), grace_seconds=grace_seconds, tags=tags,
                    why={s: why.get(s) or ["asked for"] for s in aside},
                )  # fmt: skip
            freed += self.history.drop([s for s in steps if s not in aside])
        for s, attempt in attempts.items():
            self.log.record(Removed(self.time.now(), s, attempt, "removed", why.get(s, [])))
        self.log.flush()
        return freed

    def abandon_after(self, step: int, why: str) -> list[int]:
        """Set aside every checkpoint beyond `step`, sound or broken: training goes on from there.

        A broken one before `step` stays where it is, to be repaired or removed by its owner.
        """
        later = sorted(s for s in {*self.history.steps, *self.history.broken} if s > step)
        with self._tidiness.freeing():
            aside = self.history.set_aside(later, now=self.time.now(), why={s: [why] for s in later})
        for s, attempt in aside.items():
            self.log.record(Removed(self.time.now(), s, attempt, "set aside", [why]))
        return later

    def close(self) -> None:
        """Make the log durable and give the run up."""
        if self._closed:
            return
        self._closed = True
        try:
            self._host.close()
            self.log.flush()
            self.history.index(self.lease, closing=True)
            self._tidiness.leave()
        finally:
            self.lease.release()

    def _take_over(self) -> None:
        """Free what dead writers left behind, unless the holder before left nothing."""
        now, ages = self.time.now(), Ages(now=self.lease.store_time())
        if self._tidiness.inherited(now, ages):
            return
        self.freed = self._collect(ages)
        if self.freed.nbytes:
            logger.info("freed %d bytes that dead writers had left in %s", self.freed.nbytes, self.store.url)

    def collect(self, grace_seconds: float | None = None) -> Freed:
        """Free what nothing refers to, and what has been in the trash for long enough: for as long as each is to stay
        there, or for `grace_seconds`. No save may be under way."""
        return self._collect(Ages(now=self.lease.store_time(), grace_seconds=grace_seconds))

    def _collect(self, ages: Ages) -> Freed:
        # A holder whose time was over may still live: what it has just written is left alone for a while.
        margin = ATTEMPT_SECONDS if self.lease.displaced else 0.0
        ages = replace(ages, half_made_seconds=HALF_MADE_SECONDS, attempt_seconds=margin)
        freed = collect(self.store, self.history.known, ages, self.lease.check)
        self._tidiness.searched(self.time.now())
        return freed

    def _demote(self, decision: Decision) -> None:
        """Replace a checkpoint by one that holds its weights alone."""
        entry, manifest = self.history.manifests[decision.step]
        weights = {name: part for name, part in manifest.parts.items() if part.kind == WEIGHTS}
        if not weights:
            return
        if not self._may_sign_anew(entry, manifest):
            logger.warning(
                "step %d is not demoted: it is signed, and without its signer's key what is left would not be",
                manifest.step,
            )
            return
        lighter = msgspec.structs.replace(manifest, parts=weights, demoted=True)
        with self._tidiness.freeing():
            self.history.take(commit(self.store, lighter, self.lease, self._key), lighter)
        self.log.record(
            Removed(self.time.now(), manifest.step, manifest.attempt, "demoted", list(decision.reasons))
        )

    def _may_sign_anew(self, entry: Entry, manifest: Manifest) -> bool:
        """Return whether a manifest made of this one may take its place: with our key only where that vouches for this
        one too, for a planted manifest must not be made ours; without, only where nobody does."""
        if self._key is None:
            return not read_signatures(self.store, manifest.step, manifest.attempt)
        own = Trust("require", (TrustedKey(self._key.public, "this run's own key"),), self.time)
        try:
            own.vouched(self.store, entry.key, manifest, self.identity.run)
        except Untrusted:
            return False
        return True
