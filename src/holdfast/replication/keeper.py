"""Who looks after one mirror: a thread that makes passes when there is something new, and tries again after a failure.

Nothing here raises into training. What goes wrong is kept in the status, logged once, and tried again with growing
pauses; a pass after it decides afresh.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import Literal, TypeAlias

from holdfast.core.clock import TimeSource
from holdfast.core.errors import HoldfastError
from holdfast.core.units import parse_seconds
from holdfast.replication.desired import Location, plan_mirror
from holdfast.replication.looking import Source
from holdfast.replication.mirror import Mirror
from holdfast.replication.reconcile import Goal, Outcome, Reconciler, Stopped
from holdfast.stores import Store

__all__ = ["Keeper", "MirrorState", "MirrorStatus"]

logger = logging.getLogger("holdfast")

MirrorState: TypeAlias = Literal["ok", "behind", "degraded", "unreachable", "unknown"]

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
MOST_OWED = 8  # checkpoints that retention spares for a mirror that is behind


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """How a mirror stands.

    `state`: "ok", everything that ought to be there is; "behind", not yet, and nothing is wrong; "degraded", the last
    try failed; "unreachable", it did not answer; "unknown", nobody has looked yet. `newest` is the newest step there
    that can be resumed from, `missing` are the steps that are to come, `missing_bytes` their data as it is at the
    primary, `only_here` the steps that the primary lost without a word. `since` is when it stopped being well, in
    seconds since the Unix epoch.
    """

    url: str
    state: MirrorState = "unknown"
    newest: int | None = None
    missing: tuple[int, ...] = ()
    missing_bytes: int = 0
    only_here: tuple[int, ...] = ()
    error: str | None = None
    since: float | None = None
    copied_bytes: int = 0


class Keeper:
    """Keeps one mirror up to what it is told of the primary."""

    def __init__(self, mirror: Mirror, store: Store, time: TimeSource) -> None:
        self.mirror = mirror
        self.store = store
        self._time = time
        goal = Goal(mirror.keep, mirror.pack, mirror.verify)
        self._reconciler = Reconciler(store, goal, time, advance=self._advance, changed=self._look_at)
        self._news = threading.Condition()
        self._source: Source | None = None
        self._told = 0  # the number of the newest source
        self._at_work_on = 0
        self._secured = 0  # the number of the newest source whose newest checkpoint is in place
        self._complete = 0  # ... of which everything is in place
        self._tried = 0
        self._failures = 0
        self._due = 0.0
        self._urgent = 0  # the number of the newest source that somebody waits for
        self._interval = parse_seconds(mirror.interval)
        self._error: str | None = None
        self._since: float | None = None
        self._outcome: Outcome | None = None
        self._copied = 0
        self._stop = False
        self._thread: threading.Thread | None = None

    # ---- what it is told --------------------------------------------------------------------------------------------

    def tell(self, source: Source, number: int) -> None:
        """Say what the primary holds now; `number` grows with every source."""
        with self._news:
            self._source, self._told = source, number
            self._news.notify_all()

    def start(self) -> None:
        """Work from now on, on a thread of its own."""
        if self._thread is None:
            # A daemon: the Checkpointer waits for it as long as it may, and a process can always end.
            self._thread = threading.Thread(target=self._work, name="holdfast-mirror", daemon=True)
            self._thread.start()

    def hurry(self) -> None:
        """Do now what is to be done, or to be tried again, later."""
        with self._news:
            self._due, self._urgent = 0.0, self._told
            self._failures = min(self._failures, 1)
            self._news.notify_all()

    def stop(self) -> None:
        """Begin nothing more, and break off what is under way."""
        with self._news:
            self._stop = True
            self._news.notify_all()

    # ---- what it is asked -------------------------------------------------------------------------------------------

    def has_secured(self, number: int) -> bool:
        """Return whether the newest checkpoint of a source, or of a later one, is in place."""
        return self._secured >= number

    def is_complete(self, number: int) -> bool:
        """Return whether everything of a source, or of a later one, is in place."""
        return self._complete >= number

    def has_failed(self, number: int) -> bool:
        """Return whether the last pass was for this source or a later one, and did not get everything done."""
        return self._tried >= number > self._complete

    def owes(self, source: Source) -> list[str]:
        """Return the attempts of a source that are still to be copied, by what is known of the mirror; the newest few,
        and none while it fails."""
        with self._news:
            outcome, failing = self._outcome, self._failures > 0
        there = Location() if outcome is None else outcome.reached
        if failing:
            return []
        decided = plan_mirror(source.location, there, source.past, self.mirror.keep, now=self._time.now())
        return [h.record.attempt for h in decided.copy[:MOST_OWED]]

    @property
    def status(self) -> MirrorStatus:
        """How the mirror stands."""
        with self._news:
            outcome = self._outcome
            missing = [h.step for h in outcome.missing] if outcome is not None else []
            return MirrorStatus(
                self.store.url,
                self._state(missing),
                None if outcome is None else outcome.newest,
                tuple(missing),
                0 if outcome is None else outcome.missing_bytes,
                () if outcome is None else outcome.plan.only_here,
                self._error,
                self._since,
                self._copied,
            )

    def _state(self, missing: list[int]) -> MirrorState:
        if self._error is not None:
            return "degraded" if self._reconciler.reached else "unreachable"
        if missing or self._complete < self._told:
            return "behind" if self._outcome is not None else "unknown"
        return "ok" if self._outcome is not None else "unknown"

    # ---- work -------------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Make one pass if there is something to do now; return whether there was."""
        with self._news:
            source, number = self._source, self._told
            if self._stop or source is None or not self._is_due():
                return False
            self._at_work_on = number
        try:
            outcome = self._reconciler.run(source)
        except Stopped:
            return True
        except HoldfastError as e:
            self._fail(number, str(e))
            self._open_anew()
        except Exception as e:  # noqa: BLE001 - a mirror never ends a training run; the status says it
            self._fail(number, f"unexpected {type(e).__name__}: {e}")
        else:
            self._look_at(outcome)
            if outcome.failed:
                step, why = next(iter(outcome.failed.items()))
                self._fail(number, f"step {step}: {why}")
            else:
                self._succeed(number, copied=bool(outcome.placed))
        return True

    def _open_anew(self) -> None:
        """Open the mirror again: a peer that was restarted is an empty place, which the next pass fills."""
        if isinstance(self.mirror.url, (str, os.PathLike)):
            with contextlib.suppress(HoldfastError):
                self.store = self._reconciler.target = self.mirror.open(self._time)

    def _is_due(self) -> bool:
        return self._complete < self._told and self._time.monotonic() >= self._due

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._stop and not self._is_due():
                    retries = self._source is not None and self._complete < self._told
                    self._news.wait(max(0.0, self._due - self._time.monotonic()) if retries else None)
                if self._stop:
                    return
            self.turn()

    def _advance(self, done: int) -> None:
        self._copied += done
        if self._stop:
            raise Stopped

    def _look_at(self, outcome: Outcome) -> None:
        """Take in how far a pass has come."""
        if self._stop:
            raise Stopped
        newest = outcome.plan.newest
        with self._news:
            self._outcome = outcome
            if newest is None or newest not in [h.step for h in outcome.missing]:
                self._secured = max(self._secured, self._at_work_on)
                self._news.notify_all()

    def _fail(self, number: int, error: str) -> None:
        with self._news:
            new = error != self._error
            self._error = error
            self._since = self._since if self._since is not None else self._time.now()
            self._tried = number
            self._failures += 1
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures - 1, 30))
            self._due = self._time.monotonic() + pause
            self._news.notify_all()
        if new:
            logger.warning(
                "the mirror %s is not up to date: %s. Training goes on, and it is tried again",
                self.store.url,
                error,
            )

    def _succeed(self, number: int, *, copied: bool) -> None:
        with self._news:
            was_wrong = self._error is not None
            self._error, self._since, self._failures = None, None, 0
            rests = copied and number >= self._urgent
            self._due = self._time.monotonic() + self._interval if rests else 0.0
            self._tried = self._complete = number
            self._news.notify_all()
        if was_wrong:
            logger.info("the mirror %s is up to date again", self.store.url)
