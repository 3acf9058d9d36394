"""One pass over a mirror: what it ought to hold against what is there; copy, then remove.

There is no queue. A pass that is cut off anywhere leaves whole checkpoints and at worst data that nothing refers to
yet; the next pass decides afresh and finishes. The mirror's lease is held for the length of a pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.catalog.deletion import Ages, collect
from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import DATA, TAGS, tag_key
from holdfast.catalog.lease import Lease, acquire
from holdfast.catalog.readers import find_readers
from holdfast.catalog.tags import read_tags
from holdfast.catalog.verify import verify_manifest
from holdfast.core.clock import TimeSource
from holdfast.core.errors import (
    DigestMismatch,
    HoldfastError,
    IntegrityError,
    LeaseLost,
    MissingObject,
    NotARun,
    OutOfSpace,
    StoreError,
)
from holdfast.format.manifest import Manifest
from holdfast.format.packed import Pack
from holdfast.policies import Rule
from holdfast.replication.copying import (
    BY_TURNS,
    Copied,
    copy_checkpoint,
    copy_file,
    copy_identity,
    copy_tags,
    read_manifest,
    send_file,
)
from holdfast.replication.desired import Held, Location, MirrorPlan, plan_mirror, removable
from holdfast.replication.looking import Source, location_of, without_data
from holdfast.replication.segments import copy_log
from holdfast.stores import Store

__all__ = ["Goal", "Outcome", "Reconciler", "Stopped"]

logger = logging.getLogger("holdfast")

THOROUGH_SECONDS = 900.0  # between looks at what others may have done to a mirror
IN_A_ROW = 2  # checkpoints that may fail for the store's sake before a pass gives up


class Stopped(Exception):
    """A pass was told to stop; what it had finished stays."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a mirror is to be: its rule, how files are packed, whether each copy is read back."""

    rule: Rule | None = None
    pack: Pack | None = None
    verify: bool = False


@dataclass(slots=True)
class Outcome:
    """What a pass came to. `missing` are the steps that ought to be there and are not yet, with what failed."""

    plan: MirrorPlan
    mirror: Location
    copied: Copied = field(default_factory=Copied)
    placed: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    stale: list[int] = field(default_factory=list)  # steps that left the primary meanwhile

    @property
    def missing(self) -> list[Held]:
        """What ought to be there and is not, the newest first."""
        return [h for h in self.plan.copy if h.step not in self.placed and h.step not in self.stale]

    @property
    def missing_bytes(self) -> int:
        """The bytes of the data files that are missing, as they are at the primary."""
        there: set[str] = set()
        sizes: dict[str, int] = {}
        for held in self.missing:
            sizes.update(held.sizes())
        if sizes:
            there.update(key for held in self.mirror.held.values() for key in held.sizes())
            there.update(key for h in self.plan.copy if h.step in self.placed for key in h.sizes())
        return sum(size for key, size in sizes.items() if key not in there)

    @property
    def reached(self) -> Location:
        """What is there now."""
        held = {s: h for s, h in self.mirror.held.items() if s not in self.removed}
        held |= {h.step: h for h in self.plan.copy if h.step in self.placed}
        gaps = self.mirror.incomplete.difference(self.placed, self.removed)
        return Location(held, self.mirror.broken, gaps)

    @property
    def newest(self) -> int | None:
        """The newest step that can be resumed from there, now."""
        found = self.reached.newest_whole
        return None if found is None else found.step


@dataclass(slots=True)
class Reconciler:
    """Brings one mirror up to its primary, pass by pass, and remembers between passes what is there.

    `advance` is told the bytes that were copied since it was last called; raising from it ends the pass.
    """

    target: Store
    goal: Goal
    time: TimeSource
    advance: Callable[[int], None] = lambda done: None
    changed: Callable[[Outcome], None] = lambda outcome: None
    reached: bool = False  # whether the mirror answered in the last pass
    _history: History | None = None
    _generation: int = 0
    _thorough_at: float = 0.0

    def run(self, source: Source) -> Outcome:
        """Make one pass.

        Raises:
            StateError: the mirror holds another run.
            LeaseHeld: somebody else writes there now.
            StoreError, IntegrityError: the mirror, or `run.json` of the primary, cannot be read or written.
            Stopped: `advance` said so.
        """
        self.reached = False
        try:
            read_identity(self.target)
        except NotARun:
            pass
        except IntegrityError:
            self.reached = True
            raise
        self.reached = True
        copy_identity(source.store, self.target)
        lease = acquire(self.target, self.time, above=source.generation, advice=BY_TURNS)
        try:
            outcome = self._run(source, lease)
            self._generation = lease.generation
            return outcome
        except BaseException:
            self._history = None  # what is there is to be looked at again
            raise
        finally:
            lease.release()

    def _run(self, source: Source, lease: Lease) -> Outcome:
        history, thorough = self._look(source, lease)
        there = source.marked(location_of(history, source.marks), find_readers(self.target).attempts)
        if thorough:
            there = without_data(there, self.target.list(DATA))
        decided = plan_mirror(source.location, there, source.past, self.goal.rule, now=self.time.now())
        outcome = Outcome(decided, there)
        self.changed(outcome)
        # The log goes before the checkpoints: what it says of one is there when the checkpoint is.
        outcome.copied += Copied(*copy_log(source.store, self.target))
        self._copy_all(source, lease, history, outcome)
        self._remove(source, lease, history, outcome)
        outcome.copied += copy_tags(source.store, self.target)
        self._untag(source, history)
        if outcome.failed:
            self._history = None  # what was half copied stays, for the next pass to go on with
        elif thorough or outcome.stale:
            self._reclaim(lease, history)
        if thorough and not outcome.failed:
            self._thorough_at = self.time.monotonic()
        history.index(lease, closing=True)
        return outcome

    def _look(self, source: Source, lease: Lease) -> tuple[History, bool]:
        """Return what the mirror holds: as it was left, where nobody else has held it since; and whether to look at its
        data as well."""
        due = self.time.monotonic() >= self._thorough_at + THOROUGH_SECONDS
        if self._history is not None and lease.generation == self._generation + 1 and not due:
            return self._history, False
        self._history = History(self.target, source.run)
        return self._history, True

    # ---- copying ----------------------------------------------------------------------------------------------------

    def _copy_all(self, source: Source, lease: Lease, history: History, outcome: Outcome) -> None:
        """Copy what is missing, the most precious first. One that is bad at its source keeps no other from being
        copied; a store that fails again and again does."""
        in_a_row = 0
        for held in outcome.plan.copy:
            try:
                self._copy_making_room(source, lease, history, held, outcome)
            except (LeaseLost, Stopped):
                raise
            except HoldfastError as e:
                if isinstance(e, IntegrityError) and not _is_listed(source.store, held):
                    outcome.stale.append(held.step)
                    continue
                outcome.failed[held.step] = str(e)
                in_a_row = in_a_row + 1 if isinstance(e, StoreError) else 0
                if in_a_row == IN_A_ROW or isinstance(e, OutOfSpace):
                    return
            else:
                in_a_row = 0
                outcome.placed.append(held.step)
                self.changed(outcome)

    def _copy_making_room(
        self, source: Source, lease: Lease, history: History, held: Held, outcome: Outcome
    ) -> None:
        try:
            self._copy(source, lease, history, held, outcome)
        except OutOfSpace:
            self._remove(source, lease, history, outcome)
            self._reclaim(lease, history, grace_seconds=0.0)  # a full store has no room for a trash
            self._copy(source, lease, history, held, outcome)

    def _copy(self, source: Source, lease: Lease, history: History, held: Held, outcome: Outcome) -> None:
        key = held.entry.key
        _, manifest = read_manifest(source.store, key)
        if (manifest.attempt, manifest.demoted) != (held.record.attempt, held.record.demoted):
            raise MissingObject(f"{source.store.url}/{key}: was replaced while it was to be copied")
        in_the_way = held.step in outcome.plan.displace
        if in_the_way or self.goal.verify:
            self._copy_data(source.store, manifest)
        lease.check()
        if in_the_way and held.step in (*history.steps, *history.broken):
            # The data is there: for a moment only no state of the step is listed.
            history.set_aside([held.step], now=self.time.now())
        outcome.copied += copy_checkpoint(
            source.store, self.target, key, pack=self.goal.pack, progress=self.advance
        )
        lease.check()
        history.take(held.entry, manifest)

    def _copy_data(self, source: Store, manifest: Manifest) -> None:
        """Copy data files alone; read all of them back where that is asked for, and send those again that are bad."""
        files = {f.key: f for part in manifest.parts.values() for f in part.files}
        for entry in files.values():
            copy_file(source, self.target, entry, pack=self.goal.pack, progress=self.advance)
        if not self.goal.verify:
            return
        bad = {p.key for p in verify_manifest(self.target, manifest)} & files.keys()
        for key in sorted(bad):
            logger.warning("%s/%s: is not what was copied there; it is copied again", self.target.url, key)
            send_file(source, self.target, files[key], pack=self.goal.pack, progress=self.advance)
        problem = next(verify_manifest(self.target, manifest), None) if bad else None
        if problem is not None:
            raise DigestMismatch(f"{self.target.url}: a copy was read back and is wrong: {problem.message}")

    # ---- removing ---------------------------------------------------------------------------------------------------

    def _remove(self, source: Source, lease: Lease, history: History, outcome: Outcome) -> None:
        """Remove what the plan gives up, as far as that leaves the mirror its newest whole checkpoint."""
        if source.unsure:
            return
        there = {*history.steps, *history.broken}
        doomed = [r for r in removable(outcome.plan, outcome.mirror, outcome.placed) if r.step in there]
        if doomed:
            lease.check()
            aside = {r.step: r.reasons for r in doomed if r.how == "set aside"}
            history.set_aside([*aside], now=self.time.now(), why=aside)
            history.drop([r.step for r in doomed if r.how == "removed"])
            outcome.removed += [r.step for r in doomed]

    def _untag(self, source: Source, history: History) -> None:
        """Remove tags that the primary removed: of a checkpoint that it lists, or of one that is not here."""
        if source.unsure:
            return
        named = source.store.names(TAGS)
        for name, tag in read_tags(self.target, lambda e: None).items():
            ours, theirs = source.location.held.get(tag.step), history.steps
            untagged = ours is not None and ours.record.attempt == tag.attempt
            if tag_key(name) not in named and (untagged or tag.step not in theirs):
                self.target.delete([tag_key(name)])

    def _reclaim(self, lease: Lease, history: History, grace_seconds: float | None = None) -> None:
        ages = Ages(now=lease.store_time(), grace_seconds=grace_seconds)
        collect(self.target, history.known, ages, lease.check)


def _is_listed(store: Store, held: Held) -> bool:
    """Return whether the primary still lists this very checkpoint; one that it removed meanwhile is no failure."""
    try:
        _, manifest = read_manifest(store, held.entry.key)
    except MissingObject:
        return False
    except HoldfastError:
        return True
    return (manifest.attempt, manifest.demoted) == (held.record.attempt, held.record.demoted)
