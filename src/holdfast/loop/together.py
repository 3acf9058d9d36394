"""How the ranks of one run go together: who holds it, what each saves, and what all restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.catalog.keyfiles import Signing
from holdfast.core.clock import TimeSource
from holdfast.core.errors import PolicyError, RanksDisagree
from holdfast.distributed.hosts import Attempts, Follower, Leader
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.planning import RankPlanner
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.words import Decision, Outcome, Restoring
from holdfast.loop.following import Following
from holdfast.loop.resume import Restored
from holdfast.loop.saver import SaveSettings
from holdfast.loop.session import Session
from holdfast.policies import Rule
from holdfast.policies.grids import Grid
from holdfast.policies.moments import On
from holdfast.stores import Store

__all__ = ["Together", "check_rule", "check_settings"]


def check_settings(settings: SaveSettings) -> None:
    """Refuse what each rank would decide for itself. Raises PolicyError."""
    if settings.writer == "process":
        raise PolicyError('writer="process": several ranks write from threads so far; leave it "auto"')
    if settings.when_busy != "wait" or settings.when_full != "warn":
        raise PolicyError(
            f'when_busy="{settings.when_busy}", when_full="{settings.when_full}": with several ranks each would decide '
            'for itself what to leave out; use "wait" and "warn"'
        )


def check_rule(save: Rule | None) -> None:
    """Refuse a rule that need not say the same on every rank. Raises PolicyError."""
    for leaf in save.leaves() if save is not None else ():
        known = isinstance(leaf, (Grid, On)) and getattr(leaf, "unit", "step") != "active_seconds"
        if not known:
            raise PolicyError(
                f"save={leaf}: with several ranks all must come to the same step for the same save, and clocks differ; "
                "use steps, epochs, samples or tokens"
            )


@dataclass(slots=True)
class Together:
    """This process among the ranks."""

    ranks: Ranks
    store: Store
    same: tuple[str, ...] = ()
    meeting: Meeting = field(init=False)
    planner: RankPlanner | None = None
    _restores: int = 0

    def __post_init__(self) -> None:
        self.meeting = Meeting(self.store, self.ranks)

    def session(self, state: dict[str, object], time: TimeSource, signing: Signing) -> Session:
        """Take the run up as rank 0, or follow who does. Returns when all ranks are there.

        Raises:
            RanksDisagree: one is not there in time.
        """
        planner = self.planner = RankPlanner(state, self.ranks, self.same)
        if not self.ranks.leads:
            return Following(self.store, time, self.meeting, Follower(self.meeting, lambda: planner.shape))
        host = Leader(self.meeting, lambda: planner.shape)
        session = Session(self.store, time, wait=True, host=host, key=signing.key, behind=True)
        try:
            self.meeting.open(session.identity.run, session.lease.generation)
        except BaseException:
            session.close()
            raise
        session.next_attempt = Attempts(self.meeting).next
        return session

    def restore(self, which: int | str, attempt: Callable[[int | str], Restored]) -> Restored:
        """Restore the same checkpoint on every rank: rank 0 picks it, and all go on when all have it.

        Raises:
            RanksDisagree: a rank could not restore it, or is silent; the message names it and why.
        """
        self._restores += 1
        topic = f"restore-{self._restores}"
        return self._decide(which, attempt, topic) if self.ranks.leads else self._follow(attempt, topic)

    def _decide(self, which: int | str, attempt: Callable[[int | str], Restored], topic: str) -> Restored:
        try:
            restored = attempt(which)
        except Exception as e:
            self.meeting.say(topic, Decision(error=f"{type(e).__name__}: {e}"))
            raise
        self.meeting.say(topic, Decision(restored.manifest.step, restored.manifest.attempt))
        heard = self.meeting.hear_all(topic, Restoring)
        failed = [f"rank {r}: {word.error}" for r, word in sorted(heard.items()) if word.error]
        if len(heard) < self.ranks.world - 1:
            failed.append(f"{self.meeting.missing(list(heard))} said nothing for {self.ranks.seconds:g} s")
        step = restored.manifest.step
        error = f"step {step} was not restored by every rank: {'; '.join(failed)}" if failed else ""
        self.meeting.say(f"{topic}-done", Outcome(error=error))
        if error:
            raise RanksDisagree(error)
        return restored

    def _follow(self, attempt: Callable[[int | str], Restored], topic: str) -> Restored:
        rank, seconds = self.ranks.rank, self.ranks.seconds
        decision = self.meeting.hear(topic, 0, Decision)
        if decision is None:
            raise RanksDisagree(f"rank {rank} waited {seconds:g} s for rank 0 to say what is restored")
        if decision.error:
            raise RanksDisagree(f"rank 0 could not restore: {decision.error}")
        try:
            restored = attempt(decision.step)
            if restored.manifest.attempt != decision.attempt:
                raise RanksDisagree(
                    f"rank {rank} found attempt {restored.manifest.attempt} of step {decision.step}; rank 0 has "
                    f"restored {decision.attempt}"
                )
        except Exception as e:
            self.meeting.say(topic, Restoring(rank, f"{type(e).__name__}: {e}"))
            raise
        self.meeting.say(topic, Restoring(rank))
        outcome = self.meeting.hear(f"{topic}-done", 0, Outcome)
        if outcome is None:
            raise RanksDisagree(f"rank {rank} waited {seconds:g} s for rank 0 to say that all have restored")
        if outcome.error:
            raise RanksDisagree(outcome.error)
        return restored
