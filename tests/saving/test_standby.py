"""Threads that stand by for work: used again, never in the way, and not taken along by a fork."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref

import pytest

from holdfast.core import standby
from holdfast.core.standby import IDLE, MOST_IDLE, run_behind


@pytest.fixture(autouse=True)
def nobody_stands_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of other tests that stand by do not count."""
    monkeypatch.setattr(standby, "_idle", [])


def run_one() -> tuple[int, str]:
    found: list[tuple[int, str]] = []
    done = threading.Event()

    def work() -> None:
        found.append((threading.get_ident(), threading.current_thread().name))
        done.set()

    run_behind(work, "holdfast-test")
    assert done.wait(60)
    return found[0]


def settle(count: int) -> None:
    """Wait until so many stand by."""
    for _ in range(6000):
        if len(standby._idle) == count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{len(standby._idle)} threads stand by, not {count}")


def test_a_thread_is_used_again_and_bears_the_name_of_its_work() -> None:
    first = run_one()
    settle(1)
    assert run_one() == first
    assert first[1] == "holdfast-test"
    settle(1)
    assert [t.name for t in threading.enumerate() if t.ident == first[0]] == [IDLE]


def test_work_of_the_same_time_has_threads_of_its_own_and_few_stay() -> None:
    before = set(threading.enumerate())
    together = threading.Barrier(MOST_IDLE + 3)
    for _ in range(MOST_IDLE + 2):
        run_behind(lambda: together.wait(60) and None, "holdfast-test")
    together.wait(60)
    settle(MOST_IDLE)
    for _ in range(6000):
        if len(set(threading.enumerate()) - before) == MOST_IDLE:
            return
        threading.Event().wait(0.01)
    raise AssertionError("more threads stay than may")


def test_nothing_of_the_work_is_kept() -> None:
    class Held:
        def __call__(self) -> None:
            pass

    work = Held()
    gone = weakref.ref(work)
    run_behind(work, "holdfast-test")
    settle(1)
    del work
    gc.collect()
    assert gone() is None


def test_a_forked_child_starts_threads_of_its_own() -> None:
    before = standby._idle
    run_one()
    settle(1)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # who waits for a thread that the fork left behind waits for ever
        code = 1
        try:
            run_one()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert standby._idle is before
    assert run_one()
