"""Processes of this machine: to start one of our own, and whether one is still there, which is told by its number, its
start time, and the namespace both are of."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["has_ended", "namespace", "process_start", "start_module"]


def start_module(
    name: str,
    *arguments: object,
    fds: Sequence[int],
    stderr: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start one of our modules as a process that gets these file descriptors: by exec alone, so that nothing of the
    user's program runs in it, and in a session of its own: Ctrl-C in a terminal is for the trainer."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", name, *map(str, arguments)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment,
        start_new_session=True,
    )


def _read_text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def namespace() -> str:
    """Return the machine boot and the process namespace that this process is in."""
    boot = _read_text("/proc/sys/kernel/random/boot_id").strip()
    with contextlib.suppress(OSError):
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def process_start(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot, "" when there is none to be seen, or no /proc.

    One that has ended and was not waited for yet is "ended".
    """
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def has_ended(pid: int, started: str) -> bool:
    """Return True only when a process of this namespace is known to be gone."""
    present = process_start(pid)
    if present and present != started:
        return True
    try:  # /proc may be absent, or hide other users' processes
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
