"""Files as a benchmark needs them: out of the page cache, durable, measured, gone."""

from __future__ import annotations

import os
import pathlib
import shutil


def drop_caches(path: pathlib.Path) -> None:
    """Make the next read of a file, or of the files below a directory, come from the disk."""
    for file in files(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def sync_tree(path: pathlib.Path) -> None:
    """Make a file, or everything below a directory, durable, its name included: what its writer left out."""
    for each in (*([path] if path.is_file() else [*path.rglob("*"), path]), path.parent):
        sync_file(each)


def sync_file(path: pathlib.Path) -> None:
    """Make a file, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def size(path: pathlib.Path) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    return sum(file.stat().st_size for file in files(path))


def delete(path: pathlib.Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files(path: pathlib.Path) -> list[pathlib.Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
