"""A directory as a store: every effect is fsynced, file and directory, before a call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.buffers import Buffer
from holdfast.core.errors import (
    AlreadyExists,
    InvalidFormat,
    NotFound,
    OutOfSpace,
    PermissionDenied,
    StoreError,
    Truncated,
)
from holdfast.core.names import check_key, is_key
from holdfast.stores.base import LOOKING, MAX_WHOLE_BYTES, ObjectInfo, Stream
from holdfast.stores.direct import FileWriter
from holdfast.stores.disk import Disk, OsDisk
from holdfast.stores.reading import read_buffer

__all__ = ["LocalStore"]

TEMPORARY = ".tmp-"
WRITE_BYTES = 64 << 20
OPEN_FILES = 64  # of one call; more are finished in turns
ATTEMPTS = 100  # at a directory that rivals keep removing when they empty it

_KINDS: dict[int, type[StoreError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EISDIR: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EROFS: PermissionDenied,
    errno.ENOSPC: OutOfSpace,
    errno.EDQUOT: OutOfSpace,
}
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_HOW_TO_DO_WITHOUT_LINKS = (
    "the file system there has no hard links, which every commit needs (exFAT, a bucket that is mounted); give a "
    "directory on another one, or the URL of the bucket"
)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_REMEDIES: dict[type[StoreError], str] = {
    PermissionDenied: "check the rights of the directory and whether the disk is mounted read-only",
    OutOfSpace: "free some space (holdfast prune --dry-run shows what could go); what was committed before is intact",
}


@dataclass(frozen=True, slots=True)
class _Begun:
    """A file whose body was written, under a name of its own if it goes `over` another."""

    path: str
    stream: Stream
    writer: FileWriter
    over: str = ""


@contextlib.contextmanager
def _translated(doing: str, path: str) -> Iterator[None]:
    """Turn an OSError of the operating system into our tree, once, here."""
    try:
        yield
    except StoreError:
        raise
    except OSError as e:
        kind = _KINDS.get(e.errno or 0, StoreError)
        if kind is NotFound and doing not in LOOKING:
            kind = StoreError
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

    def _own(self, key: str) -> str:
        """Return where an object is to be written, listed or deleted: never through a link out of the store.

        A link that a rival plants between this look and the act is not noticed: who may write here may as well write
        there. Reading follows links, for what is read must match a digest.
        """
        path = self.path(key)
        directory = os.path.dirname(path)
        while len(directory) > len(self.root):
            if os.path.islink(directory):
                raise PermissionDenied(
                    errno.ELOOP,
                    f"{directory} is a symbolic link, and nothing inside a run is written, listed or deleted through "
                    "one; link to the run as a whole instead",
                )
            directory = os.path.dirname(directory)
        return path

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self.write_streams([Stream(key, 0, data, bytes)])

    def write_streams(self, streams: Iterable[Stream]) -> None:
        begun: list[_Begun] = []
        paths: list[str] = []
        directories: dict[str, None] = {}
        try:
            for stream in streams:
                path = name = self._own(stream.key)
                directories[os.path.dirname(path)] = None
                if stream.over:
                    path = self._temporary(name)
                with _translated("write", path):
                    writer = FileWriter(self.disk, self._open(self.disk.open_new, path), stream.head_bytes)
                paths.append(path)
                begun.append(_Begun(path, stream, writer, name if stream.over else ""))
                for piece in stream.body:
                    with _translated("write", path):
                        writer.write(piece)
                if len(begun) == OPEN_FILES:
                    self._finish(begun)
            self._finish(begun)
            for directory in directories:
                with _translated("write in", directory):
                    self.disk.fsync_dir(directory)  # durability: the names
        except BaseException:
            self._give_up(begun, paths, directories)
            raise

    def _finish(self, begun: list[_Begun]) -> None:
        """Make files whole and durable: heads first, so that one commit of the file system's journal serves all."""
        for file in begun:
            head = file.stream.head()
            with _translated("write", file.path):
                file.writer.seek(0)
                file.writer.write(head)
        for file in begun:
            with _translated("write", file.path):
                self.disk.fsync(file.writer.fd)  # durability: the bytes, before any name that counts
        while begun:
            file = begun.pop()
            with _translated("write", file.path):
                self.disk.close(file.writer.fd)
                if file.over:
                    self.disk.rename(file.path, file.over)  # durability: the switch, of a file that is whole

    def _give_up(self, begun: list[_Begun], paths: list[str], directories: Iterable[str]) -> None:
        for file in begun:
            with contextlib.suppress(OSError):
                self.disk.close(file.writer.fd)
        for path in paths:
            self._discard(path)
        for directory in directories:
            self._remove_empty(directory)  # it was made for these objects and those beside them

    def create(self, key: str, data: Buffer) -> None:
        path = self._own(key)
        with _translated("create", path):
            temporary = self._temporary(path)
            self._write_file(temporary, data)
            try:
                self.disk.link(temporary, path)  # durability: the commit; fails when the name is taken
            except FileExistsError:
                if not self._is_linked(temporary, path):
                    raise
            except OSError as e:
                if e.errno in _NO_LINKS:  # of a file that was made here just now
                    raise StoreError(e.errno, f"could not create {path}: {_HOW_TO_DO_WITHOUT_LINKS}") from e
                raise
            finally:
                self._discard(temporary)
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def replace(self, key: str, data: Buffer) -> None:
        path = self._own(key)
        with _translated("replace", path):
            temporary = self._temporary(path)
            self._write_file(temporary, data)
            try:
                self.disk.rename(temporary, path)  # durability: the switch
            except OSError:
                self._discard(temporary)
                raise
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def append(self, key: str, data: Buffer) -> None:
        path = self._own(key)
        with _translated("append to", path):
            fd = self._open(self.disk.open_append, path)
            try:
                self._write_all(fd, data)
                self.disk.fsync(fd)  # durability: the bytes
            finally:
                self.disk.close(fd)
            self.disk.fsync_dir(os.path.dirname(path))  # durability: the name

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with self._opened(key) as (fd, size):
            if end is None:
                end = size
                if end > MAX_WHOLE_BYTES:
                    raise InvalidFormat(f"{key}: has {size} bytes, which no document of a run has")
            if end > size:
                raise Truncated(f"{key}: ends after {size} bytes; expected {end}")
            target = bytearray(max(0, end - start))
            self._fill(fd, key, start, memoryview(target))
        return bytes(target)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        with self._opened(key) as (fd, _):
            self._fill(fd, key, start, target)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        """Open an object to read, and give its size: of this very file: its name may be another's a moment later."""
        path = self.path(key)
        with _translated("read", path):
            fd = self.disk.open_read(path)
            try:
                found = self.disk.stat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise FileNotFoundError(errno.ENOENT, "not a file")
                yield fd, found.st_size
            finally:
                self.disk.close(fd)

    def _fill(self, fd: int, key: str, start: int, target: memoryview) -> None:
        done = read_buffer(self.disk, fd, start, target)
        if done < len(target):
            raise Truncated(f"{key}: ends after {start + done} bytes; expected {start + len(target)}")

    def info(self, key: str) -> ObjectInfo:
        path = self.path(key)
        with _translated("look at", path):
            found = self.disk.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a file")
        return ObjectInfo(key, found.st_size, found.st_mtime)

    def names(self, prefix: str, after: str = "") -> list[str]:
        with _translated("list", self._below(prefix)):
            return sorted(key for key, _ in self._walk(prefix) if key > after)

    def list(self, prefix: str) -> list[ObjectInfo]:
        out: list[ObjectInfo] = []
        with _translated("list", self._below(prefix)):
            for key, path in self._walk(prefix):
                with contextlib.suppress(FileNotFoundError):  # deleted while we walked
                    found = self.disk.stat(path)
                    out.append(ObjectInfo(key, found.st_size, found.st_mtime))
        return sorted(out, key=lambda o: o.key)

    def _below(self, prefix: str) -> str:
        return os.path.dirname(self._own(f"{prefix}/k")) if prefix else self.root

    def _walk(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield key and path of every object; what is no key was not written by us: .DS_Store, .nfs0001, "copy (2)"."""
        skipped = len(os.path.join(self.root, ""))
        for path in self.disk.walk(self._below(prefix)):
            key = path[skipped:].replace(os.sep, "/")
            if is_key(key):
                yield key, path

    def room(self) -> int | None:
        present = self.root
        while not os.path.isdir(present):
            present = os.path.dirname(present)
        with _translated("look at", present):
            return self.disk.room(present)

    def sweep(self, before: float) -> None:
        with _translated("tidy", self.root):
            for path in self.disk.walk(self.root):
                if os.path.basename(path).startswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # its writer lives, and has finished
                        if self.disk.stat(path).st_mtime < before:
                            self.disk.unlink(path)

    def delete(self, keys: Sequence[str]) -> None:
        parents: set[str] = set()
        for key in keys:
            path = self._own(key)
            with _translated("delete", path), contextlib.suppress(*_ABSENT):
                self.disk.unlink(path)
                parents.add(os.path.dirname(path))
        for parent in sorted(parents, reverse=True):
            with _translated("delete in", parent):
                self._fsync_names(self._remove_empty(parent))  # durability: the names are gone

    def _make_parent(self, path: str) -> None:
        """Make the directories above `path`, each with its name durable.

        One that is there already, from the root down, may be of someone who died before its name was durable.
        """
        directory = os.path.dirname(path)
        unsure: list[str] = []
        while not os.path.isdir(directory) or (directory not in self._made and self._is_ours(directory)):
            unsure.append(directory)
            directory = os.path.dirname(directory)
        for directory in reversed(unsure):
            found = os.path.isdir(directory)
            if not found:
                with contextlib.suppress(FileExistsError):  # a rival made it
                    self.disk.mkdir(directory)
            # What lies above a root that was given to us need not be readable.
            with contextlib.suppress(*[PermissionError] if found and directory == self.root else []):
                self.disk.fsync_dir(os.path.dirname(directory))  # durability: the directory's name
            self._made.add(directory)

    def _is_ours(self, directory: str) -> bool:
        return directory == self.root or directory.startswith(os.path.join(self.root, ""))

    def _open(self, opener: Callable[[str], int], path: str) -> int:
        """Open a file for writing in a directory that a rival may empty, and so remove, at any moment."""
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                self._make_parent(path)
                return opener(path)
        self._make_parent(path)
        return opener(path)

    def _temporary(self, path: str) -> str:
        return os.path.join(os.path.dirname(path), f"{TEMPORARY}{secrets.token_hex(6)}")

    def _write_file(self, path: str, data: Buffer) -> None:
        fd = self._open(self.disk.open_new, path)
        try:
            try:
                FileWriter(self.disk, fd).write(data)
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

    def _is_linked(self, temporary: str, path: str) -> bool:
        """Return whether a name is that of our own file: NFS sends a link again whose answer was lost, and finds it."""
        with contextlib.suppress(OSError):
            return os.path.samestat(self.disk.stat(temporary), self.disk.stat(path))
        return False

    def _discard(self, path: str) -> None:
        with contextlib.suppress(OSError):  # left-overs are reclaimed by the next owner of the run
            self.disk.unlink(path)

    def _remove_empty(self, directory: str) -> str:
        """Remove a directory that nothing is in; return the directory whose names changed last."""
        if directory == self.root:
            return directory
        try:
            self.disk.rmdir(directory)
        except OSError:
            return directory
        return os.path.dirname(directory)

    def _fsync_names(self, directory: str) -> None:
        while True:
            try:
                return self.disk.fsync_dir(directory)
            except FileNotFoundError:  # a rival removed it
                if directory == self.root:
                    raise
                directory = os.path.dirname(directory)
