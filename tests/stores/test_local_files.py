"""A LocalStore among other people's files, and as one of several processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from holdfast.core.errors import (
    AlreadyExists,
    InvalidFormat,
    NotFound,
    PermissionDenied,
    StoreError,
    Truncated,
)
from holdfast.stores import LocalStore, MemoryStore, OsDisk, open_store

FOREIGN = [".DS_Store", ".nfs000000012", "model (copy).bin", "notes~", ".tmp-0123456789ab", "ü.json", "a\nb"]


def test_files_that_no_store_would_write_are_neither_listed_nor_touched(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    store.create("data/k", b"x")
    for name in FOREIGN:
        (tmp_path / "data" / name).write_bytes(b"mine")
    (tmp_path / "data" / "my files").mkdir()
    (tmp_path / "data" / "my files" / "k").write_bytes(b"mine")
    assert [o.key for o in store.list("")] == [o.key for o in store.list("data")] == ["data/k"]
    store.delete([o.key for o in store.list("data")])
    assert {name for name in FOREIGN if (tmp_path / "data" / name).read_bytes() == b"mine"} == set(FOREIGN)


def test_links_are_followed_when_reading_but_never_listed_or_walked(tmp_path: pathlib.Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s")
    store = LocalStore(tmp_path / "run")
    store.create("data/k", b"x")
    (tmp_path / "run/data/link").symlink_to(outside / "secret")
    (tmp_path / "run/data/dir").symlink_to(outside)
    (tmp_path / "run/data/loop").symlink_to(tmp_path / "run")
    assert [o.key for o in store.list("")] == ["data/k"]
    store.delete(["data/link"])
    assert (outside / "secret").read_bytes() == b"s"
    assert not (tmp_path / "run/data/link").is_symlink()


def test_what_is_no_file_is_no_object(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    assert store.list("") == []
    for key in ("pipe", "dir"):
        with pytest.raises(NotFound):
            store.info(key)
        with pytest.raises(NotFound):
            store.read(key)  # must not wait for a writer


def test_old_half_made_files_are_swept_and_nothing_else(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    store.create("data/k", b"x")
    for name in (".tmp-old", ".tmp-new", ".DS_Store", "notes (2)"):
        (tmp_path / "data" / name).write_bytes(b"half")
        os.utime(tmp_path / "data" / name, (1000, 2_000_000_000 if name == ".tmp-new" else 1000))
    store.sweep(1_500_000_000)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        ".DS_Store",
        ".tmp-new",
        "k",
        "notes (2)",
    ]


class Meanwhile(OsDisk):
    """Lets something happen between the opening of a file and its reading."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def open_read(self, path: str) -> int:
        fd = super().open_read(path)
        self.act()
        return fd

    def stat(self, path: str | int) -> os.stat_result:
        found = super().stat(path)
        self.act()
        return found


def test_directories_that_are_not_of_the_store_hinder_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)  # a volume of its own, as a cluster mounts them
    store.create("a/k", b"1")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".snapshot" / "hourly.0").mkdir(parents=True)
    old = tmp_path / ".snapshot" / "hourly.0" / ".tmp-0123456789ab"
    old.write_bytes(b"")
    scan = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    store.sweep(time.time() + 1000)
    assert [o.key for o in store.list("")] == store.names("") == ["a/k"]
    assert old.exists()
    with pytest.raises(PermissionDenied):  # what was asked for is not passed over
        store.list("lost+found")


@pytest.mark.parametrize("size", [3, 300])
def test_an_object_that_is_replaced_while_it_is_read_is_the_old_or_the_new(
    tmp_path: pathlib.Path, size: int
) -> None:
    old, new = b"o" * 30, b"n" * size
    LocalStore(tmp_path).create("k", old)
    reader = LocalStore(tmp_path, Meanwhile(lambda: LocalStore(tmp_path).replace("k", new)))
    assert reader.read("k") in (old, new)


def test_a_file_that_no_document_is_as_large_as_is_not_read_into_memory(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    with open(tmp_path / "run.json", "wb") as f:
        f.truncate(1 << 43)  # sparse: it takes no room on the disk
    with pytest.raises(InvalidFormat, match=r"run\.json: has 8796093022208 bytes"):
        store.read("run.json")
    with pytest.raises(Truncated):
        store.read("run.json", 0, 1 << 44)
    assert store.read("run.json", 1 << 42, (1 << 42) + 5) == bytes(5)


def test_a_file_where_a_directory_should_be_is_an_error_not_a_loop(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a", b"x")
    for act in (store.create, store.replace, store.append, lambda k, d: store.write(k, [d])):
        with pytest.raises(StoreError, match="Not a directory") as refused:
            act("a/b", b"x")
        assert not isinstance(refused.value, NotFound)  # which is said of what is read, and passed over there
    store.delete(["a/b"])
    assert store.read("a") == b"x"


def test_two_stores_of_one_directory_see_each_other(tmp_path: pathlib.Path) -> None:
    one, other = LocalStore(tmp_path / "run"), open_store(f"file://{tmp_path}/run")
    one.create("a/k", b"1")
    assert other.read("a/k") == b"1"
    other.delete(["a/k"])
    one.create("a/k", b"2")
    assert other.read("a/k") == b"2"


def test_urls_name_stores(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "with space & ünï%20"
    store = open_store(odd)
    store.create("k", b"x")
    assert open_store(store.url).read("k") == b"x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/rel").url == open_store("rel").url == (tmp_path / "rel").as_uri()
    assert open_store("memory://a/b") is open_store("memory://a/b")
    assert open_store("memory://a/b") is not open_store("memory://a/c")
    assert open_store(store) is store
    assert isinstance(open_store("memory://x"), MemoryStore)
    for url in ("s4://bucket/x", "http://host/x", "://x"):
        with pytest.raises(StoreError, match="no store for"):
            open_store(url)
    for url in ("file://runs/a", f"file://{tmp_path}/a#1", f"file://{tmp_path}/a?1"):
        with pytest.raises(StoreError, match="names no directory"):
            open_store(url)
    with pytest.raises(StoreError, match="an empty name"):
        open_store("")


def create_when_told(root: pathlib.Path, number: int, turns: int, gate: Connection) -> None:
    store = LocalStore(root)
    outcomes = []
    gate.send("ready")
    gate.recv()
    for turn in range(turns):
        try:
            store.create(f"race/{turn}/k", b"%d" % number * 50)
            outcomes.append("won")
        except AlreadyExists:
            outcomes.append("lost")
    gate.send(outcomes)


def test_of_eight_processes_exactly_one_creates(tmp_path: pathlib.Path) -> None:
    turns, context = 12, multiprocessing.get_context("fork")
    gates, processes = [], []
    for number in range(8):
        mine, theirs = context.Pipe()
        process = context.Process(target=create_when_told, args=(tmp_path, number, turns, theirs))
        process.start()
        gates.append(mine)
        processes.append(process)
    for gate in gates:
        assert gate.recv() == "ready"
    for gate in gates:
        gate.send("go")
    outcomes = [gate.recv() for gate in gates]
    for process in processes:
        process.join()
    store = LocalStore(tmp_path)
    for turn in range(turns):
        winners = [number for number in range(8) if outcomes[number][turn] == "won"]
        assert len(winners) == 1
        assert store.read(f"race/{turn}/k") == b"%d" % winners[0] * 50
    assert len(store.list("")) == turns
