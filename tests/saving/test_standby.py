"""Threads that stand by for work: used again, never in the way, and not taken along by a fork."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from types import MethodType

import pytest

from holdfast.core import standby
from holdfast.core.standby import IDLE, MOST_IDLE, run_behind
from patience import until


@pytest.fixture(autouse=True)
def nobody_stands_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of other tests that stand by do not count, and those that are still at something do not come to it."""

    def at_work() -> list[threading.Thread]:
        ours = [t for t in threading.enumerate() if isinstance(getattr(t, "_target", None), MethodType)]
        return [t for t in ours if t._target.__func__ is standby._Thread._run and t.name != IDLE]

    until(lambda: not at_work(), "the work of other tests to end")
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
    until(lambda: len(standby._idle) == count, f"{count} threads to stand by")


def test_a_thread_is_used_again_and_bears_the_name_of_its_work() -> None:
    first = run_one()
    settle(1)
    assert run_one() == first
    assert first[1] == "holdfast-test"
    settle(1)
    assert [t.name for t in threading.enumerate() if t.ident == first[0]] == [IDLE]


class Crossed(list):
    """Who looks how many there are finds that others have come meanwhile."""

    def __len__(self) -> int:
        found = super().__len__()
        threading.Event().wait(0.01)
        return found


@pytest.mark.parametrize("kind", [list, Crossed])
def test_work_of_the_same_time_has_threads_of_its_own_and_few_stay(
    monkeypatch: pytest.MonkeyPatch, kind: type[list]
) -> None:
    monkeypatch.setattr(standby, "_idle", kind())
    before = set(threading.enumerate())
    together = threading.Barrier(MOST_IDLE + 3)
    for _ in range(MOST_IDLE + 2):
        run_behind(lambda: together.wait(60) and None, "holdfast-test")
    together.wait(60)
    settle(MOST_IDLE)
    until(lambda: len(set(threading.enumerate()) - before) == MOST_IDLE, "those that may not stay to end")


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
