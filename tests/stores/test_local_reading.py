"""Reading past the page cache: the bytes are the same, wherever they begin and end and whatever the disk refuses."""

from __future__ import annotations

import errno
import mmap
import os
import pathlib
import random

import pytest

from holdfast.core.errors import StoreError, Truncated
from holdfast.stores import LocalStore, OsDisk

PAGE, MIB = 4096, 1 << 20
SIZE = 3 * MIB + 1234
CONTENT = random.Random(5).randbytes(SIZE)


class Counting(OsDisk):
    """Counts the bytes that were read with O_DIRECT on. Nothing is in its page cache."""

    def __init__(self) -> None:
        self.direct_bytes = 0
        self.direct_tries = 0
        self.direct: set[int] = set()

    def set_direct(self, fd: int, *, on: bool) -> bool:
        done = super().set_direct(fd, on=on)
        (self.direct.add if on and done else self.direct.discard)(fd)
        return done

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        self.direct_tries += fd in self.direct
        done = super().pread_into(fd, target, offset)
        self.direct_bytes += done * (fd in self.direct)
        return done

    def is_cached(self, fd: int, offset: int, size: int) -> bool:
        return False


class Short(Counting):
    """Gives a whole number of pages, but fewer than were asked for."""

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return super().pread_into(fd, target[: max(PAGE, len(target) // 3 // PAGE * PAGE)], offset)


class Odd(Counting):
    """Gives an odd number of bytes past the page cache; the next direct read would be refused."""

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        got = super().pread_into(fd, target, offset)
        return got - 1000 if fd in self.direct and got > 1000 else got


class Refusing(Counting):
    """Lets the flag be set and then refuses to read that way, as some file systems do."""

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        if fd in self.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().pread_into(fd, target, offset)


class Without(Counting):
    """Has no such thing, as tmpfs."""

    def set_direct(self, fd: int, *, on: bool) -> bool:
        return False


def memory(size: int, offset: int = 0) -> memoryview:
    """Writable memory that begins `offset` bytes behind a page."""
    return memoryview(mmap.mmap(-1, size + offset + PAGE))[offset : offset + size]


SPANS = {
    "whole": (0, SIZE, 0),
    "whole pages": (PAGE, 2 * MIB, 0),
    "up to an odd end": (2 * PAGE, MIB + 77, 0),
    "up to the end of the file": (MIB, SIZE - MIB, 0),
    "odd memory": (0, 2 * MIB, 8),
    "odd position": (100, 2 * MIB, 100),
    "small": (PAGE, 5000, 0),
    "nothing": (PAGE, 0, 0),
}


def written(root: pathlib.Path, disk: OsDisk) -> LocalStore:
    (root / "d").mkdir()
    (root / "d" / "k").write_bytes(CONTENT)
    return LocalStore(root, disk)


@pytest.mark.parametrize("disk", [Counting, Short, Odd, Refusing, Without, OsDisk])
@pytest.mark.parametrize("span", SPANS)
def test_every_byte_is_read(tmp_path: pathlib.Path, span: str, disk: type[OsDisk]) -> None:
    start, size, offset = SPANS[span]
    target = memory(size, offset)
    written(tmp_path, disk()).read_into("d/k", start, target)
    assert target == CONTENT[start : start + size]


def require_direct(directory: pathlib.Path) -> None:
    disk = OsDisk()
    fd = disk.open_new(str(directory / ".probe"))
    works = disk.set_direct(fd, on=True)
    disk.close(fd)
    if not works:
        pytest.skip("this file system has no O_DIRECT")


def test_whole_pages_do_go_past_the_cache_and_nothing_else_does(tmp_path: pathlib.Path) -> None:
    require_direct(tmp_path)
    disk = Counting()
    store = written(tmp_path, disk)
    for span, expected in {
        "whole": SIZE // PAGE * PAGE,
        "whole pages": 2 * MIB,
        "up to an odd end": MIB,
        "odd memory": 0,
        "odd position": 0,
        "small": 0,
    }.items():
        start, size, offset = SPANS[span]
        disk.direct_bytes = disk.direct_tries = 0
        store.read_into("d/k", start, memory(size, offset))
        assert (disk.direct_bytes, disk.direct_tries) == (expected, expected > 0), span
        assert not disk.direct


def test_what_the_page_cache_holds_comes_from_there(tmp_path: pathlib.Path) -> None:
    class Remembering(Counting):
        def is_cached(self, fd: int, offset: int, size: int) -> bool:
            return OsDisk.is_cached(self, fd, offset, size)

    disk = Remembering()
    store = written(tmp_path, disk)  # written through the page cache a moment ago
    store.read_into("d/k", 0, memory(SIZE))
    assert disk.direct_bytes == 0
    fd = disk.open_read(str(tmp_path / "d" / "k"))
    assert disk.is_cached(fd, 0, 2 * MIB)
    assert not disk.is_cached(fd, 0, 40 * MIB)  # far behind the end nothing is
    disk.close(fd)


@pytest.mark.parametrize("disk", [Counting, Short, Refusing, Without])
def test_a_file_that_ends_too_early_is_named(tmp_path: pathlib.Path, disk: type[OsDisk]) -> None:
    store = written(tmp_path, disk())
    with pytest.raises(Truncated, match=f"d/k: ends after {SIZE} bytes; expected {SIZE + 10}"):
        store.read_into("d/k", 0, memory(SIZE + 10))
    with pytest.raises(Truncated, match=f"ends after {SIZE} bytes"):
        store.read_into("d/k", 0, memory(SIZE + 2 * MIB))


def test_a_disk_that_cannot_read_is_not_taken_for_one_that_cannot_do_it_directly(
    tmp_path: pathlib.Path,
) -> None:
    class Bad(Counting):
        def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
            if fd in self.direct:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().pread_into(fd, target, offset)

    require_direct(tmp_path)
    disk = Bad()
    with pytest.raises(StoreError, match="Input/output error"):
        written(tmp_path, disk).read_into("d/k", 0, memory(SIZE))
    assert not disk.direct
