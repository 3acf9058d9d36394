"""Foresee a full store: what the next save will take against the room there is, and what to do where that is too
little.

The trash is emptied first in any case: what somebody may want back counts less than the next checkpoint.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Literal

from holdfast.core.errors import OutOfSpace
from holdfast.core.records import CheckpointRecord
from holdfast.core.units import format_bytes
from holdfast.format.manifest import Manifest
from holdfast.loop.session import SaveOrder, Session
from holdfast.policies import Rule

__all__ = ["Room", "WhenFull"]

logger = logging.getLogger("holdfast")

WhenFull = Literal["warn", "prune", "pause", "stop"]

SPARE_BYTES = 1 << 20  # for manifest, log, headers and what others write meanwhile
SPARE_SHARE = 64  # and one part in so many


class Room:
    """Decides before each save whether there is room for it, and what gives way to it.

    `when_full`: "warn" once and try; "prune": retention first, as if the save had been made; "pause": leave out what
    rules ask for until there is room; "stop": raise OutOfSpace.
    """

    def __init__(self, session: Session, keep: Rule | None, when_full: WhenFull) -> None:
        self._session = session
        self._keep = keep
        self.when_full: WhenFull = when_full
        self.paused = False
        self._told = False
        self._needed = 0  # by the save that was decided on last
        self._share: float | None = (
            None  # of the state's bytes that a save writes which may refer to an earlier one
        )
        self._based = False  # whether that save could refer to an earlier one
        self._deleted = 0  # deletions that had been done when the last save was decided on
        self._blind = False  # a save found no room where the store had said that there is

    def saved(self, state_bytes: int, manifest: Manifest) -> None:
        """Note what a save has written of a state."""
        if self._based and state_bytes:
            self._share = min(1.0, manifest.new_bytes / state_bytes)
        self._blind = False
        if self.paused:
            self._has_come_back()

    def _has_come_back(self) -> None:
        if self.paused or self._told:
            logger.warning("%s has room again", self._session.store.url)
        self.paused = self._told = False

    def failed(self) -> None:
        """Note that a save has found the store full."""
        room = self._session.store.room()
        self._blind = room is None or room >= self._needed
        self.paused = self.when_full == "pause"

    def is_back(self) -> bool:
        """Return whether saving was paused and there is room again, as far as the store tells."""
        if not self.paused or self._blind:
            return False
        room = self._session.store.room()
        return room is not None and room >= self._needed

    def _expect(self, state_bytes: int, *, self_contained: bool) -> bool:
        """Estimate how many bytes a save of a state will take; return whether that is more than a guess.

        A save writes as large a share of the state as the one before, of those that could refer to an earlier one for
        what does not change. Before there is any, all of it: that is certain of a run's very first save alone.
        """
        steps = self._session.history.steps
        self._based = bool(steps) and not self_contained
        share, known = 1.0, True
        if self._based:
            known = self._share is not None or len(steps) > 1
            share = self._share if self._share is not None else self._newest_share() if known else 1.0
        new = int(state_bytes * share)
        self._needed = new + new // SPARE_SHARE + SPARE_BYTES
        return known

    def _newest_share(self) -> float:
        history = self._session.history
        newest = history.summary(history.steps[-1])
        return min(1.0, newest.new_bytes / newest.stored_bytes) if newest.stored_bytes else 1.0

    def allows(
        self,
        state_bytes: int,
        order: SaveOrder,
        *,
        by_rule: bool,
        busy: bool,
        settle: Callable[[], None],
    ) -> bool:
        """Return whether to go on with a save, after making room for it where need be. `busy`: another is under way;
        `settle` returns when none is.

        Raises:
            OutOfSpace: there is too little room, and that is to end training.
        """
        self._deleted = self._session.upkeep.deleted
        room = self._session.store.room()
        if room is None:
            return True
        room -= (
            self._needed if busy else 0
        )  # of which some may be written already: then it is looked at again below
        known = self._expect(state_bytes, self_contained=order.self_contained)
        if room >= self._needed:
            self._has_come_back()
            return True
        settle()
        self._session.upkeep.settle()
        leaving = self._session.upkeep.leaving_with(self._keep, _coming(order, self._session.time.now()))
        if self._has_room() or self._make_room(leaving, order.clock.step):
            return True
        return self._decide(leaving, order.clock.step, by_rule=by_rule, known=known)

    def _has_room(self) -> bool:
        room = self._session.store.room()
        return room is None or room >= self._needed

    def _make_room(self, leaving: dict[int, list[str]], step: int) -> bool:
        """Empty the trash, and where that was asked for have retention go first; return whether that is enough."""
        upkeep = self._session.upkeep
        freed = upkeep.free_trash(grace_seconds=0.0)
        upkeep.settle()
        if freed:
            logger.warning(
                "%s is nearly full: its trash is emptied (%s)", self._session.store.url, format_bytes(freed)
            )
        if self.when_full == "prune" and leaving and not self._has_room():
            freed = upkeep.retain_ahead(leaving)
            logger.warning(
                "%s is nearly full: retention goes before the save of step %d (steps %s, %s)",
                self._session.store.url, step, sorted(leaving), format_bytes(freed),
            )  # fmt: skip
        return self._has_room()

    def _decide(self, leaving: dict[int, list[str]], step: int, *, by_rule: bool, known: bool) -> bool:
        message = self._shortage(leaving, step)
        if self.when_full == "stop" and known:
            raise OutOfSpace(
                errno.ENOSPC,
                f"{message}. Training is stopped, as when_full='stop' asks for; what was committed before is intact",
            )
        pause = self.when_full == "pause" and by_rule and known
        if not self._told:
            self._told = True
            then = "saving is paused until there is room again" if pause else "it is tried all the same"
            logger.warning("%s; %s", message, then)
        self.paused = self.paused or pause
        return not pause

    def _shortage(self, leaving: dict[int, list[str]], step: int) -> str:
        room = self._session.store.room() or 0
        later = self._session.history.only_of([s for s in leaving if s in self._session.history.steps])
        return (
            f"{self._session.store.url} has room for {format_bytes(room)}, and the save of step {step} is expected to "
            f"take {format_bytes(self._needed)}; retention would free {format_bytes(later)} after it"
        )

    def make(self, order: SaveOrder) -> bool:
        """Make room after a save has found the store full, with none under way; return whether anything was freed."""
        upkeep = self._session.upkeep
        freed = upkeep.free_trash(grace_seconds=0.0)
        if self.when_full == "prune":
            freed += upkeep.retain_ahead(
                upkeep.leaving_with(self._keep, _coming(order, self._session.time.now()))
            )
        upkeep.settle()
        return freed > 0 or upkeep.deleted > self._deleted


def _coming(order: SaveOrder, now: float) -> CheckpointRecord:
    """Return the checkpoint of an order as retention will see it."""
    return CheckpointRecord(
        order.clock.step, "to come", now, order.clock, order.metrics, frozenset(order.tags), order.reasons
    )
