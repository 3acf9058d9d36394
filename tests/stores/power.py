"""A disk that knows what a power cut would leave: only what was fsynced, contents and names each for themselves."""

from __future__ import annotations

import os
import pathlib

from holdfast.core.buffers import Buffer
from holdfast.stores import OsDisk


class PowerCut(Exception):
    """The lights went out. No OSError: nothing may catch it and go on."""


class PowerDisk(OsDisk):
    """Real files below `base`, and beside them the image that a power cut would leave.

    `cut_at` ends the n-th changing call before it takes effect, and every call after it.
    """

    def __init__(self, base: pathlib.Path, cut_at: int | None = None) -> None:
        self.base = str(base)
        self.cut_at = cut_at
        self.calls: list[tuple[str, str]] = []
        self._files: dict[str, int] = {}  # path -> identity of the file it names now
        self._dirs: set[str] = {self.base}
        self._next = 0
        self._paths: dict[int, str] = {}  # descriptor -> path
        self._durable_bytes: dict[int, bytes] = {}
        self._durable_names: dict[str, dict[str, int | None]] = {self.base: {}}  # None: a directory
        self.adopt()

    def adopt(self) -> None:
        """Take what lies on the disk as durable, below directories whose names are durable."""
        for directory, _, files in os.walk(self.base):
            self._dirs.add(directory)
            for name in files:
                path = os.path.join(directory, name)
                self._files.setdefault(path, self._new())
                self._durable_bytes[self._files[path]] = pathlib.Path(path).read_bytes()
        for directory in self._dirs:
            self._durable_names[directory] = self._names_in(directory)

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _names_in(self, directory: str) -> dict[str, int | None]:
        files = {p: i for p, i in self._files.items() if os.path.dirname(p) == directory}
        below: dict[str, int | None] = {os.path.basename(p): i for p, i in files.items()}
        return below | {os.path.basename(d): None for d in self._dirs if os.path.dirname(d) == directory}

    def _call(self, name: str, path: str) -> None:
        if self.cut_at is not None and len(self.calls) >= self.cut_at:
            raise PowerCut
        self.calls.append((name, path))

    # ---- what a power cut leaves ----------------------------------------------------------------------------------

    def left(self, names: str = "durable") -> dict[str, bytes | None]:
        """Return each file a power cut would leave, by path below the base; contents that were never fsynced are None.

        `names` "durable" takes only fsynced names; "current" says that every name came through though its bytes did not.
        """
        found: dict[str, bytes | None] = {}
        stack = [self.base]
        while stack:
            directory = stack.pop()
            entries = (
                self._durable_names.get(directory, {}) if names == "durable" else self._names_in(directory)
            )
            for name, identity in entries.items():
                path = os.path.join(directory, name)
                if identity is None:
                    stack.append(path)
                else:
                    found[os.path.relpath(path, self.base)] = self._durable_bytes.get(identity)
        return found

    # ---- the calls ------------------------------------------------------------------------------------------------

    def open_new(self, path: str) -> int:
        self._call("open_new", path)
        fd = super().open_new(path)
        self._files[path], self._paths[fd] = self._new(), path
        return fd

    def open_append(self, path: str) -> int:
        self._call("open_append", path)
        fd = super().open_append(path)
        self._files.setdefault(path, self._new())
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: Buffer) -> int:
        self._call("write", self._paths[fd])
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        path = self._paths[fd]
        self._call("fsync", path)
        self._durable_bytes[self._files[path]] = pathlib.Path(path).read_bytes()

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        super().close(fd)

    def fsync_dir(self, path: str) -> None:
        self._call("fsync_dir", path)
        super().fsync_dir(path)
        self._durable_names[path] = self._names_in(path)

    def link(self, source: str, target: str) -> None:
        self._call("link", target)
        super().link(source, target)
        self._files[target] = self._files[source]

    def rename(self, source: str, target: str) -> None:
        self._call("rename", target)
        super().rename(source, target)
        self._files[target] = self._files.pop(source)

    def unlink(self, path: str) -> None:
        self._call("unlink", path)
        super().unlink(path)
        self._files.pop(path, None)

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path)
        super().mkdir(path)
        self._dirs.add(path)
        self._durable_names[path] = {}

    def rmdir(self, path: str) -> None:
        self._call("rmdir", path)
        super().rmdir(path)
        self._dirs.discard(path)
