"""How the ranks of one run go together: who holds it, what each saves, what all decide alike, and what all restore."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from blake3 import blake3

from holdfast.catalog.keyfiles import Signing
from holdfast.core import errors
from holdfast.core.clock import TimeSource
from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    NoCheckpoint,
    PolicyError,
    RanksDisagree,
    StateError,
    StoreError,
    Untrusted,
)
from holdfast.distributed.lanes import lane_of
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.turns import Turns
from holdfast.distributed.words import Decision, Outcome, Restoring
from holdfast.format.manifest import Manifest
from holdfast.loop.following import Following
from holdfast.loop.handing import Handing, check_broadcast
from holdfast.loop.naming import Naming, after_rank_0
from holdfast.loop.resume import Fetch, Picked, Restored, is_damage, nobody_to_tell
from holdfast.loop.saver import SaveSettings
from holdfast.loop.session import Session
from holdfast.loop.untaken import taken_by_nobody
from holdfast.saving.job import Host
from holdfast.saving.rank_plan import RankPlanner
from holdfast.stores import Store

__all__ = ["Together", "check_settings"]

Attempt = Callable[[int | str, Mapping[int, str], Fetch, Picked], Restored]
Mend = Callable[[int], list[str]]
SHOWN = 5


def no_mending(step: int) -> list[str]:
    """Return nothing: there is nothing to mend a checkpoint from."""
    return []


def check_settings(settings: SaveSettings) -> None:
    """Refuse what each rank would decide for itself. Raises PolicyError."""
    if settings.when_busy == "replace" or settings.when_full not in ("warn", "stop"):
        raise PolicyError(
            f'when_busy="{settings.when_busy}", when_full="{settings.when_full}": with several ranks each would decide '
            'for itself what to leave out; use "wait" or "skip", and "warn" or "stop"'
        )
    if settings.derive:
        raise PolicyError("derive=True: with several ranks every tensor is written; leave it out")


@dataclass(slots=True)
class Attempts:
    """The ids of saves, which every rank reckons for itself from the launch, the step, and how often it was saved.

    A step that comes again after a restore counts on: what it was saved as before may be in the trash still."""

    meeting: Meeting
    made: dict[int, int] = field(default_factory=dict)

    def next(self, step: int) -> str:
        """Return the id of the next save of this step."""
        count = self.made.get(step, 0)
        self.made[step] = count + 1
        launch = f"{self.meeting.launch}/{self.meeting.generation}"
        return blake3(f"{launch}/{step}/{count}".encode()).hexdigest(4)


@dataclass(slots=True)
class Together:
    """This process among the ranks."""

    ranks: Ranks
    store: Store
    same: tuple[str, ...] = ()
    check_replicas: bool = False
    broadcast: bool = False
    meeting: Meeting = field(init=False)
    turns: Turns = field(init=False)
    planner: RankPlanner | None = None
    _restores: int = 0
    _mended: dict[int, list[str]] = field(
        default_factory=dict
    )  # in the present restore: what was done, by step

    def __post_init__(self) -> None:
        if self.broadcast:
            check_broadcast(self.ranks)
        self.meeting = Meeting(self.store, self.ranks)

    def session(self, state: Mapping[str, object], time: TimeSource, signing: Signing, host: Host) -> Session:
        """Take the run up as rank 0, or follow who does. Returns when all ranks are there.

        Raises:
            RanksDisagree: one is not there in time.
        """
        self.planner = RankPlanner(state, self.ranks, self.same, check_replicas=self.check_replicas)
        meeting = self.meeting
        session: Session
        try:
            if self.ranks.leads:
                session = Session(self.store, time, wait=True, host=host, key=signing.key, behind=True)
                meeting.writer = host.pid
                self._open(session, host, signing)
            else:
                session = Following(self.store, time, meeting, host)
        except BaseException:
            host.close()
            raise
        session.meeting = meeting
        session.next_attempt = Attempts(meeting).next
        self.turns = Turns(meeting, lane_of(self.store, session.identity.run, meeting.generation))
        return session

    def _open(self, session: Session, host: Host, signing: Signing) -> None:
        try:
            self.meeting.open(session.identity.run, session.lease.generation)
            host.start(self.store, session.lease, signing.key, self.meeting.company)
        except BaseException:
            session.close()
            raise

    def agree_on_history(self, there: bool) -> bool:
        """Return whether rank 0 found a checkpoint to restore when it took the run up."""
        topic = "history"
        if self.ranks.leads:
            self.meeting.say(topic, Decision(step=int(there)))
            return there
        decision = self.meeting.hear(topic, 0, Decision)
        if decision is None:
            raise RanksDisagree(
                f"rank {self.ranks.rank} heard nothing of rank 0 for {self.ranks.seconds:g} s"
            )
        return bool(decision.step)

    # ---- restoring --------------------------------------------------------------------------------------------------

    def restore(self, which: int | str, attempt: Attempt, mend: Mend = no_mending) -> Restored:
        """Restore the same checkpoint on every rank: rank 0 picks it, all read at once, and go on when all have it.

        Where some rank finds that it does not verify rank 0 mends it, if it can: `mend` returns what was done for a
        step. Where "latest" was asked for and it cannot, all fall back to the one before.

        Raises:
            RanksDisagree: a rank could not restore it, or is silent; the message names it and why.
        """
        left_out: dict[int, str] = {}
        self._mended = {}
        while True:
            topic = self.next_restore()
            leads = self.ranks.leads
            found = (
                self._decide(which, attempt, topic, left_out, mend) if leads else self._follow(attempt, topic)
            )
            if isinstance(found, Restored):
                self.turns.anew()
                return found
            left_out |= found

    def next_restore(self) -> str:
        """Return the topic of the next checkpoint that is tried."""
        self._restores += 1
        return f"restore-{self._restores}"

    def _decide(
        self, which: int | str, attempt: Attempt, topic: str, left_out: Mapping[int, str], mend: Mend
    ) -> Restored | dict[int, str]:
        handing = Handing(self.meeting, topic)
        naming = Naming(self.meeting, self.next_restore, topic)
        try:
            if self.broadcast:
                restored = attempt(which, left_out, handing.fetch, nobody_to_tell)
            else:
                restored = attempt(which, left_out, naming.fetch, naming.named)
        except Exception as e:
            naming.give_up(e)
            raise
        step = restored.manifest.step
        topic = naming.named(restored.manifest)
        if self.broadcast:
            handing.hand_out()
        heard = self.meeting.hear_all(topic, Restoring)
        failed = {f"rank {r}: {word.error}": word.damaged for r, word in sorted(heard.items()) if word.error}
        if len(heard) < self.ranks.world - 1:
            failed[f"{self.meeting.missing(list(heard))} said nothing for {self.ranks.seconds:g} s"] = False
        if not failed:
            words = {0: _word(0, restored), **heard}
            failed = _left_over(self.store, restored.manifest, words)
        if failed and all(failed.values()) and step not in self._mended:
            self._mended[step] = []
            with contextlib.suppress(HoldfastError):  # then it is as it was, and that is what is said
                self._mended[step] = mend(step)
            if self._mended[step]:
                self.meeting.say(f"{topic}-done", Outcome(error="; ".join(failed), instead=step))
                return {}
        if failed and which == "latest" and all(failed.values()):
            self.meeting.say(f"{topic}-done", Outcome(error="; ".join(failed), instead=step))
            return {step: "; ".join(failed)}
        error = f"step {step} was not restored by every rank: {'; '.join(failed)}" if failed else ""
        self.meeting.say(f"{topic}-done", Outcome(error=error))
        if error:
            raise RanksDisagree(error)
        restored.report.notes += self._mended.get(step, [])
        return restored

    def _follow(self, attempt: Attempt, topic: str) -> Restored | dict[int, str]:
        rank, seconds = self.ranks.rank, self.ranks.seconds
        decision = self.meeting.hear(topic, 0, Decision)
        if decision is None:
            raise RanksDisagree(f"rank {rank} waited {seconds:g} s for rank 0 to say what is restored")
        if decision.error:
            raise _as_on_rank_0(decision)
        handing = Handing(self.meeting, topic)
        restored: Restored | None = None
        failure: Exception | None = None
        try:
            fetch = handing.fetch if self.broadcast else after_rank_0(self.meeting, topic)
            restored = attempt(decision.step, {}, fetch, nobody_to_tell)
            if restored.manifest.attempt != decision.attempt:
                raise RanksDisagree(
                    f"rank {rank} found attempt {restored.manifest.attempt} of step {decision.step}; rank 0 has "
                    f"restored {decision.attempt}"
                )
            self.meeting.say(topic, _word(rank, restored))
        except Exception as e:  # noqa: BLE001 - raised below, once the others know
            failure = e
            if self.broadcast:
                handing.give_up()
            self.meeting.say(topic, Restoring(rank, f"{type(e).__name__}: {e}", is_damage(e)))
        outcome = self.meeting.hear(f"{topic}-done", 0, Outcome)
        if outcome is not None and outcome.instead >= 0:
            return {outcome.instead: outcome.error}
        if failure is not None:
            raise failure
        if outcome is None:
            raise RanksDisagree(f"rank {rank} waited {seconds:g} s for rank 0 to say that all have restored")
        if outcome.error:
            raise RanksDisagree(outcome.error)
        assert restored is not None
        return restored


def _as_on_rank_0(decision: Decision) -> HoldfastError:
    """Return what rank 0 raised, so that a program that catches it does so on every rank."""
    kind = getattr(errors, decision.kind, RanksDisagree) if decision.kind in errors.__all__ else RanksDisagree
    alike = issubclass(kind, (NoCheckpoint, Untrusted, IntegrityError, StateError, StoreError))
    if not alike or issubclass(kind, OSError):
        return RanksDisagree(f"rank 0 could not restore: {decision.kind}: {decision.error}")
    return cast("HoldfastError", kind(f"rank 0 could not restore: {decision.error}"))


def _word(rank: int, restored: Restored) -> Restoring:
    return Restoring(rank, unused=restored.report.elsewhere, own=restored.own, wide=restored.wide)


def _left_over(store: Store, manifest: Manifest, words: Mapping[int, Restoring]) -> dict[str, bool]:
    """Return what is wrong when something stored was taken by no rank, else nothing; and whether that is damage."""
    try:
        unused = taken_by_nobody(store, manifest, words)
    except (IntegrityError, StoreError) as e:
        return {f"rank 0: {type(e).__name__}: {e}": is_damage(e)}
    if not unused:
        return {}
    shown = ", ".join(unused[:SHOWN]) + (f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else "")
    return {
        f"no rank has anything that takes {shown} of the checkpoint; to ignore it pass unexpected=": False
    }
