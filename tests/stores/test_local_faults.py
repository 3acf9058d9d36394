"""Every call of a LocalStore may fail: old objects stay, errors are ours, and the next attempt works."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest

from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, OutOfSpace, PermissionDenied, StoreError, Truncated
from holdfast.stores import LocalStore, OsDisk, Stream
from holdfast.testing import FaultyDisk

Act = Callable[[LocalStore], None]
BEFORE = {"a/old": b"old" * 9, "a/other": b"other", "alone/old": b"o"}


def several(store: LocalStore) -> None:
    """Two objects in one write, their first bytes last."""
    store.write_streams([Stream(f"d/e/{n}", 2, [b"n", b"", b"ew"], lambda: b"a ") for n in "12"])


ACTS: dict[str, tuple[str, bytes | None, Act]] = {
    "create": ("a/new", b"new", lambda s: s.create("a/new", b"new")),
    "create deep": ("x/y/new", b"new", lambda s: s.create("x/y/new", b"new")),
    "replace": ("a/old", b"new", lambda s: s.replace("a/old", b"new")),
    "write": ("d/e/new", b"new", lambda s: s.write("d/e/new", [b"n", b"", b"ew"])),
    "write several": ("d/e/2", b"a new", several),
    "append": ("log/new", b"new", lambda s: s.append("log/new", b"new")),
    "delete": ("alone/old", None, lambda s: s.delete(["alone/old"])),
}
KINDS = {
    errno.EIO: StoreError, errno.ENOSPC: OutOfSpace, errno.EDQUOT: OutOfSpace, errno.EROFS: PermissionDenied,
    errno.EACCES: PermissionDenied, errno.ESTALE: StoreError,
}  # fmt: skip


def prepare(root: pathlib.Path) -> pathlib.Path:
    for key, data in BEFORE.items():
        LocalStore(root).create(key, data)
    return root


def content(root: pathlib.Path) -> dict[str, bytes]:
    store = LocalStore(root)
    return {o.key: store.read(o.key) for o in store.list("")}


def check_left(root: pathlib.Path, act: str) -> None:
    key, goal, _ = ACTS[act]
    found = content(root)
    touched = found.pop(key, None)
    if act == "write several":
        check_zeros(goal, found.pop("d/e/1", b""))
        check_zeros(goal, touched or b"")
        touched = None
    assert found == {k: v for k, v in BEFORE.items() if k != key}
    if act in ("write", "write several", "append"):
        assert touched is None or goal.startswith(touched), "a part, at a key that nobody else uses"
    else:
        assert touched in (BEFORE.get(key), goal)


def check_zeros(goal: bytes, found: bytes) -> None:
    """A file that an error left behind is whole, or has nothing or zeros where its head belongs."""
    assert found == goal or (found[:2] in (b"", b"\0", b"\0\0") and goal[2:].startswith(found[2:]))


@pytest.mark.parametrize("applied", [False, True], ids=["instead", "applied"])
@pytest.mark.parametrize("act", ACTS)
def test_a_fault_at_any_call_leaves_what_was_there(
    tmp_path_factory: pytest.TempPathFactory, act: str, applied: bool
) -> None:
    key, goal, run = ACTS[act]
    for n in range(1, 100):
        root = prepare(tmp_path_factory.mktemp("fault") / "run")
        disk = FaultyDisk(n, applied=applied)
        store = LocalStore(root, disk)
        failed = failure_of(run, store)
        if not disk.fired:
            assert failed is None
            break
        fault = disk.calls[n - 1]
        check_left(root, act)
        if failed is None:
            assert fault in ("unlink", "rmdir"), "only the removal of a temporary file may fail silently"
            assert content(root).get(key) == goal
        else:
            assert type(failed) is StoreError
            assert failed.errno == errno.EIO
            assert isinstance(failed.__cause__, OSError)
            assert str(root) in str(failed)
        left_over = [name for _, _, files in os.walk(root) for name in files if name.startswith(".tmp-")]
        assert not left_over or fault in ("unlink", "open")
        check_next_attempt(store, act)
    assert n > 2


def failure_of(run: Act, store: LocalStore) -> StoreError | None:
    try:
        run(store)
    except StoreError as e:
        return e
    return None


def check_next_attempt(store: LocalStore, act: str) -> None:
    """The fault is gone: the same act works, unless what was to be created is there already."""
    key, goal, run = ACTS[act]
    if act in ("write", "write several", "append"):  # a new attempt has keys of its own
        key, goal, run = "d/retry/new", b"again", lambda s: s.write("d/retry/new", [b"again"])
    there = key in {o.key for o in store.list("")}
    again = failure_of(run, store)
    assert again is None or (act.startswith("create") and there and isinstance(again, AlreadyExists))
    assert {o.key: store.read(o.key) for o in store.list("")}.get(key) == goal


@pytest.mark.parametrize("code", KINDS, ids=errno.errorcode.get)
def test_errors_of_the_operating_system_become_ours(tmp_path: pathlib.Path, code: int) -> None:
    root = prepare(tmp_path / "run")
    for act, (_, _, run) in ACTS.items():
        with pytest.raises(KINDS[code]) as raised:
            run(LocalStore(root, FaultyDisk(1, code, sticky=True)))
        assert raised.value.errno == code, act
        assert os.strerror(code) in str(raised.value)
        assert str(root) in str(raised.value)
        if KINDS[code] is not StoreError:
            assert "; " in str(raised.value), "says what to do"
        assert content(root) == BEFORE


@pytest.mark.parametrize("act", ["create", "create deep", "replace", "write", "write several"])
def test_a_disk_that_is_full_for_good_keeps_what_was_there(
    tmp_path_factory: pytest.TempPathFactory, act: str
) -> None:
    for n in range(1, 100):
        root = prepare(tmp_path_factory.mktemp("full") / "run")
        disk = FaultyDisk(n, errno.ENOSPC, sticky=True)
        failed = failure_of(ACTS[act][2], LocalStore(root, disk))
        if failed is None:
            break
        assert isinstance(failed, OutOfSpace)
        check_left(root, act)
    assert n > 2


class CloseFails(OsDisk):
    """Reports a full disk at close, as NFS does."""

    def close(self, fd: int) -> None:
        writable = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY)
        super().close(fd)
        if writable:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("act", ["create", "create deep", "replace", "write", "write several"])
def test_an_error_that_shows_at_close_is_an_error(tmp_path: pathlib.Path, act: str) -> None:
    root = prepare(tmp_path / "run")
    with pytest.raises(OutOfSpace):
        ACTS[act][2](LocalStore(root, CloseFails()))
    assert content(root) == BEFORE


class Slow(OsDisk):
    """Moves a few bytes at a time, as a signal or a full pipe to the server may make it."""

    def write(self, fd: int, data: Buffer) -> int:
        return super().write(fd, memoryview(data)[:3])

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return super().pread_into(fd, target[:2], offset)


def test_partial_writes_and_reads_are_carried_on(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path, Slow())
    store.write("w", [b"0123456789", b"abcdefgh"])
    store.create("c", b"0123456789")
    store.append("c", b"abc")
    assert store.read("w") == b"0123456789abcdefgh"
    assert store.read("c", 3, 11) == b"3456789a"
    with pytest.raises(Truncated, match="ends after 13 bytes; expected 20"):
        store.read("c", 5, 20)


def test_a_read_that_fails_is_not_a_short_read(tmp_path: pathlib.Path) -> None:
    class BadSector(OsDisk):
        def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    LocalStore(tmp_path).create("k", b"0123")
    with pytest.raises(StoreError) as raised:
        LocalStore(tmp_path, BadSector()).read("k")
    assert raised.value.errno == errno.EIO
    assert not isinstance(raised.value, Truncated)


def open_below(root: pathlib.Path) -> list[str]:
    """The files and directories there that this process has open, whatever else its threads open and close."""
    found: list[str] = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in found if name.startswith(str(root))]


@pytest.mark.parametrize("fails", ["body", "head", "stream"])
def test_what_the_giver_raises_leaves_no_file_and_no_descriptor(tmp_path: pathlib.Path, fails: str) -> None:
    """Not only errors of the disk: the bytes may never come, or the user may press Ctrl-C."""

    def give(what: str) -> bytes:
        if what == fails:
            raise KeyboardInterrupt
        return b"xy"

    def streams() -> Iterator[Stream]:
        yield Stream("d/1", 2, [b"1"], lambda: b"hh")
        yield Stream("d/2", 2, (give(what) for what in ("fine", "body")), lambda: give("head"))
        give("stream")

    root = prepare(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        LocalStore(root).write_streams(streams())
    assert content(root) == BEFORE
    assert not (root / "d").exists()
    assert not open_below(tmp_path)


def test_many_objects_in_one_write_do_not_keep_as_many_files_open(tmp_path: pathlib.Path) -> None:
    class Scarce(OsDisk):
        def __init__(self) -> None:
            self.open = 0

        def open_new(self, path: str) -> int:
            self.open += 1
            assert self.open <= 100
            return super().open_new(path)

        def close(self, fd: int) -> None:
            self.open -= 1
            super().close(fd)

    store = LocalStore(tmp_path, Scarce())
    store.write_streams([Stream(f"d/{n}", 1, [b"%d" % n], lambda: b"h") for n in range(300)])
    assert {o.key: store.read(o.key) for o in store.list("")} == {f"d/{n}": b"h%d" % n for n in range(300)}


def test_a_name_that_cannot_be_made_durable_does_not_stay(tmp_path: pathlib.Path) -> None:
    class NoNames(OsDisk):
        def fsync_dir(self, path: str) -> None:
            if path.endswith("d"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().fsync_dir(path)

    root = prepare(tmp_path / "run")
    with pytest.raises(StoreError):
        LocalStore(root, NoNames()).write_streams([Stream("d/1", 1, [b"x"], lambda: b"h")])
    assert content(root) == BEFORE


def test_when_a_later_file_fails_the_finished_ones_go_too(tmp_path: pathlib.Path) -> None:
    def streams() -> Iterator[Stream]:
        for n in range(150):
            yield Stream(f"d/{n}", 1, [b"x"], lambda: b"h")
        raise OSError(errno.EIO, "the bytes did not come")

    with pytest.raises(OSError, match="did not come") as raised:
        LocalStore(tmp_path).write_streams(streams())
    assert not isinstance(raised.value, StoreError), "no error of the store's"
    assert content(tmp_path) == {}


def test_a_link_that_is_sent_again_after_its_answer_was_lost_finds_itself(tmp_path: pathlib.Path) -> None:
    class Nfs(OsDisk):
        def link(self, source: str, target: str) -> None:
            os.link(source, target)
            os.link(source, target)

    store = LocalStore(tmp_path, Nfs())
    store.create("a/k", b"mine")
    with pytest.raises(AlreadyExists):
        store.create("a/k", b"another")
    assert store.read("a/k") == b"mine"
    assert os.listdir(tmp_path / "a") == ["k"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_told_apart_from_a_lack_of_rights(
    tmp_path: pathlib.Path, number: int
) -> None:
    class Bucket(OsDisk):
        def link(self, source: str, target: str) -> None:
            raise OSError(number, os.strerror(number))

    with pytest.raises(StoreError, match="no hard links") as refused:
        LocalStore(tmp_path, Bucket()).create("a/k", b"x")
    assert not isinstance(refused.value, PermissionDenied)
    assert refused.value.errno == number
    assert os.listdir(tmp_path / "a") == []
