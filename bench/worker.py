"""A process for each contestant of a case: it lives through the case, acts when told, and idles meanwhile.

So no contestant measures with another's memory, caches or threads, and each keeps what it warmed up.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pathlib
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SAMPLE_SECONDS = 0.02
RESET_PEAK = "5"  # written to clear_refs: what is in memory now is the peak so far
PATIENCE_SECONDS = 600.0


class WorkerFailed(Exception):
    """The contestant raised, died or hung; the message is what goes into the report."""


class Worker:
    """The parent's end: `call` runs a method of the object that `make(*args)` built in the process."""

    def __init__(self, log: pathlib.Path, make: Callable[..., object], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log, make, args))
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Return when the object is built. Raises WorkerFailed."""
        self._answer(None)

    def call(self, method: str, *args: object) -> Any:
        """Call a method and return what it returned. Raises WorkerFailed."""
        self._send(method, args)
        return self._answer(None)

    def watched(self, method: str, *args: object) -> tuple[Any, int]:
        """Call a method and return what it returned and the most memory, in bytes, that it took: of the process, as the
        kernel keeps count of it, and beside that the most that its descendants were seen to have for themselves."""
        _process(self._pid, "clear_refs").write_text(RESET_PEAK)
        beside = [self._beside()]
        self._send(method, args)
        found = self._answer(lambda: beside.append(self._beside()))
        return found, _kibibytes(self._pid, "status", "VmHWM") + max(beside)

    def _beside(self) -> int:
        return sum(_kibibytes(pid, "smaps_rollup", "Private_") for pid in descendants(self._pid)[1:])

    def close(self) -> None:
        """End it; whoever does not end by himself is killed, with his children."""
        try:
            self._send("close", ())
            self._answer(None)
        except WorkerFailed:
            pass
        self._process.join(10)
        for pid in reversed(descendants(self._pid)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.join()
        self._pipe.close()

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _send(self, method: str, args: tuple[object, ...]) -> None:
        try:
            self._pipe.send((method, args))
        except OSError as e:
            raise WorkerFailed(f"its process is gone: {e}") from e

    def _answer(self, sample: Callable[[], None] | None) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while not self._pipe.poll(SAMPLE_SECONDS if sample else PATIENCE_SECONDS):
                if time.monotonic() >= deadline:
                    raise WorkerFailed(f"no answer within {PATIENCE_SECONDS:.0f} s")
                if sample is not None:
                    sample()
            error, value = self._pipe.recv()
        except (EOFError, OSError) as e:
            raise WorkerFailed("its process ended") from e
        if error is not None:
            raise WorkerFailed(error)
        return value


def _serve(
    pipe: Connection, log: pathlib.Path, make: Callable[..., object], args: tuple[object, ...]
) -> None:
    """The child: whatever it or its children print goes to the log."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    target: object | None = None
    method: str = "ready"
    arguments: tuple[object, ...] = ()
    while True:
        try:
            if target is None:
                target, value = make(*args), None
            else:
                value = getattr(target, method)(*arguments)
            pipe.send((None, value))
        except Exception as e:  # noqa: BLE001 - whatever a contestant raises is a result
            traceback.print_exc()
            pipe.send((f"{type(e).__name__}: {str(e).strip()[:300]}", None))
            if target is None:
                return
        if method == "close":
            return
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return


def descendants(root: int) -> list[int]:
    """Return a process and its living descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = pathlib.Path(entry.path, "stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _process(pid: int, name: str) -> pathlib.Path:
    return pathlib.Path("/proc", str(pid), name)


def _kibibytes(pid: int, name: str, field: str) -> int:
    """Return the sum of those fields of a file about a process, in bytes; 0 when it has ended."""
    try:
        lines = _process(pid, name).read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
