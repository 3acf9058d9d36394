"""Disks that fail or kill the process at the n-th call that changes something.

The loop that uses them comes from SQLite's tests: let call 1 fail, then call 2, and so on until nothing fails, so that
every point of an operation has been tried and not a sample.
"""

from __future__ import annotations

import errno
import os
import signal

from holdfast.core.buffers import Buffer
from holdfast.stores.disk import OsDisk

__all__ = ["FaultyDisk", "KillingDisk"]


class _CountingDisk(OsDisk):
    """Counts the calls that change something; `before` and `after` are the places to interfere."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, call: str, path: str | int) -> None:
        self.calls.append(call)

    def after(self, call: str) -> None:
        """Run when the call has taken effect."""

    def open_new(self, path: str) -> int:
        self.before("open", path)
        fd = super().open_new(path)
        self.after("open")
        return fd

    def open_append(self, path: str) -> int:
        self.before("append", path)
        fd = super().open_append(path)
        self.after("append")
        return fd

    def write(self, fd: int, data: Buffer) -> int:
        self.before("write", fd)
        done = super().write(fd, data)
        self.after("write")
        return done

    def fsync(self, fd: int) -> None:
        self.before("fsync", fd)
        super().fsync(fd)
        self.after("fsync")

    def fsync_dir(self, path: str) -> None:
        self.before("fsync_dir", path)
        super().fsync_dir(path)
        self.after("fsync_dir")

    def link(self, source: str, target: str) -> None:
        self.before("link", target)
        super().link(source, target)
        self.after("link")

    def rename(self, source: str, target: str) -> None:
        self.before("rename", target)
        super().rename(source, target)
        self.after("rename")

    def unlink(self, path: str) -> None:
        self.before("unlink", path)
        super().unlink(path)
        self.after("unlink")

    def mkdir(self, path: str) -> None:
        self.before("mkdir", path)
        super().mkdir(path)
        self.after("mkdir")


class KillingDisk(_CountingDisk):
    """Kills its own process with SIGKILL at the n-th changing call, "before" or "after" it; "torn": half-way through
    the n-th write."""

    def __init__(self, kill_at: int, when: str) -> None:
        super().__init__()
        self.kill_at = kill_at
        self.when = when

    def _reached(self, when: str) -> bool:
        return len(self.calls) == self.kill_at and self.when == when

    def before(self, call: str, path: str | int) -> None:
        super().before(call, path)
        if self._reached("before"):
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, call: str) -> None:
        if self._reached("after"):
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, fd: int, data: Buffer) -> int:
        if self.when == "torn" and self.calls.count("write") + 1 == self.kill_at:
            whole = memoryview(data).cast("B")
            OsDisk.write(self, fd, whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(fd, data)


class FaultyDisk(_CountingDisk):
    """Raises an OSError at the n-th changing call: instead of it, or (`applied`) after it took effect."""

    def __init__(
        self, fail_at: int, code: int = errno.EIO, *, applied: bool = False, sticky: bool = False
    ) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.code = code
        self.applied = applied
        self.sticky = sticky
        self.fired = False

    def _fire(self, call: str) -> None:
        reached = len(self.calls) >= self.fail_at if self.sticky else len(self.calls) == self.fail_at
        if reached:
            self.fired = True
            raise OSError(self.code, os.strerror(self.code))

    def before(self, call: str, path: str | int) -> None:
        super().before(call, path)
        if not self.applied:
            self._fire(call)

    def after(self, call: str) -> None:
        if self.applied:
            self._fire(call)
