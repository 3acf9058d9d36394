"""Writing past the page cache: the bytes are the same, wherever buffers begin and end and whatever the disk refuses."""

from __future__ import annotations

import errno
import mmap
import os
import pathlib
import random

import pytest

from holdfast.core.buffers import Buffer
from holdfast.core.errors import OutOfSpace
from holdfast.stores import LocalStore, OsDisk, Stream

PAGE, MIB = 4096, 1 << 20


def aligned(size: int, offset: int = 0) -> memoryview:
    """Writable memory that begins `offset` bytes behind a page, filled with a pattern that never repeats in step."""
    view = memoryview(mmap.mmap(-1, size + offset + PAGE))[offset : offset + size]
    view[:] = random.Random(size * 7919 + offset).randbytes(size)
    return view


SHAPES: dict[str, list[Buffer]] = {
    "a header and a tail": [b"h" * PAGE, aligned(3 * MIB + 123)],
    "an odd beginning": [b"h" * 100, aligned(2 * MIB)],
    "an odd beginning that memory makes good": [b"h" * 100, aligned(2 * MIB + 5, offset=100)],
    "odd memory": [b"h" * PAGE, aligned(2 * MIB, offset=8)],
    "many": [aligned(MIB), aligned(10), aligned(MIB + PAGE), b"", aligned(2 * MIB + 1), aligned(PAGE)],
    "more than one chunk": [aligned(33 * MIB + 7)],
    "read-only": [bytes(2 * MIB), memoryview(bytes(MIB)).toreadonly()],
    "wide elements": [aligned(2 * MIB).cast("d")],
    "small": [bytes(PAGE), aligned(MIB - 1)],
    "nothing": [b"", aligned(0)],
}


class Counting(OsDisk):
    """Counts the bytes that were written with O_DIRECT on."""

    def __init__(self) -> None:
        self.direct_bytes = 0
        self.direct: set[int] = set()

    def set_direct(self, fd: int, *, on: bool) -> bool:
        done = super().set_direct(fd, on=on)
        (self.direct.add if on and done else self.direct.discard)(fd)
        return done

    def write(self, fd: int, data: Buffer) -> int:
        done = super().write(fd, data)
        self.direct_bytes += done * (fd in self.direct)
        return done


class Halting(Counting):
    """Takes an odd part of each write, as a disk that fills up or a signal does."""

    def write(self, fd: int, data: Buffer) -> int:
        view = memoryview(data)
        if fd in self.direct:
            return super().write(fd, view[: max(PAGE, len(view) // 3 // PAGE * PAGE)])
        return super().write(fd, view[: max(1, len(view) * 2 // 3)])


class Refusing(Counting):
    """Lets the flag be set and then refuses to write that way, as some file systems do."""

    def write(self, fd: int, data: Buffer) -> int:
        if fd in self.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().write(fd, data)


class Without(Counting):
    """Has no such thing, as tmpfs."""

    def set_direct(self, fd: int, *, on: bool) -> bool:
        return False


@pytest.mark.parametrize("disk", [Counting, Halting, Refusing, Without])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_holds_every_byte(tmp_path: pathlib.Path, shape: str, disk: type[Counting]) -> None:
    store = LocalStore(tmp_path, disk())
    store.write("d/k", SHAPES[shape])
    assert store.read("d/k") == b"".join(SHAPES[shape])


@pytest.mark.parametrize("disk", [Counting, Halting, Refusing, Without])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_that_comes_last_changes_no_byte_behind_it(
    tmp_path: pathlib.Path, shape: str, disk: type[Counting]
) -> None:
    """Heads of whole blocks, as data files have them, and others; small ones and such as go past the cache themselves."""
    store = LocalStore(tmp_path, disk())
    for size in (1, PAGE, PAGE + 1, 2 * MIB):
        head = random.Random(size).randbytes(size)
        store.write_streams([Stream(f"d/{size}", size, SHAPES[shape], lambda h=head: h)])
        assert store.read(f"d/{size}") == head + b"".join(SHAPES[shape])


def require_direct(directory: pathlib.Path) -> None:
    disk = OsDisk()
    fd = disk.open_new(str(directory / ".probe"))
    works = disk.set_direct(fd, on=True)
    disk.close(fd)
    if not works:
        pytest.skip("this file system has no O_DIRECT")


def test_large_aligned_stretches_do_go_past_the_cache(tmp_path: pathlib.Path) -> None:
    require_direct(tmp_path)
    for shape, expected in {
        "a header and a tail": 3 * MIB,
        "odd memory": 2 * MIB,
        "read-only": 3 * MIB,
        "an odd beginning": 2 * MIB - PAGE,
        "many": 4 * MIB - PAGE,
        "more than one chunk": 33 * MIB,
        "small": 0,
    }.items():
        disk = Counting()
        LocalStore(tmp_path / shape, disk).write("k", SHAPES[shape])
        assert disk.direct_bytes == expected
        assert not disk.direct or expected


def test_a_full_disk_is_a_full_disk_past_the_cache_too(tmp_path: pathlib.Path) -> None:
    class Full(Counting):
        def write(self, fd: int, data: Buffer) -> int:
            if fd in self.direct:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(fd, data)

    store = LocalStore(tmp_path, Full())
    require_direct(tmp_path)
    with pytest.raises(OutOfSpace):
        store.write("k", SHAPES["a header and a tail"])
    assert store.list("") == []
