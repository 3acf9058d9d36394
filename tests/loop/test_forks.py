"""Processes that are forked in the loop: the run stays with the one that took it, and the child is free of it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from holdfast import Run
from holdfast.saving import overlap

PRELUDE = """
import os, signal, sys, time
import numpy as np
from holdfast import Checkpointer, every
from holdfast.loop.session import Session
held = {"w": np.zeros(4)}
complete = Session.complete
def slowly(self, begun):
    time.sleep(0.5)  # a save is under way at the fork
    return complete(self, begun)
Session.complete = slowly
"""

LOOP = """
def end(how):
    if how == "exits":
        sys.exit(3)
    if how == "raises":
        raise ValueError
    if how == "closes":
        ckpt.close()
        os._exit(4)
    if how == "waits":
        ckpt.wait()

with Checkpointer(sys.argv[1], held, save=every(steps=1), writer=sys.argv[2]) as ckpt:
    for step in ckpt.steps(3):
        held["w"] += 1
        for how in ("exits", "raises", "closes", "waits", "goes on") if step == 1 else ():
            child = os.fork()
            if child == 0:
                end(how)
                break
            print(how, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

SIGNALS = """
with Checkpointer(sys.argv[1], held, save=every(steps=10)) as ckpt:
    for step in ckpt.steps(1):
        child = os.fork()
        if child == 0:
            print(os.getpid(), flush=True)
            while True:
                time.sleep(0.1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # children that hang, too


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_child_leaves_the_run_alone(tmp_path: pathlib.Path, writer: str) -> None:
    with running(LOOP, tmp_path, writer) as process:
        out, err = process.communicate(timeout=30)
    assert out.splitlines() == ["exits 3", "raises 1", "closes 4", "waits 1", "goes on 1"], err
    assert err.count("belongs to process") == 2
    assert process.returncode == 0
    run = Run(tmp_path)
    assert run.steps == [1, 2, 3]
    assert not any(run.verify().values())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_waits_for_no_copy() -> None:
    class Endless:
        def fence(self) -> None:
            time.sleep(60)

    fence = overlap.Fence()
    fence.guard(Endless())  # type: ignore[arg-type]
    child = os.fork()
    if child == 0:
        fence.before_step(False)
        overlap.protect()
        os._exit(0)
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child waits for a thread that it does not have")


def test_signals_are_the_childs_own_affair(tmp_path: pathlib.Path) -> None:
    with running(SIGNALS, tmp_path) as process:
        child = pid_of_child(process)
        os.kill(child, signal.SIGUSR1)
        os.kill(
            child, signal.SIGINT
        )  # as Ctrl-C in a terminal, which the trainer may need the child to outlive
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert out.split() == [str(-signal.SIGTERM)], err
    assert process.returncode == 0
    assert "saving" not in err


def test_a_second_interrupt_is_meant_for_the_child(tmp_path: pathlib.Path) -> None:
    with running(SIGNALS, tmp_path) as process:
        child = pid_of_child(process)
        for _ in range(2):
            os.kill(child, signal.SIGINT)
            time.sleep(0.3)
        out, err = process.communicate(timeout=20)
    assert out.split() == [str(-signal.SIGINT)]
    assert "KeyboardInterrupt" in err


def pid_of_child(process: subprocess.Popen[str]) -> int:
    """Return the child's number, once it runs."""
    assert process.stdout is not None
    return int(process.stdout.readline())
