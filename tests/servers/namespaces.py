"""Simulated hosts: network namespaces, joined by a bridge in one of its own. Nothing of this machine's network is used.

A host has its own loopback device and address, processes, and a directory for its disk. Losing it kills every process
in it, and takes its network and its disk away.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Host", "hosts", "why_not"]

IP = shutil.which("ip") or "/usr/sbin/ip"
COMMAND_SECONDS = 20
LOST_SECONDS = 20.0


def _ip(*words: str) -> str:
    done = subprocess.run([IP, *words], capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A host with an address that the others reach, and a disk that nobody else does."""

    def __init__(self, name: str, address: str, disk: Path) -> None:
        self.name = name
        self.address = address
        self.disk = disk
        self.lost = False

    @property
    def inside(self) -> list[str]:
        """What to put before a command for it to run there."""
        return [IP, "netns", "exec", self.name]

    def pids(self) -> list[int]:
        """Return the processes there."""
        return [int(word) for word in _ip("netns", "pids", self.name).split()]

    def lose(self) -> None:
        """Lose it: processes, memory, network and disk."""
        if self.lost:
            return
        self.lost = True
        end = time.monotonic() + LOST_SECONDS
        while (left := self.pids()) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        _ip("netns", "delete", self.name)
        shutil.rmtree(self.disk, ignore_errors=True)
        assert not left, f"processes of {self.name} did not end"


@functools.cache
def why_not() -> str:
    """Return why there can be no simulated hosts here, "" when there can."""
    if not os.path.exists(IP):
        return "there is no `ip` command"
    if os.geteuid() != 0:
        return "network namespaces take root"
    try:
        with hosts(1, Path("/nonexistent")):
            return ""
    except (OSError, subprocess.SubprocessError) as e:
        return f"no network namespaces here: {e}"


@contextlib.contextmanager
def hosts(count: int, disks: Path) -> Iterator[list[Host]]:
    """Make so many hosts, and lose them all when the context is left."""
    mark = f"hf{uuid.uuid4().hex[:6]}"
    switch, found = f"{mark}-switch", list[Host]()
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for n in range(count):
            host = Host(f"{mark}-{n}", f"10.77.0.{n + 1}", disks / f"disk-{n}")
            _ip("netns", "add", host.name)
            found.append(host)
            _ip(
                "-n",
                host.name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{n}",
                "netns",
                switch,
            )
            _ip("-n", switch, "link", "set", f"port{n}", "master", "bridge", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", device, "up")
        yield found
    finally:
        for host in found:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                host.lose()
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _ip("netns", "delete", switch)
