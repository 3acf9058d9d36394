"""Signals: a handler only sets a flag; the work happens at the next safe point, under a deadline."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from holdfast.saving.writer import at_work

__all__ = ["Interrupts"]

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAVING = tuple(getattr(signal, n) for n in ("SIGUSR1",) if hasattr(signal, n))


def _say(text: str) -> None:
    os.write(2, f"holdfast: {text}\n".encode())


class Interrupts:
    """Catches Ctrl-C, SIGTERM and SIGUSR1 while a training loop runs.

    The first Ctrl-C or SIGTERM asks for a save and an end at the safe point; SIGUSR1 for a save alone. A second Ctrl-C
    stops at once. When the deadline passes first, the process ends and says which checkpoint is the newest.

    A process that is forked from the loop has nothing to save. What is sent to a whole job it lets pass once, for the
    trainer may need its workers until the step has ended; then, and at SIGTERM, it does what it did before.
    """

    def __init__(self, deadline_seconds: float, newest: Callable[[], str]) -> None:
        self._deadline_seconds = deadline_seconds
        self._newest = newest
        self._pid = os.getpid()
        self._previous: dict[int, object] = {}
        self._timer: threading.Timer | None = None
        self.stop_signal: int | None = None
        self.save_signal: int | None = None
        self.aborted = False
        self.deadline: float | None = None  # to be gone a little before it, on the monotonic clock

    def install(self) -> None:
        """Put the handlers in place; does nothing outside the main thread or when a signal is ignored."""
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        for number in (*STOPPING, *SAVING):
            present = signal.getsignal(number)
            if present is signal.SIG_IGN:
                continue
            self._previous[number] = present
            signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put the earlier handlers back and stop the deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if threading.current_thread() is threading.main_thread():
            for number, present in self._previous.items():
                signal.signal(number, present if present is not None else signal.SIG_DFL)  # type: ignore[arg-type]
            self._previous = {}

    def take_save(self) -> bool:
        """Return whether a save alone was asked for, and forget it."""
        asked, self.save_signal = self.save_signal is not None, None
        return asked

    def told(self, number: int) -> None:
        """Take a stop signal for one that came to this process, for it came to another rank."""
        if self.stop_signal is None:
            self._stop(number, "another rank got it; ")

    def leave(self) -> BaseException:
        """Return what to raise once the save for a stop signal is durable."""
        number, self.stop_signal = self.stop_signal, None
        return (
            KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + (number or signal.SIGTERM))
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._pid != os.getpid():
            self._handle_forked(number)
            return
        if number in SAVING:
            self.save_signal = number
            return
        if self.stop_signal == signal.SIGINT and number == signal.SIGINT:
            self.aborted = True
            at_work.clear()  # nobody waits for them
            _say("stopping now; " + self._newest())
            raise KeyboardInterrupt
        self._stop(number)

    def _handle_forked(self, number: int) -> None:
        if number in SAVING:
            return
        if number == signal.SIGTERM or self.stop_signal == number:
            self.remove()
            signal.raise_signal(number)
        self.stop_signal = number

    def _stop(self, number: int, how: str = "") -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.stop_signal = number
        name = signal.Signals(number).name
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        _say(f"{name}: {how}saving at the end of this step, then stopping{again}")
        self.deadline = time.monotonic() + self._deadline_seconds - min(1.0, self._deadline_seconds / 5)
        self._timer = threading.Timer(self._deadline_seconds, self._give_up, (number,))
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self, number: int) -> None:
        _say(
            f"no new checkpoint within {self._deadline_seconds:g} s of {signal.Signals(number).name}; "
            + self._newest()
        )
        os._exit(128 + number)
