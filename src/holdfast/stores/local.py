"""A directory as a store: every effect is fsynced, file and directory, before a call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, PermissionDenied, StoreError, Truncated
from holdfast.core.names import check_key
from holdfast.core.buffers import Buffer
from holdfast.stores.base import ObjectInfo
from holdfast.stores.disk import Disk, OsDisk

__all__ = ["LocalStore"]

TEMPORARY = ".tmp-"
WRITE_BYTES = 64 << 20

_KINDS: dict[int, type[StoreError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EROFS: PermissionDenied,
    errno.ENOSPC: OutOfSpace,
    errno.EDQUOT: OutOfSpace,
}
_REMEDIES: dict[type[StoreError], str] = {
    PermissionDenied: "check the rights of the directory and whether the disk is mounted read-only",
    OutOfSpace: "free some space (holdfast prune --dry-run shows what could go); what was committed before is intact",
}


@contextlib.contextmanager
def _translated(doing: str, path: str) -> Iterator[None]:
    """Turn an OSError of the operating system into our tree, once, here."""
    try:
        yield
    except StoreError:
        raise
    except OSError as e:
        kind = _KINDS.get(e.errno or 0, StoreError)
        remedy = f"; {_REMEDIES[kind]}" if kind in _REMEDIES else ""
        raise kind(e.errno, f"could not {doing} {path}: {os.strerror(e.errno or 0)}{remedy}") from e


class LocalStore:
    """A store in a directory of a file system with hard links (any local one, and NFS).

    Source of the protocol: Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014). A failed fsync is never
    tried again on the same file (Rebello et al., USENIX ATC 2020): the write fails and its file is abandoned.
    """

    appendable = True

    def __init__(self, root: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.root = os.path.abspath(os.fspath(root))
        self.url = Path(self.root).as_uri()
        self.disk: Disk = disk if disk is not None else OsDisk()
        self._made: set[str] = set()

    def __repr__(self) -> str:
        return f"LocalStore({self.root!r})"

    def path(self, key: str) -> str:
        """Return where an object lies in the file system."""
        return os.path.join(self.root, *check_key(key).split("/"))

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        path = self.path(key)
        with _translated("write", path):
            self._make_parent(path)
            self._write_file(path, data)
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def create(self, key: str, data: Buffer) -> None:
        path = self.path(key)
        with _translated("create", path):
            self._make_parent(path)
            temporary = self._temporary(path)
            self._write_file(temporary, [data])
            try:
                self.disk.link(temporary, path)  # durability: the commit; fails when the name is taken
            finally:
                self._discard(temporary)
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def replace(self, key: str, data: Buffer) -> None:
        path = self.path(key)
        with _translated("replace", path):
            self._make_parent(path)
            temporary = self._temporary(path)
            self._write_file(temporary, [data])
            try:
                self.disk.rename(temporary, path)  # durability: the switch
            except OSError:
                self._discard(temporary)
                raise
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def append(self, key: str, data: Buffer) -> None:
        path = self.path(key)
        with _translated("append to", path):
            self._make_parent(path)
            fd = self.disk.open_append(path)
            try:
                self._write_all(fd, data)
                self.disk.fsync(fd)  # durability: the bytes
            finally:
                self.disk.close(fd)
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is None:
            end = self.info(key).size
        target = bytearray(max(0, end - start))
        self.read_into(key, start, memoryview(target))
        return bytes(target)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        path = self.path(key)
        with _translated("read", path):
            fd = self.disk.open_read(path)
            try:
                done = 0
                while done < len(target):
                    got = self.disk.pread_into(fd, target[done:], start + done)
                    if got == 0:
                        raise Truncated(f"{key}: ends after {start + done} bytes; expected {start + len(target)}")
                    done += got
            finally:
                self.disk.close(fd)

    def info(self, key: str) -> ObjectInfo:
        path = self.path(key)
        with _translated("look at", path):
            found = self.disk.stat(path)
        return ObjectInfo(key, found.st_size, found.st_mtime)

    def list(self, prefix: str) -> list[ObjectInfo]:
        start = self.path(prefix) if prefix else self.root
        out: list[ObjectInfo] = []
        with _translated("list", start):
            for path in self.disk.walk(start):
                if os.path.basename(path).startswith(TEMPORARY):
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted while we walked
                    found = self.disk.stat(path)
                    key = os.path.relpath(path, self.root).replace(os.sep, "/")
                    out.append(ObjectInfo(key, found.st_size, found.st_mtime))
        return sorted(out, key=lambda o: o.key)

    def delete(self, keys: Sequence[str]) -> None:
        parents: set[str] = set()
        for key in keys:
            path = self.path(key)
            with _translated("delete", path), contextlib.suppress(FileNotFoundError):
                self.disk.unlink(path)
                parents.add(os.path.dirname(path))
        for parent in sorted(parents, reverse=True):
            with _translated("delete in", parent):
                if not self._remove_empty(parent):
                    self.disk.fsync_dir(parent)  # durability: the names are gone

    def _make_parent(self, path: str) -> None:
        parent = os.path.dirname(path)
        if parent in self._made and os.path.isdir(parent):
            return
        missing: list[str] = []
        while not os.path.isdir(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):  # a rival made it
                self.disk.mkdir(directory)
            self.disk.fsync_dir(os.path.dirname(directory))  # durability: the directory's name
        self._made.add(os.path.dirname(path))

    def _temporary(self, path: str) -> str:
        return os.path.join(os.path.dirname(path), f"{TEMPORARY}{secrets.token_hex(6)}")

    def _write_file(self, path: str, data: Sequence[Buffer]) -> None:
        fd = self.disk.open_new(path)
        try:
            try:
                for buffer in data:
                    self._write_all(fd, buffer)
                self.disk.fsync(fd)  # durability: the bytes, before any name that counts
            finally:
                self.disk.close(fd)
        except OSError:
            self._discard(path)
            raise

    def _write_all(self, fd: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            view = view[self.disk.write(fd, view[:WRITE_BYTES]) :]

    def _discard(self, path: str) -> None:
        with contextlib.suppress(OSError):  # left-overs are reclaimed by the next owner of the run
            self.disk.unlink(path)

    def _remove_empty(self, directory: str) -> bool:
        if directory == self.root:
            return False
        try:
            self.disk.rmdir(directory)
        except OSError:
            return False
        self.disk.fsync_dir(os.path.dirname(directory))  # durability: the directory is gone
        return True
