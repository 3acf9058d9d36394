"""From a safe point to a durable checkpoint: memory for the snapshot, the copy, and what follows behind the loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.core.errors import LeaseLost, OutOfSpace, PolicyError, SaveFailed
from holdfast.core.units import format_bytes
from holdfast.distributed.ranks import ranks_here
from holdfast.loop.room import Room, WhenFull
from holdfast.loop.session import Begun, SaveOrder, Session
from holdfast.saving.arena import Arena, Arenas, Lent
from holdfast.saving.committing import Here
from holdfast.saving.job import Host
from holdfast.saving.keeping import take_over
from holdfast.saving.overlap import Fence
from holdfast.saving.plan import Plan, Planner
from holdfast.saving.remote import WriterProcess, can_have_process
from holdfast.saving.snapshot import Snapshot, Snapshotter
from holdfast.saving.waves import in_waves
from holdfast.saving.writer import Writer
from holdfast.state.registry import before_each_step
from holdfast.state.reports import CaptureReport
from holdfast.stores import Store

__all__ = ["Overlapping", "SaveHow", "SaveSettings", "Saver", "WhenBusy", "WriterKind", "host_maker"]

logger = logging.getLogger("holdfast")

WriterKind = Literal["auto", "process", "thread", "inline"]
WhenBusy = Literal["wait", "skip", "replace"]
Overlapping = bool | Literal["check"]


@dataclass(frozen=True, slots=True)
class SaveSettings:
    """How saves are carried out; see `Checkpointer`."""

    writer: WriterKind = "auto"
    overlap: Overlapping = True
    when_busy: WhenBusy = "wait"
    memory_bytes: int | None = None
    self_contained: bool = False
    derive: bool = False
    grace_seconds: int = 0
    when_full: WhenFull = "warn"


def host_maker(store: Store, writer: WriterKind) -> Callable[[], Host]:
    """Return what makes that which carries saves out. Raises PolicyError if a process is asked for and cannot be."""
    able = can_have_process(store)
    if writer == "process" and not able:
        raise PolicyError(
            f'writer="process": no other process can write to {store.url} for this one: that takes Linux and a store '
            'that can be opened by URL; use writer="thread"'
        )
    return WriterProcess if able and writer in ("process", "auto") else Here


@dataclass(frozen=True, slots=True)
class SaveHow:
    """One save: with gradients; with what only an optimizer changes copied behind the next forward and backward pass;
    asked for by a rule alone."""

    gradients: bool = False
    overlap: bool = False
    by_rule: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A snapshot of the whole state, or of what of it comes in the last of several waves."""

    snapshot: Snapshot
    attempt: str = ""
    wave: int = 0


class Saver:
    """Takes snapshots and sees them through: one under way, at most one waiting behind it."""

    def __init__(
        self,
        session: Session,
        state: Mapping[str, object],
        settings: SaveSettings,
        room: Room,
        then: Callable[[], None],
        *,
        planner: Planner | None = None,
    ) -> None:
        self._session = session
        self._settings = settings
        self._space = room
        self._then = then  # after each commit, behind the loop
        sharers = ranks_here() if session.meeting is not None else 1
        self._arenas = Arenas(
            shared=session.shares_memory, budget_bytes=settings.memory_bytes, sharers=sharers
        )
        self._take_over()
        self._snapshotter = Snapshotter(state, planner=planner)
        self._writer = Writer(background=settings.writer != "inline")
        self._waiting: Arena | None = None  # of the save that may still give way to a newer one
        self._told = False  # of a state that is larger than the memory for it
        self._fence = Fence()
        overlaps = settings.overlap and settings.writer != "inline"
        self._unguard = before_each_step(self._fence.before_step) if overlaps else None

    def _take_over(self) -> None:
        """Take over the memory of a trainer of this run that has died on this machine, if there is any."""
        session = self._session
        if session.shares_memory:
            rank = session.meeting.ranks.rank if session.meeting is not None else 0
            kept = take_over(session.identity.run, rank)
            if kept is not None and self._arenas.adopt(kept.memory, kept.job.manifest.attempt, kept.image):
                logger.info("step %d still lies in the memory of a trainer that died", kept.job.manifest.step)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._writer.busy

    @property
    def skips(self) -> bool:
        """Whether a save that a rule asks for now is left out, because one is under way."""
        return self._settings.when_busy == "skip" and self._writer.busy

    def prewarm(self) -> None:
        """Have memory ready for the state as it is."""
        plan = self._snapshotter.plan(ahead=True)
        if not self._writer.busy and self._arenas.allow(plan.nbytes):
            self._snapshotter.prewarm(plan, self._arenas.first)

    def lent(self) -> contextlib.AbstractContextManager[Lent]:
        """Lend the memory that snapshots are copied into, and what still lies in it, to a restore."""
        return self._arenas.lent()

    def save(self, order: SaveOrder, how: SaveHow) -> CaptureReport | None:
        """Take a snapshot of the state and see to it that it becomes a checkpoint. Return None when nothing is saved,
        because there is no room for it and saving is paused.

        Raises:
            OutOfSpace: there is no room, and that is to end training.
        """
        # Taken here, in the order of the saves: all ranks reckon the same ids, also of one that fails on some of them.
        attempt = self._session.next_attempt(order.clock.step)
        try:
            arena = self._room()
        except BaseException as e:
            self._session.give_up(attempt, e)
            raise
        try:
            plan = self._snapshotter.plan(gradients=how.gradients)
            allowed = self._space.allows(
                plan.nbytes, order, by_rule=how.by_rule, busy=self._writer.busy, settle=self.wait
            )
            if not allowed:
                self._arenas.give_back(arena)
                return None
            whole = self._arenas.allow(plan.nbytes)
            part = (
                Part(self._snapshotter.prepare(plan, arena), attempt)
                if whole
                else self._ahead(plan, order, arena, attempt)
            )
            # What the host has been told of becomes a checkpoint even if this process is killed.
            begun = None if self._writer.busy else self._begin(part, order)
        except BaseException as e:
            self._arenas.give_back(arena)
            self._session.give_up(attempt, e)
            raise
        try:
            self._copy(
                part.snapshot, overlap=how.overlap and self._unguard is not None and self._fence.stands
            )
        finally:  # a copy that broke fails the save that was begun
            self._waiting = arena if begun is None and how.by_rule else None
            self._hand_over(part, order, arena, begun, by_rule=how.by_rule)
        return plan.report

    def _ahead(self, plan: Plan, order: SaveOrder, arena: Arena, attempt: str) -> Part:
        """Write a state that is larger than the memory for it piece by piece; return the last piece, not yet copied."""
        self.wait()
        budget = self._arenas.budget_bytes or 0
        if not self._told:
            self._told = True
            logger.warning(
                "the state takes %s and snapshots may take %s of memory: it is written piece by piece while training "
                "waits; give more with memory=", format_bytes(plan.nbytes), format_bytes(budget),
            )  # fmt: skip
        for number, (snapshot, last) in enumerate(in_waves(plan, arena, budget)):
            if last:
                return Part(snapshot, attempt, number)
            snapshot.copy()
            with self._failures():
                self._session.ahead(snapshot.image, order, attempt=attempt, wave=number)
        raise AssertionError("the last wave is always there")

    def _begin(self, part: Part, order: SaveOrder) -> Begun:
        return self._session.begin(part.snapshot.image, order, attempt=part.attempt, wave=part.wave)

    def _room(self) -> Arena:
        """Return an arena for the next snapshot, when there is one."""
        self._fence.hold()
        if self._settings.when_busy == "replace" and self._waiting is not None and self._writer.withdraw():
            logger.info("a snapshot that was still waiting to be written is replaced by a newer one")
            self._arenas.give_back(self._waiting)
            self._waiting = None
        arena = self._arenas.take()
        try:
            self.raise_failure()
        except BaseException:
            self._arenas.give_back(arena)
            raise
        return arena

    def _copy(self, snapshot: Snapshot, *, overlap: bool) -> None:
        if not overlap:
            snapshot.copy()
            return
        copying = snapshot.copy_behind(check=self._settings.overlap == "check")
        if copying is not None:
            self._fence.guard(copying)
            copying.start()

    def _hand_over(
        self, part: Part, order: SaveOrder, arena: Arena, begun: Begun | None, *, by_rule: bool
    ) -> None:
        def job() -> None:
            if self._waiting is arena:
                self._waiting = None
            if self._complete(part, order, arena, begun, by_rule=by_rule):
                self._then()

        with self._failures():  # of a job that runs at once
            # Who waits for the arena finds the failure of the save that had it.
            self._writer.submit(job, then=lambda: self._arenas.give_back(arena))

    def _complete(
        self, part: Part, order: SaveOrder, arena: Arena, begun: Begun | None, *, by_rule: bool
    ) -> bool:
        """See a save through; where the store is full make room and try once more. Return False when it is left out,
        because saving is paused now."""
        try:
            try:
                manifest = self._session.complete(begun or self._begin(part, order))
            except OutOfSpace as e:
                # Of earlier waves nothing is left, and other ranks do not try again.
                if part.wave or self._session.meeting is not None or not self._space.make(order):
                    raise
                logger.warning("a save found no room (%s); something was freed, and it is tried again", e)
                manifest = self._session.complete(self._begin(replace(part, attempt=""), order))
        except OutOfSpace as e:
            self._space.failed()
            if not (by_rule and self._space.paused):
                raise
            logger.warning("saving is paused until there is room again: %s", e)
            return False
        arena.kept = manifest.attempt, part.snapshot.image
        self._space.saved(part.snapshot.image.end, manifest)
        return True

    def follow_up(self) -> None:
        """Do what follows the newest commit: the process that made it may have been killed before it could."""
        with self._failures():
            self._writer.submit(self._then)

    def raise_failure(self) -> None:
        """Raise what a save failed with, once. In a forked process, whose the saves are."""
        self._session.refuse_forked()
        with self._failures():
            self._writer.raise_failure()

    def wait(self) -> None:
        """Return when every save is durable. Raises what one failed with, and in a forked process whose they are."""
        self._session.refuse_forked()
        with self._failures():
            self._writer.wait()

    def close(self) -> None:
        """Stand before no optimizer's step any more."""
        if self._unguard is not None:
            self._unguard()
            self._unguard = None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Raise what the writer's job raised as SaveFailed; that the run was taken over is said as it is, and so is a
        full store that is to end training."""
        as_it_is = (SaveFailed, LeaseLost, *([OutOfSpace] if self._space.when_full == "stop" else []))
        try:
            yield
        except as_it_is:
            raise
        except Exception as e:
            raise SaveFailed(
                f"a save failed: {e}. Checkpoints committed before it are intact; the next save tries afresh"
            ) from e
