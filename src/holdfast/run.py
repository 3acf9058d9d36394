"""A run as something to look at: its checkpoints, tags and log, from any process, without holding its lease."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence

from holdfast.catalog.beside import verify_beside
from holdfast.catalog.deletion import Freed
from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keyfiles import KeySource, TrustSource, make_trust, read_signing_key
from holdfast.catalog.keys import parse_grace
from holdfast.catalog.lease import LeaseDoc, holder, is_held
from holdfast.catalog.runlog import LogWriter, timeline
from holdfast.catalog.signatures import add_signature
from holdfast.catalog.tags import Tag, delete_tag, set_tag
from holdfast.catalog.trash import Deleted, describe_trash, list_trash, restore_from_trash
from holdfast.catalog.trust import Verifying
from holdfast.catalog.verify import Problem, verify_manifest
from holdfast.checkpoint import Checkpoint
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import HoldfastError, IntegrityError, NoCheckpoint, PolicyError, StateError
from holdfast.core.names import check_tag
from holdfast.core.records import CheckpointRecord, Observation
from holdfast.core.units import format_count, parse_seconds
from holdfast.format.events import Event, Observed, Removed, Untagged
from holdfast.format.manifest import (
    clock_from_doc,
    clock_to_doc,
    decode_manifest,
    floats_from_doc,
    floats_to_doc,
)
from holdfast.format.signature import Statement
from holdfast.format.signing import SigningKey
from holdfast.loop.session import Session
from holdfast.policies import Decision, Mode, Rule, best_of, plan, require_retention
from holdfast.stores import Store, open_store

__all__ = ["GRACE", "Run"]

GRACE = "24h"


class Run:
    """The history of a run, read from its store.

    Iterating yields its checkpoints, oldest first. `trusted` and `verify` are as for `Checkpointer`: a checkpoint that
    no trusted key has signed is not handed out. Changing it (`remove`, `prune`) takes the run's lease for a moment.

    Raises:
        NotARun: the place holds no run.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        trusted: TrustSource | None = None,
        verify: Verifying | None = None,
        time: TimeSource | None = None,
    ) -> None:
        self._time = time or SystemTime()
        self.trust = make_trust(verify, trusted, time=self._time)
        self.store = open_store(url)
        self.identity = read_identity(self.store)
        self.history = History(self.store, self.identity.run)

    def __repr__(self) -> str:
        return f"<Run {self.store.url}: {format_count(len(self), 'checkpoint')}>"

    @property
    def id(self) -> str:
        """The run's random identity."""
        return self.identity.run

    def __len__(self) -> int:
        return len(self.history.steps)

    def __iter__(self) -> Iterator[Checkpoint]:
        for step in self.history.steps:
            yield self[step]

    def __getitem__(self, which: int | str) -> Checkpoint:
        """Return the checkpoint of a step, "latest", or a tag. Raises NoCheckpoint, IntegrityError, Untrusted."""
        entry, manifest = self.history.resolve(which)
        self.trust.check(self.store, entry.key, manifest, self.id)
        return Checkpoint(self.store, manifest)

    def refresh(self) -> None:
        """Look at the store again."""
        self.history.refresh()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return self.history.steps

    @property
    def broken(self) -> dict[int, HoldfastError]:
        """The steps whose manifest does not verify, and why."""
        return {step: error for step, (_, error) in self.history.broken.items()}

    @property
    def latest(self) -> Checkpoint:
        """The newest checkpoint. Raises NoCheckpoint when there is none."""
        return self["latest"]

    def best(self, metric: str, *, mode: Mode) -> Checkpoint:
        """Return the checkpoint with the best finite value of a metric; of equal ones the earlier.

        Raises:
            NoCheckpoint: no checkpoint has a finite value of it.
        """
        found = best_of(self.records(), metric, mode)
        if not found:
            raise NoCheckpoint(f"{self.store.url} has no checkpoint with a finite value of {metric!r}")
        return self[found[0].step]

    def records(self) -> list[CheckpointRecord]:
        """Return every checkpoint as policies see it, in step order."""
        return self.history.records()

    @property
    def tags(self) -> dict[str, int]:
        """Each tag and the step it points to."""
        return {name: tag.step for name, tag in sorted(self.history.tags().items())}

    def tag(self, name: str, which: int | str = "latest") -> None:
        """Point a tag at a checkpoint; a tagged checkpoint is never pruned."""
        check_tag(name)
        _, manifest = self.history.resolve(which)
        set_tag(self.store, Tag(name, manifest.step, manifest.attempt, self._time.now()))

    def untag(self, name: str) -> None:
        """Remove a tag. Raises NoCheckpoint when there is none of this name."""
        if name not in self.history.tags():
            raise NoCheckpoint(
                f"{self.store.url} has no tag {name!r}; its tags are: {', '.join(self.tags) or 'none'}"
            )
        log = LogWriter(self.store, f"o{secrets.token_hex(6)}")
        log.record(Untagged(self._time.now(), name))
        log.flush()  # durability: before the tag goes, so that a copy elsewhere does not bring it back
        delete_tag(self.store, name)

    @property
    def writer(self) -> LeaseDoc | None:
        """Who holds the run for writing now, or None."""
        found = holder(self.store)
        return found if found is not None and is_held(found, self._time.now()) else None

    def events(self) -> list[Event]:
        """Return the run log, without what belongs to abandoned branches."""
        return timeline(self.history.events())

    def observations(self) -> list[Observation]:
        """Return every metric that the training loop observed, oldest first."""
        return [
            Observation(metric, value, clock_from_doc(event.clock))
            for event in self.events()
            if isinstance(event, Observed) and event.attempt is None
            for metric, value in floats_from_doc(event.metrics).items()
        ]

    def observe(self, which: int | str, metric: str, value: float) -> None:
        """Attach a metric to a committed checkpoint, from any machine and at any time."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PolicyError(f"metric {metric!r} is {value!r}; expected a number")
        _, manifest = self.history.resolve(which)
        log = LogWriter(self.store, f"o{secrets.token_hex(6)}")
        clock = clock_to_doc(clock_from_doc(manifest.clock))
        log.record(Observed(clock, floats_to_doc({metric: float(value)}), manifest.attempt))
        log.flush()

    def sign(
        self,
        which: int | str,
        key: KeySource | SigningKey,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Statement:
        """Verify every byte of a checkpoint, then sign it; return what was signed. `key` is as for `Checkpointer`.

        Raises:
            IntegrityError: it does not verify; nothing was signed.
        """
        key = key if isinstance(key, SigningKey) else read_signing_key(key)
        entry, manifest = self.history.resolve(which)
        raw = self.store.read(entry.key)
        if decode_manifest(raw, entry.key) != manifest:
            raise IntegrityError(f"{entry.key}: was exchanged while it was read; read it again")
        problems = list(verify_manifest(self.store, manifest, progress))
        if problems:
            raise IntegrityError(f"step {manifest.step} is not signed: {problems[0].message}")
        return add_signature(self.store, manifest, raw, key, self._time.now()).statement

    def signers(self, which: int | str) -> dict[str, bool | None]:
        """Return the ids of the keys that signed a checkpoint, and of each whether it is trusted with it: None where
        nobody was asked to be trusted."""
        entry, manifest = self.history.resolve(which)
        return self.trust.signers(self.store, entry.key, manifest)

    def verify(
        self, steps: Sequence[int] | None = None, progress: Callable[[int], None] = lambda done: None
    ) -> dict[int, list[Problem]]:
        """Read every byte of the given steps (all, by default) and return what is wrong with each."""
        found: dict[int, list[Problem]] = {}
        for step in sorted({*self.history.steps, *self.history.broken}) if steps is None else steps:
            try:
                found[step] = self[step].verify(progress)
            except NoCheckpoint:
                raise
            except HoldfastError as e:
                found[step] = [Problem(self.history.entry(step).key, str(e))]
        return found

    def verify_beside(self) -> list[Problem]:
        """Read the run's identity, tags, log, signatures and other documents and return what is wrong with them."""
        return list(verify_beside(self.store))

    def plan(self, keep: Rule) -> tuple[Decision, ...]:
        """Return what a retention rule would keep and drop, with the reasons. Changes nothing."""
        rule, together = require_retention(keep), self.history.stored_together
        return plan(self.records(), rule, now=self._time.now(), stored_together=together)

    def prune(self, keep: Rule, *, grace: str | float = GRACE) -> tuple[Decision, ...]:
        """Delete and demote what a retention rule lets go, and return what was decided.

        What is deleted stays in the trash for `grace` (seconds, or text such as "24h"), and `undelete` brings it back;
        0 frees it at once. What demoting gives up is freed at once.

        Raises:
            LeaseHeld: a training process writes the run; its own retention rule is in force.
        """
        grace_seconds = parse_grace(grace)
        session = Session(self.store, self._time)
        try:
            return session.upkeep.retain(require_retention(keep), grace_seconds)
        finally:
            session.close()
            self.refresh()

    def remove(self, steps: Sequence[int], *, force: bool = False, grace: str | float = GRACE) -> int:
        """Delete checkpoints, by way of the trash as `prune` does; return the bytes that are freed, at once or when the
        grace has ended. One that does not verify is freed at once.

        Raises:
            NoCheckpoint: one of them does not exist; nothing was deleted.
            StateError: it is tagged or the last one, and `force` is not given.
            LeaseHeld: a training process writes the run.
        """
        grace_seconds = parse_grace(grace)
        self.check_removal(steps, force=force)
        session = Session(self.store, self._time)
        try:
            there = {*session.history.steps, *session.history.broken}
            present = [s for s in steps if s in there]
            return session.remove_steps(present, {}, grace_seconds=grace_seconds)
        finally:
            session.close()
            self.refresh()

    def trash(self) -> list[Deleted]:
        """Return the checkpoints that were deleted and not yet freed, in step order."""
        return describe_trash(self.store, self.history.known)

    def undelete(self, step: int, attempt: str | None = None) -> Checkpoint:
        """Bring a checkpoint back from the trash, with the tags that are free; of several of a step the one that was
        deleted last, or that of an attempt. Works while the run is being trained.

        Raises:
            NoCheckpoint: the trash holds none of this step.
            MissingObject, Truncated, DigestMismatch: its data is not all there; nothing was changed.
            StateError: the step has another checkpoint now; nothing was changed.
        """
        found = [t for t in list_trash(self.store) if t.step == step and attempt in (None, t.attempt)]
        if not found:
            have = (
                ", ".join(str(s) for s in dict.fromkeys(t.step for t in list_trash(self.store))) or "nothing"
            )
            raise NoCheckpoint(f"the trash of {self.store.url} holds no step {step}; it holds: {have}")
        _, manifest, doc = restore_from_trash(self.store, found[-1])
        self.refresh()
        now = self._time.now()
        for name in doc.tags:
            if name not in self.history.tags():
                set_tag(self.store, Tag(name, step, manifest.attempt, now))
        log = LogWriter(self.store, f"o{secrets.token_hex(6)}")
        log.record(Removed(now, step, manifest.attempt, "brought back", []))
        log.flush()
        return self[step]

    def collect(self, *, grace: str | float | None = None) -> Freed:
        """Free what nothing refers to: what has been in the trash for long enough, attempts of writers that died,
        half-made files and uploads older than an hour. With `grace`, everything that has been in the trash for so long.

        Raises:
            LeaseHeld: a training process writes the run; it frees these things itself.
        """
        grace_seconds = None if grace is None else parse_seconds(grace)
        session = Session(self.store, self._time)
        try:
            return session.upkeep.freed + session.upkeep.collect(grace_seconds)
        finally:
            session.close()
            self.refresh()

    def check_removal(self, steps: Sequence[int], *, force: bool = False) -> None:
        """Raise what `remove` would raise for these steps: NoCheckpoint or StateError. Changes nothing."""
        for step in steps:
            if step not in self.history.broken:
                self.history.resolve(step)
        if not force:
            self._refuse_precious(steps)

    def _refuse_precious(self, steps: Sequence[int]) -> None:
        for name, step in self.tags.items():
            if step in steps:
                raise StateError(
                    f"step {step} has the tag {name!r}; remove the tag first, or force the removal"
                )
        if self.history.steps and set(self.history.steps) <= set(steps):
            raise StateError(
                f"this would delete the last checkpoint of {self.store.url}; force it if that is meant"
            )
