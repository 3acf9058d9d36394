"""The model of a power cut separates protocols that are right from those that only look so."""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Callable

import pytest

from holdfast.testing import PowerLossDisk, lay_out

DATA = bytes(range(1, 256)) * 40


def write(disk: PowerLossDisk, path: str, data: bytes, *, sync: bool) -> None:
    fd = disk.open_new(path)
    disk.write(fd, data[:5000])
    disk.write(fd, data[5000:])
    if sync:
        disk.fsync(fd)
    disk.close(fd)


def replaced(disk: PowerLossDisk, base: str, *, files: bool, directory: bool) -> None:
    """Replace a file by way of a temporary one, with the fsyncs that are told."""
    write(disk, f"{base}/tmp", DATA, sync=files)
    disk.rename(f"{base}/tmp", f"{base}/k")
    if directory:
        disk.fsync_dir(base)
    disk.mark("done")


@pytest.mark.parametrize(
    ("files", "directory", "expected"),
    [
        (True, True, {"old", "new"}),
        (True, False, {"old", "new", "lost"}),
        (False, True, {"old", "new", "half"}),
        (False, False, {"old", "new", "half", "lost"}),
    ],
)
def test_what_is_not_fsynced_may_be_lost(
    tmp_path: pathlib.Path, files: bool, directory: bool, expected: set[str]
) -> None:
    (tmp_path / "k").write_bytes(b"old")
    disk = PowerLossDisk(tmp_path)
    replaced(disk, str(tmp_path), files=files, directory=directory)
    found: Counter[str] = Counter()
    for moment in disk.moments():
        for image in moment.images(30):
            what = {b"old": "old", DATA: "new"}.get(image["k"], "half")
            found["lost" if "done" in moment.marks and what == "old" else what] += 1
    assert set(found) == expected


def test_few_choices_are_all_taken(tmp_path: pathlib.Path) -> None:
    disk = PowerLossDisk(tmp_path)
    for name in "abc":
        write(disk, str(tmp_path / name), b"x", sync=True)
    *_, end = disk.moments()
    images = [frozenset(image) for image in end.images()]
    assert len(images) == len(set(images)) == 8


def test_pages_come_alone_and_torn(tmp_path: pathlib.Path) -> None:
    disk = PowerLossDisk(tmp_path)
    write(disk, str(tmp_path / "k"), b"\1" * 40_960, sync=False)
    disk.fsync_dir(str(tmp_path))
    *_, end = disk.moments()
    sizes, holes, torn = set(), 0, 0
    for image in end.images(300):
        content = image["k"]
        sizes.add(len(content))
        holes += b"\0\1" in content
        torn += bool(content.rstrip(b"\0")) and len(content.rstrip(b"\0")) % 4096 != 0
    assert len(sizes) > 3
    assert holes
    assert torn


def test_a_directory_made_anew_is_another(tmp_path: pathlib.Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_bytes(b"o")
    disk = PowerLossDisk(tmp_path)
    directory = str(tmp_path / "d")
    disk.unlink(f"{directory}/old")
    disk.rmdir(directory)
    disk.mkdir(directory)
    write(disk, f"{directory}/new", b"n", sync=True)
    disk.fsync_dir(directory)
    *_, end = disk.moments()
    images = [frozenset(image) for image in end.images()]
    assert set(images) == {frozenset(), frozenset({"d/old"}), frozenset({"d/new"})}
    disk.fsync_dir(str(tmp_path))
    assert disk.left() == {"d/new": b"n"}


def test_appends_and_links(tmp_path: pathlib.Path) -> None:
    disk = PowerLossDisk(tmp_path)
    for data in (b"one", b"two"):
        fd = disk.open_append(str(tmp_path / "log"))
        disk.write(fd, data)
        disk.fsync(fd)
        disk.close(fd)
    disk.link(str(tmp_path / "log"), str(tmp_path / "also"))
    disk.fsync_dir(str(tmp_path))
    assert disk.left() == {"log": b"onetwo", "also": b"onetwo"}


def test_an_image_can_be_laid_out(tmp_path: pathlib.Path) -> None:
    lay_out({"a/b/c": b"1", "d": b""}, tmp_path)
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == {
        "a/b/c": b"1",
        "d": b"",
    }


def test_what_is_recorded_is_what_happens(tmp_path: pathlib.Path) -> None:
    """The image with everything in it is the directory as it is."""
    acts: list[Callable[[PowerLossDisk], None]] = [
        lambda d: write(d, str(tmp_path / "x"), DATA, sync=False),
        lambda d: d.mkdir(str(tmp_path / "sub")),
        lambda d: write(d, str(tmp_path / "sub" / "y"), DATA, sync=False),
        lambda d: d.rename(str(tmp_path / "sub" / "y"), str(tmp_path / "sub" / "z")),
        lambda d: d.unlink(str(tmp_path / "x")),
    ]
    disk = PowerLossDisk(tmp_path)
    for act in acts:
        act(disk)
        *_, end = disk.moments()
        *_, everything = list(end.images(0, every_up_to=0))
        real = {
            os.path.relpath(os.path.join(d, f), tmp_path): pathlib.Path(d, f).read_bytes()
            for d, _, fs in os.walk(tmp_path)
            for f in fs
        }
        assert everything == real
