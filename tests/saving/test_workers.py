"""A few threads for one task: results in order, the first failure raised, nothing left running, and work at the end of
the interpreter."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from holdfast.core.workers import Workers


def test_results_come_in_order_from_no_more_threads_than_were_asked_for() -> None:
    most, now, lock = 0, 0, threading.Lock()
    step = threading.Barrier(3)

    def act(n: int) -> int:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        step.wait(60)  # three at once, or never
        with lock:
            now -= 1
        return n * n

    with Workers(3, "test") as pool:
        assert list(pool.map(act, range(12))) == [n * n for n in range(12)]
    assert most == 3


def test_a_failure_is_raised_and_what_has_not_begun_is_left_out() -> None:
    began: list[int] = []
    hold = threading.Event()

    def act(n: int) -> None:
        began.append(n)
        if n == 0:
            raise ValueError("zero")
        hold.wait(60)

    with pytest.raises(ValueError, match="zero"), Workers(2, "test") as pool:
        jobs = [pool.submit(act, n) for n in range(10)]
        jobs[-1].add_done_callback(lambda _: hold.set())  # it is left out, so the one that has begun may end
        jobs[0].result()
    assert len(began) < 10
    assert any(job.cancelled() for job in jobs)


CODE = """
import atexit, threading, time
from holdfast.core.workers import Workers
def last():
    with Workers(2, "late") as pool:
        print(list(pool.map(lambda n: n + 1, range(5))), flush=True)
atexit.register(last)
stuck = Workers(1, "stuck")
stuck.submit(time.sleep, 1000)
"""


def test_it_works_when_the_interpreter_ends_and_does_not_keep_it_from_ending() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[1, 2, 3, 4, 5]"
