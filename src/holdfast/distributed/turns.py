"""Turns: the steps after which all ranks decide alike, by hearing what rank 0 decided.

Rules by steps, epochs, samples and tokens say the same on every rank. What may differ (a metric, a clock, a signal that
came to one rank) is decided by rank 0 at a turn. Every rank knows by itself when the next turn is: where such a rule by
counts fires, where a monitored metric was logged, and at a step that rank 0 names at each turn, about a second ahead.
"""

from __future__ import annotations

import time

import msgspec

from holdfast.core.errors import InvalidFormat, RanksDisagree
from holdfast.distributed.lanes import Lane
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.words import Turn

__all__ = ["Turns"]

KEPT_TURNS = 64  # a rank that is this far behind is not waited for: it says so
FIRST_PAUSE, LONGEST_PAUSE = 0.0002, 0.05
STOP, SAVE = "stop", "save"


class Turns:
    """The turns of one launch, as one rank takes them."""

    def __init__(self, meeting: Meeting, lane: Lane) -> None:
        self._meeting = meeting
        self._lane = lane
        self.next = 0  # the step from which on there is a turn in any case
        self._taken: list[tuple[int, str]] = []  # as rank 0: step and key of the newest ones
        self._last = -1
        self._again = 0  # how many turns there were at that step: the end of an epoch is one more
        self._since = time.monotonic()
        self._round = 0
        self._saved = b""  # the newest wish for a save that was granted

    def anew(self) -> None:
        """Begin afresh, for all ranks have restored: steps that were taken come again."""
        self.next, self._last, self._round = 0, -1, self._round + 1
        self._taken.clear()

    def wish(self, *, stop_signal: int | None, save: bool) -> None:
        """Let rank 0 know, for its next turn, that a signal came to this rank."""
        if stop_signal is not None:
            self._lane.put(STOP, str(stop_signal).encode())
        if save:
            self._lane.put(SAVE, f"{self._meeting.ranks.rank} {time.monotonic_ns()}".encode())

    def wishes(self) -> tuple[int, bool]:
        """As rank 0: return the signal that came to any rank (0: none), and whether one asks for a save."""
        signal = int(self._lane.look(STOP) or b"0")
        save = self._lane.look(SAVE) or b""
        asked = save != self._saved
        self._saved = save
        return signal, asked

    def decide(self, turn: Turn) -> Turn:
        """As rank 0: publish what was decided, and return it with the step of the next turn."""
        now = time.monotonic()
        steps = max(1, turn.step - max(self._last, 0))
        ahead = steps * self._lane.meet_seconds / max(now - self._since, 1e-9)
        # Growing slowly: the first steps of a program say little of the others.
        ahead = min(ahead, 2.0 * max(1, turn.step - self._last)) if self._last >= 0 else 1
        following = max(turn.step + max(1, int(ahead)), self.next if turn.step == self._last else 0)
        turn = msgspec.structs.replace(turn, next=following, before=max(self._last, 0))
        key = self._key(turn.step)
        self._lane.put(key, msgspec.json.encode(turn))
        self._taken.append((turn.step, key))
        if len(self._taken) > KEPT_TURNS:
            dropped, key = self._taken.pop(0)
            self._lane.put(self._dropped, str(dropped).encode())
            self._lane.drop(key)
        self._note(turn, now)
        return turn

    def follow(self, step: int) -> Turn:
        """As another rank: return what rank 0 decided at this step.

        Raises:
            RanksDisagree: it does not say so in time, or had a turn that this rank had not.
        """
        meeting = self._meeting
        end, pause, looked = time.monotonic() + meeting.ranks.seconds, FIRST_PAUSE, time.monotonic()
        while (word := self._look(step)) is None:
            now = time.monotonic()
            gone = now > looked + 1 and meeting.has_left(0)
            if now > looked + 1 and int(self._lane.look(self._dropped) or b"-1") >= step:
                raise RanksDisagree(
                    f"rank {meeting.ranks.rank} is at the end of step {step}, and rank 0 has decided {KEPT_TURNS} "
                    "times since; let ranks not run so far apart, or log monitored metrics less often"
                )
            if gone or now > end:
                why = (
                    "it has ended, or gave the run up; see what became of it"
                    if gone
                    else f"it did not for {meeting.ranks.seconds:g} s. All ranks must log monitored metrics, and call "
                    "save(), in the same steps"
                )
                raise RanksDisagree(
                    f"rank {meeting.ranks.rank} waited at the end of step {step} for rank 0 to decide, and {why}"
                )
            looked = now if now > looked + 1 else looked
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
        try:
            turn = msgspec.json.decode(word, type=Turn)
        except ValueError as e:
            raise InvalidFormat(f"what rank 0 says of step {step} is malformed: {e}") from e
        if turn.before != max(self._last, 0):
            raise RanksDisagree(
                f"rank 0 decided at step {turn.before} and rank {meeting.ranks.rank} at step {max(self._last, 0)}: all "
                "ranks must log monitored metrics, and call save(), in the same steps"
            )
        self._note(turn, time.monotonic())
        return turn

    def _look(self, step: int) -> bytes | None:
        try:
            return self._lane.look(self._key(step))
        except RanksDisagree as e:
            for _ in range(20):  # its end is seen on the wire before it is one
                if self._meeting.has_left(0):
                    break
                time.sleep(0.1)
            else:
                raise
            raise RanksDisagree(f"step {step}: the process of rank 0 has ended; see what became of it") from e

    def _note(self, turn: Turn, now: float) -> None:
        self._again = self._again + 1 if turn.step == self._last else 0
        self.next, self._last, self._since = turn.next, turn.step, now

    def _key(self, step: int) -> str:
        """Return the key of the next turn, which is at this step."""
        again = self._again + 1 if step == self._last else 0
        return f"turn-{self._round}-{step}" + (f"-{again}" if again else "")

    @property
    def _dropped(self) -> str:
        return f"dropped-{self._round}"
