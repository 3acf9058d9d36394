"""The safe point: the one place where a run's clock moves, its policies speak, and its state is saved or restored.

The order is fixed: clock, metrics, early-stop verdict, save decision, snapshot; then, behind the training thread, log,
data, commit, tags, retention. So a saved state contains its own verdict, and nothing is deleted before its successor
is durable.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import monotonic

from holdfast.catalog.keyfiles import Signing
from holdfast.core.clock import Clock, TimeSource
from holdfast.core.errors import HoldfastError, NotReplicated, PolicyError
from holdfast.core.records import Moment
from holdfast.format.events import Resumed, Verdicted
from holdfast.format.manifest import clock_from_doc
from holdfast.loop.batches import BatchSource
from holdfast.loop.interrupts import Interrupts
from holdfast.loop.pending import PendingGradients
from holdfast.loop.resume import ALONE, Fetch, Picked, Restored, mender, nobody_to_tell, restore_state
from holdfast.loop.room import Room
from holdfast.loop.saver import SaveHow, Saver, SaveSettings, host_maker
from holdfast.loop.session import SaveOrder, Session
from holdfast.loop.taking_turns import take_turn
from holdfast.loop.together import Together, check_settings
from holdfast.loop.tracker import Tracker
from holdfast.policies import EarlyStopping, Rule, Verdict
from holdfast.replication.replicas import Replicas
from holdfast.restoring.reader import Reader
from holdfast.saving.arena import Lent
from holdfast.state.reports import CaptureReport, RestoreOptions, RestoreReport
from holdfast.stores import Store

__all__ = ["Engine"]

logger = logging.getLogger("holdfast")

NO_EVENTS: frozenset[str] = frozenset()
LEFT = "the loop was left before that step had ended; call save() after the loop"


class Engine:
    """Everything a Checkpointer does besides iterating."""

    def __init__(
        self,
        store: Store,
        state: dict[str, object],
        *,
        save: Rule,
        keep: Rule | None,
        stop: EarlyStopping | None,
        options: RestoreOptions,
        settings: SaveSettings,
        signing: Signing,
        deadline_seconds: float,
        replicas: Replicas,
        time: TimeSource,
        together: Together | None = None,
    ) -> None:
        if together is not None:
            check_settings(settings)
        self.state = state
        self._together = together
        self._keep = keep
        self._options = options
        self._time = time
        self._trust = signing.trust
        self._leads = together is None or together.ranks.leads
        self.tracker = Tracker(save, stop, time, judges=self._leads)
        self.replicas = replicas
        self.session = self._take(store, settings, signing)
        self.tell_mirrors()
        self.gradients = PendingGradients(state)
        self.interrupts = Interrupts(deadline_seconds, self.session.newest)
        self.source: BatchSource | None = None
        self.requested: list[str] | None = None  # tags of a save that was asked for in the present step
        self.capture_report: CaptureReport | None = None
        self.restore_report: RestoreReport | None = None
        self.started = False
        self._closed = False
        self._best = self.tracker.best_rule(keep)
        self._written = (settings.self_contained, settings.derive)
        self._grace_seconds = settings.grace_seconds
        self._room = Room(self.session, keep, settings.when_full)
        planner = together.planner if together is not None else None
        self._saver = Saver(self.session, state, settings, self._room, self._after_commit, planner=planner)
        with contextlib.suppress(Exception):  # of a state that is not complete yet
            self._saver.prewarm()
        self._restored: Restored | None = None
        self._warm = False
        self._moved = False  # a restore set the clock, and nothing was trained since
        self.saved_clock: Clock | None = None
        self.leaving = False  # with several ranks: all have agreed to leave for a signal
        self._leave_by: float | None = None  # after a signal, on the machine's monotonic clock

    def _take(self, store: Store, settings: SaveSettings, signing: Signing) -> Session:
        """Take the run, with all that its mirrors have of it."""
        host = host_maker(store, settings.writer)
        replicas, together = self.replicas, self._together
        if self._leads:
            replicas.bring_back()
        if together is not None:
            session = together.session(self.state, self._time, signing, host())
        else:
            behind = settings.writer != "inline"
            session = Session(store, self._time, wait=True, host=host(), key=signing.key, behind=behind)
        if self._leads:
            replicas.remember(session.identity.run)
        session.upkeep.owed = lambda: replicas.owed(session.history, session.identity.run)
        return session

    @property
    def clock(self) -> Clock:
        return self.tracker.clock

    @property
    def closed(self) -> bool:
        """Whether the run was given up, or never was this process's."""
        return self._closed or self.session.forked

    @property
    def stopped(self) -> Verdict | None:
        """The verdict that ends training, or None."""
        verdict = self.tracker.verdict
        return verdict if verdict is not None and verdict.action == "stop" else None

    # ---- taking the run up ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take the run up where it stands, unless that was done: restore, and cut off what is left behind."""
        self.refuse_closed()
        if self.started and not self._moved:
            return
        if self._restored is None and self._has_history():
            self.restore("latest")
        fresh = not self.started and self._restored is None
        self.started = True
        self._go_on()
        if fresh:
            moment, _ = self.tracker.advance(step=0, epochs=0, events=frozenset({"start"}), in_flight=False)
            if reasons := self.tracker.reasons(moment):
                self.save(reasons)

    def _has_history(self) -> bool:
        """Return whether there is anything to restore. With several ranks rank 0 says so for all of them."""
        history = self.session.history
        there = bool(history.manifests or history.broken)
        return there if self._together is None else self._together.agree_on_history(there)

    def restore(self, which: int | str, only: Sequence[str] = (), *, from_memory: bool = True) -> Restored:
        """Put a checkpoint into the live objects; a whole one sets the clock too."""
        self.wait()
        with self._saver.lent() as lent:
            if not from_memory:
                lent.forget()
            restored = self._restore(which, only, lent)
        came_from = self.replicas.brought.get(restored.manifest.step)
        if came_from is not None:
            restored.report.notes.append(f"it was brought back from the mirror {came_from}")
        self.state.update(restored.replaced)
        self.restore_report = restored.report
        for note in restored.report.notes:
            logger.warning("restored step %d: %s", restored.manifest.step, note)
        if restored.whole:
            self.session.note_verified(restored.manifest)
        if not only:
            self._restored = restored
            clock = clock_from_doc(restored.manifest.clock)
            self.tracker.rewind(self.session.events_until(clock.step), clock, clock)
            self.saved_clock = clock
            self._moved = True
        return restored

    def _restore(self, which: int | str, only: Sequence[str], lent: Lent) -> Restored:
        options = replace(self._options, only=tuple(only))
        ranks = self._together.ranks if self._together is not None else ALONE

        def attempt(
            one: int | str, left_out: Mapping[int, str], fetch: Fetch, picked: Picked = nobody_to_tell
        ) -> Restored:
            return restore_state(
                self.session.history, self.state, one, options, trust=self._trust, mend=self.replicas.mend,
                ranks=ranks, left_out=left_out, fetch=fetch, picked=picked, lent=lent,
            )  # fmt: skip

        if self._together is None:
            return attempt(which, {}, Reader.read)
        return self._together.restore(which, attempt, mender(self.session.history, self.replicas.mend))

    def resumed_batch(self) -> int:
        """Return how many batches of the present pass over the data were taken before the resume, else 0."""
        if self._restored is None or clock_from_doc(self._restored.manifest.clock) != self.clock:
            return 0
        return self._restored.manifest.loop.get("batch", 0)

    def _go_on(self) -> None:
        """Training goes on from the present clock: what lies beyond belongs to an abandoned branch."""
        self._moved = False
        step = self.clock.step
        abandoned = self.session.abandon_after(step, f"training went on from step {step}")
        if abandoned:
            logger.warning(
                "training goes on from step %d; later checkpoints %s were set aside", step, abandoned
            )
        attempt = self._restored.manifest.attempt if self._restored is not None else ""
        self.session.parent = attempt or None
        self.session.log.record(Resumed(self._time.now(), step, attempt))
        if self.source is not None:
            self.source.drop()

    # ---- the safe point -------------------------------------------------------------------------------------------

    def boundary(self, *, steps: int, epochs: int = 0, events: frozenset[str] = NO_EVENTS) -> None:
        """End a step or an epoch. Raises SaveFailed, and what a signal asks for once the last checkpoint is durable."""
        self._saver.raise_failure()
        self.gradients.end_step(counted=steps > 0)
        if self._moved:  # the body of this step restored another one: it trained nothing
            self._go_on()
            steps = epochs = 0
        if self.interrupts.stop_signal is not None and self._together is None:
            events |= {"preempt"}
        moment, observed = self.tracker.advance(
            step=self.clock.step + steps, epochs=epochs, events=events, in_flight=self._saver.busy
        )
        if epochs and self.source is not None:
            self.source.batch = 0
        if observed is not None:
            self.session.log.record(observed)
        if observed is not None and self.stopped is not None:
            self.session.log.record(Verdicted(self.clock.step, "stop", self.stopped.reason))
        reasons, by_rule = self._decided(moment)
        if reasons:
            tags, self.requested = tuple(self.requested or ()), None
            self.save(reasons, tags=tags, overlap=self.interrupts.stop_signal is None, by_rule=by_rule)
        elif not self._warm:  # the first step is over: now the optimizer's state exists too
            self._saver.prewarm()
        self._warm = True
        self.leave_if_told()

    def _decided(self, moment: Moment) -> tuple[tuple[str, ...], bool]:
        """Return why to save at this moment, and whether by the rule alone."""
        if self._together is not None:
            return take_turn(self, self._together, moment)
        asked = self._asked()
        reasons = self.rule_reasons(moment) + asked
        if self._room.is_back():
            reasons += ("there is room again",)
        return reasons, not asked

    def rule_reasons(self, moment: Moment) -> tuple[str, ...]:
        """Return why the save rule wants to save at this moment."""
        return () if self._saver.skips else self.tracker.reasons(moment)

    def _asked(self) -> tuple[str, ...]:
        """Return the reasons to save that do not come from the save rule."""
        asked: tuple[str, ...] = ("asked for",) if self.requested is not None else ()
        if self.interrupts.take_save():
            asked += ("signal SIGUSR1",)
        if self.interrupts.stop_signal is not None:
            asked += ("preempted by a signal",)
        return asked

    def leave_if_told(self) -> None:
        """Raise what a stop signal asks for, once every save is durable."""
        if self.interrupts.stop_signal is not None and (self._together is None or self.leaving):
            self.wait()
            self._leave_by = self.interrupts.deadline
            leave = self.interrupts.leave()
            self.interrupts.remove()
            raise leave

    def leave_loop(self) -> None:
        """Leave signals alone again, and say so where a save was asked for in a step that did not end."""
        self.interrupts.remove()
        if self.requested is not None and not self.closed:
            logger.warning("the save asked for in step %d was not made: %s", self.clock.step, LEFT)
        self.requested = None

    def finish(self) -> None:
        """End the loop naturally: one last save, unless this very state is saved already."""
        if self._room.paused:
            self.wait()  # of a save that found no room nothing was said
        if self.started and (self._room.paused or self.saved_clock != self.clock) and self.clock.step > 0:
            self.save(("early stopping: " + self.stopped.reason if self.stopped else "end of training",))
        else:
            self._saver.follow_up()
        self.wait()
        self.session.log.flush()
        self.leaving = True
        self.leave_if_told()
        self.acknowledge()

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        reasons: tuple[str, ...],
        *,
        tags: tuple[str, ...] = (),
        exact: bool = True,
        overlap: bool = False,
        by_rule: bool = False,
    ) -> None:
        """Take a snapshot now and hand it to the writer. One `by_rule` alone may give way to a later one."""
        self.refuse_closed()
        started = self._time.monotonic()
        loop = {"batch": self.source.batch} if self.source is not None else {}
        order = SaveOrder(self.clock, dict(self.tracker.metrics), reasons, tags, loop, exact, *self._written)
        how = SaveHow(gradients=self.gradients.found(), overlap=overlap, by_rule=by_rule)
        report = self._saver.save(order, how)
        if report is None:
            return
        self.capture_report = report
        self.tracker.saved(self._time.monotonic() - started)
        self.saved_clock = self.clock

    def _after_commit(self) -> None:
        try:
            self.session.label_and_retain(self._best, self._keep, self._grace_seconds)
        finally:
            self.tell_mirrors()

    def tell_mirrors(self) -> None:
        """Have the mirrors catch up, behind training, with what the run holds now."""
        session = self.session
        self.replicas.tell(session.history, session.identity.run, session.lease.generation)

    def save_after(self, error: Exception) -> None:
        """Save after an exception in the loop, if the save rule asks for it; never hide the exception."""
        if self._together is not None:  # the other ranks have none
            return
        moment, _ = self.tracker.advance(
            step=self.clock.step, epochs=0, events=frozenset({"exception"}), in_flight=self._saver.busy
        )
        if reasons := self.tracker.reasons(moment):
            try:
                self.save((f"exception {type(error).__name__}", *reasons), exact=False)
            except HoldfastError as e:
                logger.error("could not save after %s: %s", type(error).__name__, e)

    def wait(self) -> None:
        """Return when every save is durable. Raises SaveFailed when one failed."""
        self._saver.wait()

    def acknowledge(self) -> None:
        """Return when every save is in as many locations as was asked for. Raises SaveFailed, NotReplicated."""
        self.wait()
        self.replicas.acknowledge()

    def close(self) -> None:
        """Wait for what is under way and give the run up."""
        if self.closed:
            return
        self._closed = True
        self.gradients.remove()
        self.interrupts.remove()
        self._saver.close()
        try:
            self.wait()
        except BaseException:
            self.replicas.stop()
            with contextlib.suppress(HoldfastError):  # the first failure is the one to raise
                self.session.close()
            raise
        try:
            self._close_mirrors()
        finally:
            self.session.close()

    def _close_mirrors(self) -> None:
        """Wait for the mirrors, and after a signal no longer than the process may live."""
        if not self.replicas.keepers:
            return
        self.session.log.flush()
        self.tell_mirrors()
        seconds = None if self._leave_by is None else max(0.0, self._leave_by - monotonic())
        try:
            self.replicas.catch_up(seconds)
            if self.session.upkeep.spares:  # they have it now
                self._after_commit()
                self.replicas.catch_up(seconds)
        except NotReplicated as e:
            if self._leave_by is None:
                raise
            logger.error("%s", e)  # the signal is what is raised
        finally:
            self.replicas.close()

    def refuse_closed(self) -> None:
        """Raise PolicyError when the run was given up."""
        self.session.refuse_forked()
        if self.closed:
            raise PolicyError(f"the checkpointer of {self.session.store.url} is closed; make a new one")
