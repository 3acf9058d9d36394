"""A disk that knows what a power cut may leave: what was fsynced, and any part of what was not.

The model is what POSIX promises, which is less than any one file system does: until a file is fsynced, each of its
pages may have reached the disk or not, and a page may be torn between two sectors; until a directory is fsynced, each
change of its names may have come through or not, in any order. An image that this model allows is a directory that a
run must survive. Source: Pillai et al. (ALICE, OSDI 2014); Mohan et al. (CrashMonkey, OSDI 2018).
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.core.buffers import Buffer
from holdfast.stores.disk import OsDisk
from holdfast.testing.plan import Crash
from holdfast.testing.serial import one_at_a_time

__all__ = ["Image", "Moment", "PowerLossDisk", "lay_out"]

Image = dict[str, bytes]  # relative path -> content
PAGE, SECTOR = 4096, 512


@dataclass(slots=True)
class _File:
    """A file: what is durable of it, and the pieces (position, bytes) that were written since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for position, data in self.pending:
            _put(self.durable, position, data)
        self.pending = []


@dataclass(slots=True)
class _Directory:
    """A directory: its durable names and what each stands for, and the changes (name, what or None) made since."""

    durable: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            _rename(self.durable, change)
        self.pending = []


@dataclass(frozen=True, slots=True)
class _Op:
    """A changing call: its name and path, the node it is about, and what it does to it."""

    call: str
    path: str
    node: int = 0
    position: int = 0
    data: bytes = b""
    names: tuple[tuple[str, int | None], ...] = ()
    directory: bool = False


def _put(content: bytearray, position: int, data: bytes) -> None:
    if len(content) < position:
        content += bytes(position - len(content))
    content[position : position + len(data)] = data


def _rename(names: dict[str, int], change: Mapping[str, int | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _pages(pending: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Cut what was written where pages end: each of the pieces reaches the disk by itself."""
    pieces: list[tuple[int, bytes]] = []
    for position, data in pending:
        done = 0
        while done < len(data):
            size = min(len(data) - done, PAGE - (position + done) % PAGE)
            pieces.append((position + done, data[done : done + size]))
            done += size
    return pieces


class _Nodes:
    """Every file and directory by number; 0 is the base."""

    def __init__(self) -> None:
        self.files: dict[int, _File] = {}
        self.directories: dict[int, _Directory] = {0: _Directory()}

    def play(self, op: _Op) -> None:
        """Let a call have its effect."""
        if op.call in ("fsync", "fsync_dir"):
            (self.files[op.node] if op.call == "fsync" else self.directories[op.node]).sync()
        elif op.call == "write":
            self.files[op.node].pending.append((op.position, op.data))
        else:
            for _, node in op.names:
                if node is not None and node not in self.files and node not in self.directories:
                    if op.directory:
                        self.directories[node] = _Directory()
                    else:
                        self.files[node] = _File()
            if op.names:
                self.directories[op.node].pending.append(dict(op.names))

    def image(self, choose: _Choice) -> Image:
        """Return one image that a power cut may leave now."""
        found: Image = {}
        waiting = [("", 0)]
        while waiting:
            prefix, number = waiting.pop()
            directory = self.directories[number]
            names = dict(directory.durable)
            for change in directory.pending:
                if choose.name():
                    _rename(names, change)
            for name, node in names.items():
                path = f"{prefix}{name}"
                if node in self.directories:
                    waiting.append((f"{path}/", node))
                elif path not in found:
                    found[path] = self._content(self.files[node], choose)
        return found

    @staticmethod
    def _content(file: _File, choose: _Choice) -> bytes:
        if not file.pending:
            return bytes(file.durable)
        content = bytearray(file.durable)
        end = max(position + len(data) for position, data in file.pending)
        for position, data in _pages(file.pending):
            if choose.page():
                _put(content, position, data[: choose.torn(len(data))])
        if len(content) < end and choose.grown():
            content += bytes(end - len(content))  # the new length came through, and the bytes did not
        return bytes(content)


class _Choice:
    """What of the things that may have reached the disk did: here, all of the one sort and all of the other."""

    def __init__(self, names: bool, pages: bool) -> None:
        self._names, self._pages = names, pages

    def name(self) -> bool:
        return self._names

    def page(self) -> bool:
        return self._pages

    def torn(self, size: int) -> int:
        return size

    def grown(self) -> bool:
        return False


class _Sampled(_Choice):
    """Each by chance."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._of_names, self._of_pages = source.choice((0.1, 0.5, 0.9)), source.choice((0.1, 0.5, 0.9))

    def name(self) -> bool:
        return self._source.random() < self._of_names

    def page(self) -> bool:
        return self._source.random() < self._of_pages

    def torn(self, size: int) -> int:
        if self._source.random() < 0.9:
            return size
        return self._source.randrange(size + 1) // SECTOR * SECTOR

    def grown(self) -> bool:
        return self._source.random() < 0.5


class _Listed(_Choice):
    """As a row of yes and no says, no beyond its end; how many were asked for is counted."""

    def __init__(self, row: tuple[bool, ...]) -> None:
        self._row = row
        self.asked = 0

    def name(self) -> bool:
        self.asked += 1
        return self.asked <= len(self._row) and self._row[self.asked - 1]

    page = name


def _every_image(nodes: _Nodes, limit: int) -> list[Image]:
    """Return every image that is legal now, none when they are more than `limit`. What is chosen first decides what
    there is to choose next, so rows grow as they are asked for more."""
    found: list[Image] = []
    rows: list[tuple[bool, ...]] = [()]
    while rows:
        row = rows.pop()
        choice = _Listed(row)
        found.append(nodes.image(choice))
        rows += [(*row, *[False] * (n - len(row)), True) for n in range(len(row), choice.asked)]
        if len(found) + len(rows) > limit:
            return []
    return found


@dataclass(frozen=True, slots=True)
class Moment:
    """A point between two calls at which the power may be cut: how many calls were made, and what was marked so far."""

    position: int
    marks: tuple[object, ...]
    last: str
    _nodes: _Nodes

    def images(self, samples: int = 20, *, seed: int = 0, every_up_to: int = 64) -> Iterator[Image]:
        """Yield images that a power cut at this moment may leave: all of them where there are no more than
        `every_up_to`, else the four extreme ones and `samples` by chance."""
        every = _every_image(self._nodes, every_up_to)
        if every:
            yield from every
            return
        for names, pages in itertools.product((False, True), repeat=2):
            yield self._nodes.image(_Choice(names, pages))
        source = random.Random(f"{seed} {self.position}")
        for _ in range(samples):
            yield self._nodes.image(_Sampled(source))


@one_at_a_time
class PowerLossDisk(OsDisk):
    """Real files below `base`, and a record of every changing call, from which the images of a power cut at any moment
    are made. `cut_at` ends the n-th changing call before it takes effect, and every one after it, with `Crash`."""

    def __init__(self, base: str | os.PathLike[str], cut_at: int | None = None) -> None:
        self.base = os.path.abspath(os.fspath(base))
        self.cut_at = cut_at
        self.calls: list[tuple[str, str]] = []
        self._ops: list[_Op] = []
        self._marks: list[tuple[int, object]] = []
        self._nodes_by_path: dict[str, int] = {self.base: 0}
        self._next = 0
        self._paths: dict[int, str] = {}  # descriptor -> path
        self._appends: set[int] = set()
        self._begin = _Nodes()  # what lies on the disk is durable
        for directory, below, files in os.walk(self.base):
            here = self._begin.directories[self._nodes_by_path[directory]]
            for name in (*below, *files):
                here.durable[name] = self._new(os.path.join(directory, name))
            for name in below:
                self._begin.directories[here.durable[name]] = _Directory()
            for name in files:
                content = bytearray(pathlib.Path(directory, name).read_bytes())
                self._begin.files[here.durable[name]] = _File(content)

    def _new(self, path: str) -> int:
        self._next += 1
        self._nodes_by_path[path] = self._next
        return self._next

    def _call(self, call: str, path: str) -> None:
        if self.cut_at is not None and len(self.calls) >= self.cut_at:
            raise Crash
        self.calls.append((call, path))

    def _named(self, call: str, path: str, *changes: tuple[str, int | None], directory: bool = False) -> None:
        """Record a change of names, all of one directory."""
        parent = self._nodes_by_path[os.path.dirname(path)]
        names = tuple((os.path.basename(name), node) for name, node in changes)
        self._ops.append(_Op(call, path, parent, names=names, directory=directory))

    # ---- what a power cut leaves ----------------------------------------------------------------------------------

    def mark(self, what: object) -> None:
        """Note that something was acknowledged now: it must be in every image from here on."""
        self._marks.append((len(self._ops), what))

    def moments(self) -> Iterator[Moment]:
        """Yield every moment: before the first call, and after each. Take the images of one before the next."""
        nodes = _copied(self._begin)
        for position in range(len(self._ops) + 1):
            last = "the beginning"
            if position:
                op = self._ops[position - 1]
                nodes.play(op)
                last = f"{op.call} {os.path.relpath(op.path, self.base)}"
            marks = tuple(what for at, what in self._marks if at <= position)
            yield Moment(position, marks, last, nodes)

    def left(self, names: str = "durable") -> Image:
        """Return each file that a power cut now would leave, by path below the base, with its fsynced bytes.

        `names` "durable" takes only fsynced names; "current" says that every name came through.
        """
        nodes = _copied(self._begin)
        for op in self._ops:
            nodes.play(op)
        return nodes.image(_Choice(names == "current", pages=False))

    # ---- the calls ------------------------------------------------------------------------------------------------

    def open_new(self, path: str) -> int:
        self._call("open_new", path)
        fd = super().open_new(path)
        self._paths[fd] = path
        self._named("open_new", path, (path, self._new(path)))
        return fd

    def open_append(self, path: str) -> int:
        self._call("open_append", path)
        fd = super().open_append(path)
        self._paths[fd] = path
        self._appends.add(fd)
        if path not in self._nodes_by_path:
            self._named("open_append", path, (path, self._new(path)))
        return fd

    def write(self, fd: int, data: Buffer) -> int:
        path = self._paths[fd]
        self._call("write", path)
        position = os.fstat(fd).st_size if fd in self._appends else os.lseek(fd, 0, os.SEEK_CUR)
        done = super().write(fd, data)
        written = bytes(memoryview(data).cast("B")[:done])
        self._ops.append(_Op("write", path, self._nodes_by_path[path], position, written))
        return done

    def fsync(self, fd: int) -> None:
        path = self._paths[fd]
        self._call("fsync", path)
        self._ops.append(_Op("fsync", path, self._nodes_by_path[path]))

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        self._appends.discard(fd)
        super().close(fd)

    def fsync_dir(self, path: str) -> None:
        self._call("fsync_dir", path)
        super().fsync_dir(path)
        if path in self._nodes_by_path:  # what lies above the base is there
            self._ops.append(_Op("fsync_dir", path, self._nodes_by_path[path]))

    def link(self, source: str, target: str) -> None:
        self._call("link", target)
        super().link(source, target)
        self._nodes_by_path[target] = self._nodes_by_path[source]
        self._named("link", target, (target, self._nodes_by_path[target]))

    def rename(self, source: str, target: str) -> None:
        self._call("rename", target)
        super().rename(source, target)
        self._nodes_by_path[target] = self._nodes_by_path.pop(source)
        self._named("rename", target, (source, None), (target, self._nodes_by_path[target]))

    def unlink(self, path: str) -> None:
        self._call("unlink", path)
        super().unlink(path)
        self._nodes_by_path.pop(path, None)
        self._named("unlink", path, (path, None))

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path)
        super().mkdir(path)
        self._named("mkdir", path, (path, self._new(path)), directory=True)

    def rmdir(self, path: str) -> None:
        self._call("rmdir", path)
        super().rmdir(path)
        self._nodes_by_path.pop(path, None)
        self._named("rmdir", path, (path, None))


def _copied(nodes: _Nodes) -> _Nodes:
    copy = _Nodes()
    copy.files = {n: _File(bytearray(f.durable), list(f.pending)) for n, f in nodes.files.items()}
    copy.directories = {n: _Directory(dict(d.durable), list(d.pending)) for n, d in nodes.directories.items()}
    return copy


def lay_out(image: Image, root: str | os.PathLike[str]) -> None:
    """Write an image into a directory, as the machine finds it when the power is back."""
    for path, content in image.items():
        target = pathlib.Path(root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
