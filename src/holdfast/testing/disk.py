"""A disk on which a plan of faults comes true, at each of the calls that a local store is made of."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from holdfast.core.buffers import Buffer
from holdfast.stores.disk import OsDisk
from holdfast.testing.plan import Crash, Fault, FaultPlan

__all__ = ["FaultDisk", "FaultyDisk"]

Result = TypeVar("Result")


class FaultDisk(OsDisk):
    """The operating system's calls under a plan.

    Changing calls are "open", "append" (opening for it), "write", "fsync", "fsync_dir", "link", "rename", "unlink",
    "mkdir", "rmdir"; others are "open_read", "read", "stat", "walk", "close", "room". Keys are paths.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self._paths: dict[int, str] = {}

    def _error(self, fault: Fault, path: str) -> OSError:
        if fault.code is None:
            raise ValueError(f"{fault.kind} is nothing that a disk says")
        return OSError(fault.code, os.strerror(fault.code), path)

    def _change(
        self, call: str, path: str, act: Callable[[], Result], half: Callable[[Fault], object] | None = None
    ) -> Result:
        return self.plan.around(call, path, act, self._error, half=half)

    def _look(self, call: str, path: str, act: Callable[[], Result]) -> Result:
        return self.plan.around(call, path, act, self._error, changes=False)

    def _open(self, call: str, path: str, act: Callable[[], int], *, changes: bool = True) -> int:
        opened: list[int] = []
        try:
            self.plan.around(call, path, lambda: opened.append(act()), self._error, changes=changes)
        except BaseException:
            for fd in opened:  # nobody was told of it
                os.close(fd)
            raise
        self._paths[opened[0]] = path
        return opened[0]

    def open_new(self, path: str) -> int:
        return self._open("open", path, lambda: OsDisk.open_new(self, path))

    def open_append(self, path: str) -> int:
        return self._open("append", path, lambda: OsDisk.open_append(self, path))

    def open_read(self, path: str) -> int:
        return self._open("open_read", path, lambda: OsDisk.open_read(self, path), changes=False)

    def write(self, fd: int, data: Buffer) -> int:
        whole = memoryview(data).cast("B")

        def half(fault: Fault) -> None:
            OsDisk.set_direct(self, fd, on=False)  # half a buffer need not be whole blocks
            OsDisk.write(self, fd, whole[: len(whole) // 2])

        return self._change("write", self._path(fd), lambda: OsDisk.write(self, fd, data), half)

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return self._look("read", self._path(fd), lambda: OsDisk.pread_into(self, fd, target, offset))

    def fsync(self, fd: int) -> None:
        self._change("fsync", self._path(fd), lambda: OsDisk.fsync(self, fd))

    def close(self, fd: int) -> None:
        path = self._path(fd)
        self._paths.pop(fd, None)
        try:
            with contextlib.suppress(Crash):  # when a process dies its descriptors are closed
                self._look("close", path, lambda: None)
        finally:
            super().close(fd)

    def fsync_dir(self, path: str) -> None:
        self._change("fsync_dir", path, lambda: OsDisk.fsync_dir(self, path))

    def link(self, source: str, target: str) -> None:
        self._change("link", target, lambda: OsDisk.link(self, source, target))

    def rename(self, source: str, target: str) -> None:
        self._change("rename", target, lambda: OsDisk.rename(self, source, target))

    def unlink(self, path: str) -> None:
        self._change("unlink", path, lambda: OsDisk.unlink(self, path))

    def mkdir(self, path: str) -> None:
        self._change("mkdir", path, lambda: OsDisk.mkdir(self, path))

    def rmdir(self, path: str) -> None:
        self._change("rmdir", path, lambda: OsDisk.rmdir(self, path))

    def stat(self, path: str | int) -> os.stat_result:
        name = self._path(path) if isinstance(path, int) else path
        return self._look("stat", name, lambda: OsDisk.stat(self, path))

    def walk(self, path: str) -> Iterator[str]:
        return self._look("walk", path, lambda: OsDisk.walk(self, path))

    def room(self, path: str) -> int:
        return self._look("room", path, lambda: OsDisk.room(self, path))

    def _path(self, fd: int) -> str:
        return self._paths.get(fd, "")


class FaultyDisk(FaultDisk):
    """Raises an OSError at the n-th changing call: instead of it, or (`applied`) after it took effect; `sticky`: and at
    every one behind it. A short way to write a plan of one fault that may be moved."""

    def __init__(
        self, fail_at: int, code: int = errno.EIO, *, applied: bool = False, sticky: bool = False
    ) -> None:
        super().__init__(FaultPlan())
        self._fault = Fault(
            errno.errorcode[code], when="after" if applied else "before", times=None if sticky else 1
        )
        self.fail_at = fail_at

    @property
    def fired(self) -> bool:
        """Whether the fault happened."""
        return bool(self.plan.fired)

    @property
    def calls(self) -> list[str]:
        """The names of the changing calls."""
        return [call for call, _ in self.plan.calls]

    @property
    def fail_at(self) -> int:
        """The number of the call that fails."""
        return self.plan.faults[0].at

    @fail_at.setter
    def fail_at(self, at: int) -> None:
        fault = self._fault
        self.plan.faults = [Fault(fault.kind, at, fault.when, times=fault.times)]
