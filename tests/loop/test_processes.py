"""Real processes: signals, deadlines, forgotten close(), exit codes, and two writers of one run."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from holdfast import Run
from patience import until

PRELUDE = """
import sys, time
import numpy as np
from holdfast import Checkpointer, every
held = {"w": np.zeros(4), "seen": [0]}
def say(*words): print(*words, flush=True)
"""

LOOP = """
ckpt = Checkpointer(sys.argv[1], held, save=every(steps=10**6), deadline_seconds=DEADLINE)
for step in ckpt.steps(10**6):
    held["seen"][0] += 1
    say("step", step)
    time.sleep(PAUSE)
"""


def start(code: str, url: pathlib.Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(url)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def loop(url: pathlib.Path, *, deadline: float = 20.0, pause: float = 0.02) -> subprocess.Popen[str]:
    return start(LOOP.replace("DEADLINE", str(deadline)).replace("PAUSE", str(pause)), url)


def hear(process: subprocess.Popen[str], words: str, *, errors: bool = False) -> None:
    """Read up to the end of the line that begins so, and no further: the rest is for `finish`."""
    said, line = process.stderr if errors else process.stdout, b""
    assert said is not None
    while one := os.read(said.fileno(), 1):
        line += one
        if one == b"\n" and line.startswith(words.encode()):
            return
        line = b"" if one == b"\n" else line
    raise AssertionError(f"never said {words!r}: {process.communicate()[1]}")


def until_saved(url: pathlib.Path) -> None:
    until(lambda: bool(Run(url).steps), "a checkpoint")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_stop_signal_saves_at_the_safe_point(tmp_path: pathlib.Path, number: int, code: int) -> None:
    process = loop(tmp_path)
    hear(process, "step 5")
    process.send_signal(number)
    returned, out, err = finish(process)
    # Python turns an uncaught KeyboardInterrupt into death by SIGINT, which a shell reports as 130.
    assert returned == code, err
    run = Run(tmp_path)
    assert run.steps == [run.latest.step]
    assert run.latest.reasons == ("preempted by a signal",)
    last = int(out.split()[-1]) if out.split() else 5
    assert run.latest.step == last + 1  # the step under way was finished, and no other was begun
    assert "saving at the end of this step" in err


def test_sigusr1_saves_and_goes_on(tmp_path: pathlib.Path) -> None:
    process = loop(tmp_path)
    hear(process, "step 3")
    process.send_signal(signal.SIGUSR1)
    until_saved(tmp_path)
    hear(process, "step")
    process.kill()
    finish(process)
    assert len(Run(tmp_path).steps) == 1
    assert Run(tmp_path).latest.reasons == ("signal SIGUSR1",)


def test_two_interrupts_stop_at_once(tmp_path: pathlib.Path) -> None:
    process = loop(tmp_path, pause=0.02)
    hear(process, "step 2")
    process.send_signal(signal.SIGUSR1)
    until_saved(tmp_path)
    process.kill()
    finish(process)
    old = Run(tmp_path).steps
    slow = loop(tmp_path, pause=30)
    hear(slow, "step")
    slow.send_signal(signal.SIGINT)
    hear(slow, "holdfast: SIGINT", errors=True)  # two signals of which none was seen yet are one
    before = time.monotonic()
    slow.send_signal(signal.SIGINT)
    code, _, err = finish(slow)
    assert time.monotonic() - before < 20  # it did not wait for the 30 seconds of the step
    assert code == -signal.SIGINT
    assert f"stopping now; the newest checkpoint is step {old[-1]}" in err
    assert Run(tmp_path).steps == old
    assert not any(Run(tmp_path).verify().values())


def test_a_deadline_ends_the_process_and_says_what_there_is(tmp_path: pathlib.Path) -> None:
    process = loop(tmp_path, deadline=0.5, pause=60)
    hear(process, "step 0")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert "no new checkpoint within 0.5 s of SIGTERM; there is no checkpoint yet" in err


def test_forgetting_close_loses_nothing(tmp_path: pathlib.Path) -> None:
    code = """
ckpt = Checkpointer(sys.argv[1], {"w": np.zeros(10**6)}, save=every(steps=1))
for step in ckpt.steps(5):
    if step == 3:
        break
"""
    returned, _, err = finish(start(code, tmp_path))
    assert returned == 0, err
    assert Run(tmp_path).steps == [1, 2, 3]
    assert Run(tmp_path).writer is None


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_checkpointer_that_was_dropped_saves_all_the_same(tmp_path: pathlib.Path, writer: str) -> None:
    code = """
from holdfast.loop.session import Session
persist = Session.complete
def slowly(self, begun):
    time.sleep(0.5)
    return persist(self, begun)
Session.complete = slowly

def main():
    ckpt = Checkpointer(sys.argv[1], held, save=every(steps=1), writer="WRITER")
    for step in ckpt.steps(5):
        if step == 2:
            break
main()
"""
    returned, _, err = finish(start(code.replace("WRITER", writer), tmp_path))
    assert returned == 0, err
    assert Run(tmp_path).steps == [1, 2]


def test_a_failed_save_at_exit_is_an_exit_code(tmp_path: pathlib.Path) -> None:
    code = """
import errno
from holdfast.stores import LocalStore
from holdfast.testing import FaultyDisk
disk = FaultyDisk(10**9, errno.ENOSPC, sticky=True)
ckpt = Checkpointer(LocalStore(sys.argv[1], disk), held, save=every(steps=2))
for step in ckpt.steps(3):
    if step == 1:
        disk.fail_at = 0
    if step == 2:
        break
"""
    returned, _, err = finish(start(code, tmp_path))
    assert returned == 1
    assert "holdfast: a save failed" in err
    assert "No space left" in err
    assert "Traceback" not in err


def test_the_second_process_is_told_who_holds_the_run(tmp_path: pathlib.Path) -> None:
    first = loop(tmp_path)
    hear(first, "step 1")
    second = loop(tmp_path)
    code, _, err = finish(second)
    assert code == 1
    assert f"is being written by process {first.pid}" in err
    first.kill()
    finish(first)
    third = loop(tmp_path)  # a dead holder is no holder: no waiting
    hear(third, "step 0")
    third.kill()
    finish(third)


def test_a_paused_holder_cannot_commit_after_a_takeover(tmp_path: pathlib.Path) -> None:
    code = """
from holdfast.catalog import lease
ckpt = Checkpointer(sys.argv[1], held, save=every(steps=1))
for step in ckpt.steps(10**6):
    say("step", step)
    sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    hear(process, "step 0")
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    hear(process, "step 1")
    until_saved(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    _steal(tmp_path)
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate("\n" * 5, timeout=60)
    assert process.returncode == 1
    assert "was taken over by" in err
    assert Run(tmp_path).steps == [1]


def _steal(url: pathlib.Path) -> None:
    """Take the lease as another machine would once it has expired: create the next generation."""
    import msgspec

    from holdfast.catalog.keys import lease_key
    from holdfast.catalog.lease import holder
    from holdfast.format.sealed import seal
    from holdfast.stores import LocalStore

    store = LocalStore(url)
    held = holder(store)
    assert held is not None
    taken = msgspec.structs.replace(
        held, generation=held.generation + 1, host="elsewhere", namespace="elsewhere"
    )
    store.create(lease_key(taken.generation), seal(msgspec.json.encode(taken)))
