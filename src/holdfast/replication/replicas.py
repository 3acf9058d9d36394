"""The mirrors of a run that is being trained: they are told of every commit, asked for acknowledgement, and waited for
at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from holdfast.catalog.history import History
from holdfast.core.clock import TimeSource
from holdfast.core.errors import HoldfastError, NotReplicated, PolicyError
from holdfast.core.units import format_bytes, format_count, format_seconds
from holdfast.replication.keeper import Keeper, MirrorStatus
from holdfast.replication.looking import look
from holdfast.replication.mirror import MirrorLike, mirrors_of
from holdfast.replication.record import read_mirrors, remember_mirrors, remembered
from holdfast.replication.recovery import bring_back, mend
from holdfast.stores import Store

__all__ = ["Ack", "Replicas"]

logger = logging.getLogger("holdfast")

Ack: TypeAlias = Literal["local", "all"] | int

LOOK_SECONDS = 0.02  # how often waiting looks again


class Replicas:
    """The mirrors of one primary, each with its keeper.

    Args:
        primary: the run's own store.
        given: the mirrors; None leaves alone what the run remembers of them.
        ack: how many locations, the primary included, must hold a checkpoint before it counts as acknowledged.
        seconds: how long to wait for them, there and at the end.

    Raises:
        PolicyError: `ack` is not one that so many mirrors can give.
    """

    def __init__(
        self,
        primary: Store,
        given: Sequence[MirrorLike] | None,
        *,
        ack: Ack = "local",
        seconds: float = 300.0,
        time: TimeSource,
    ) -> None:
        self._primary = primary
        self._given = given
        self._time = time
        self._seconds = seconds
        self._number = 0
        self._told = 0  # the newest number that the mirrors know of: more than that they cannot do
        self.keepers = [Keeper(m, store, time) for m, store in mirrors_of(primary, given or (), time)]
        self._needed = _needed(ack, len(self.keepers))
        self.brought: dict[int, str] = {}

    @property
    def statuses(self) -> list[MirrorStatus]:
        """How each mirror stands."""
        return [k.status for k in self.keepers]

    # ---- before the run is taken up ---------------------------------------------------------------------------------

    def bring_back(self) -> None:
        """Bring the primary what it lacks of the newest; `brought` tells which steps came from where.

        Raises:
            StateError: a mirror holds another run.
        """
        if self.keepers:
            self.brought = bring_back(self._primary, self._stores(), self._time)

    def remember(self, run: str) -> None:
        """Have the primary remember its mirrors; its lease is held."""
        try:
            if self._given is not None:
                remember_mirrors(self._primary, run, [remembered(k.mirror, k.store) for k in self.keepers])
                return
            left = [m.url for m in read_mirrors(self._primary, run)]
        except HoldfastError as e:
            logger.warning("the mirrors of %s are not remembered: %s", self._primary.url, e)
            return
        if left:
            logger.warning(
                "this run has had mirrors (%s) that are not given now, so they fall behind; give mirrors= again, or "
                "mirrors=[] to forget them", ", ".join(left),
            )  # fmt: skip

    def mend(self, key: str) -> list[str]:
        """Mend a checkpoint of the primary from the mirrors; return what was done, in words."""
        return mend(self._primary, key, self._stores()) if self.keepers else []

    def _stores(self) -> list[Store]:
        return [k.store for k in self.keepers]

    # ---- while it is trained ----------------------------------------------------------------------------------------

    def tell(self, history: History, run: str, generation: int) -> None:
        """Say that the primary changed. Copying goes on behind; nothing here raises."""
        if not self.keepers:
            return
        self._number += 1
        try:
            source = look(history, run, generation)
        except HoldfastError as e:
            logger.warning("the mirrors of %s are told at the next commit: %s", self._primary.url, e)
            return
        self._told = self._number
        for keeper in self.keepers:
            keeper.tell(source, self._number)
            keeper.start()

    def owed(self, history: History, run: str) -> frozenset[str]:
        """Return the attempts that mirrors with a rule of their own are still to copy, for retention to spare. One that
        fails is not waited for: a disk must not fill up because a mirror is away."""
        ruled = [k for k in self.keepers if k.mirror.keep is not None]
        if not ruled:
            return frozenset()
        try:
            source = look(history, run)
        except HoldfastError:
            return frozenset()
        return frozenset(attempt for keeper in ruled for attempt in keeper.owes(source))

    def acknowledge(self, seconds: float | None = None) -> None:
        """Return when as many locations as `ack` says hold the newest checkpoint that they were told of.

        Raises:
            NotReplicated: they do not within the time; the message names those that lack it, and why.
        """
        if self._needed <= 1:
            return
        seconds, number = self._seconds if seconds is None else seconds, self._number
        if self._told < number:
            seconds = 0.0
        for keeper in self.keepers:
            keeper.hurry()
        self._wait(seconds, lambda: self._holders(number) >= self._needed)
        if self._holders(number) < self._needed:
            lacking = [k for k in self.keepers if not k.has_secured(number)]
            raise NotReplicated(
                f"the newest checkpoint is in {self._holders(number)} of the {self._needed} locations that ack= asks "
                f"for, after {format_seconds(seconds)}. It is not yet in {'; '.join(map(_lack, lacking))}. It is whole "
                f"in {self._primary.url}, and copying goes on"
            )

    def _holders(self, number: int) -> int:
        return 1 + sum(k.has_secured(number) for k in self.keepers)

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        end = self._time.monotonic() + seconds
        while not done() and self._time.monotonic() < end:
            self._time.sleep(LOOK_SECONDS)

    # ---- at the end -------------------------------------------------------------------------------------------------

    def catch_up(self, seconds: float | None = None) -> None:
        """Wait for the mirrors to catch up with what they know of. One that fails is tried once more.

        Raises:
            NotReplicated: fewer locations than `ack` says hold the newest checkpoint.
        """
        number = self._told
        for keeper in self.keepers:
            keeper.hurry()
        self.acknowledge(seconds)
        self._wait(
            self._seconds if seconds is None else seconds,
            lambda: all(k.is_complete(number) or k.has_failed(number) for k in self.keepers),
        )

    def close(self) -> None:
        """End the work, and say what is not yet where."""
        self.stop()
        for keeper in self.keepers:
            if not keeper.is_complete(self._number):
                logger.warning(
                    "not yet in the mirror %s. The next start, or `holdfast sync %s`, finishes it",
                    _lack(keeper), self._primary.url,
                )  # fmt: skip

    def stop(self) -> None:
        """Break off at once."""
        for keeper in self.keepers:
            keeper.stop()


def _needed(ack: Ack, mirrors: int) -> int:
    """Return how many locations `ack` asks for."""
    if ack == "local":
        return 1
    if ack == "all":
        return 1 + mirrors
    if isinstance(ack, bool) or not isinstance(ack, int) or not 1 <= ack <= 1 + mirrors:
        raise PolicyError(
            f'ack={ack!r} is not "local", "all", or a number of locations from 1 to {1 + mirrors}: '
            f"the run itself and {format_count(mirrors, 'mirror')}"
        )
    return ack


def _lack(keeper: Keeper) -> str:
    """Return what a mirror lacks, in words."""
    status = keeper.status
    if status.error is not None:
        return f"{status.url} ({status.error})"
    if status.missing:
        missing = format_count(len(status.missing), "checkpoint")
        return f"{status.url} ({missing}, {format_bytes(status.missing_bytes)} to go)"
    return f"{status.url} (it is being looked at)"
