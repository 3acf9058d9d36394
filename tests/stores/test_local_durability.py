"""What a LocalStore has promised is on the disk, and what it was about to do is there whole or not at all."""

from __future__ import annotations

import os
import pathlib
import random
from collections.abc import Callable

import pytest

from holdfast.core.errors import StoreError
from holdfast.stores import LocalStore, OsDisk, Stream
from holdfast.testing import Crash, PowerLossDisk

Act = Callable[[LocalStore], None]
OLD, NEW = b"old" * 50, b"new" * 70
ACTS: dict[str, Act] = {
    "create": lambda s: s.create("a/b/new", NEW),
    "create in a new directory": lambda s: s.create("x/y/z/new", NEW),
    "replace": lambda s: s.replace("a/b/old", NEW),
    "replace what is absent": lambda s: s.replace("t/new", NEW),
    "append": lambda s: s.append("a/b/old", NEW),
    "append to what is absent": lambda s: s.append("log/new", NEW),
    "write": lambda s: s.write("d/e/new", [NEW[:10], NEW[10:]]),
    "write several": lambda s: s.write_streams(
        [Stream(f"d/e/{n}", 4, [NEW[4:9], NEW[9:]], lambda: NEW[:4]) for n in "12"]
    ),
    "delete": lambda s: s.delete(["a/b/old", "a/b/other"]),
    "delete the last of a directory": lambda s: s.delete(["alone/old"]),
}
AFTER: dict[str, dict[str, bytes | None]] = {
    "create": {"a/b/new": NEW}, "create in a new directory": {"x/y/z/new": NEW}, "replace": {"a/b/old": NEW},
    "replace what is absent": {"t/new": NEW}, "append": {"a/b/old": OLD + NEW}, "append to what is absent": {"log/new": NEW},
    "write": {"d/e/new": NEW}, "write several": {"d/e/1": NEW, "d/e/2": NEW}, "delete": {"a/b/old": None, "a/b/other": None},
    "delete the last of a directory": {"alone/old": None},
}  # fmt: skip
BEFORE = {"a/b/old": OLD, "a/b/other": b"other", "alone/old": OLD, "untouched": b"u"}


def prepared(base: pathlib.Path) -> pathlib.Path:
    store = LocalStore(base / "run")
    for key, data in BEFORE.items():
        store.create(key, data)
    return base


@pytest.fixture
def base(tmp_path: pathlib.Path) -> pathlib.Path:
    return prepared(tmp_path)


def objects(left: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """What a store would find: temporary files are none of its objects."""
    return {
        os.path.relpath(p, "run"): data
        for p, data in left.items()
        if not os.path.basename(p).startswith(".tmp-")
    }


def after(act: str) -> dict[str, bytes]:
    return {key: data for key, data in (BEFORE | AFTER[act]).items() if data is not None}


@pytest.mark.parametrize("act", ACTS)
def test_what_returned_survives_a_power_cut(base: pathlib.Path, act: str) -> None:
    disk = PowerLossDisk(base)
    ACTS[act](LocalStore(base / "run", disk))
    assert objects(disk.left()) == after(act)
    assert not [path for path in disk.left() if ".tmp-" in path]


def test_a_fresh_run_survives_with_the_directories_above_it(tmp_path: pathlib.Path) -> None:
    disk = PowerLossDisk(tmp_path)
    store = LocalStore(tmp_path / "not" / "yet" / "run", disk)
    store.create("run.json", b"1")
    store.write("data/1/m", [b"2"])
    assert disk.left() == {"not/yet/run/run.json": b"1", "not/yet/run/data/1/m": b"2"}


def test_directories_that_someone_else_had_just_made_are_made_durable_too(tmp_path: pathlib.Path) -> None:
    disk = PowerLossDisk(tmp_path)
    disk.mkdir(str(tmp_path / "run"))  # made, and its maker died before any fsync
    disk.mkdir(str(tmp_path / "run" / "data"))
    LocalStore(tmp_path / "run", disk).write("data/m", [b"x"])
    assert disk.left() == {"run/data/m": b"x"}


def test_the_directory_above_a_given_root_need_not_be_readable(base: pathlib.Path) -> None:
    class Guarded(OsDisk):
        def fsync_dir(self, path: str) -> None:
            if path == str(base):
                raise PermissionError(13, "Permission denied")
            super().fsync_dir(path)

    LocalStore(base / "run", Guarded()).create("new/k", b"x")
    with pytest.raises(StoreError):
        LocalStore(base / "another", Guarded()).create("k", b"x")


def check_image(image: dict[str, bytes | None], act: str) -> None:
    for key, found in ({**dict.fromkeys(BEFORE), **image}).items():
        before, goal = BEFORE.get(key), AFTER[act].get(key)
        if key not in AFTER[act]:
            assert found == before, "an object that nobody touched"
        elif act.startswith("append"):
            assert (goal or b"").startswith(found or b"")
            assert (found or b"").startswith(before or b""), "what was acknowledged before"
        elif act == "write several":
            assert found in (None, goal) or found[:4] in (b"", bytes(4)), "never its head before its body"
        elif act != "write":
            assert found in (before, goal)
            assert found is not None or key not in image, "a name without its bytes"


@pytest.mark.parametrize("act", ACTS)
def test_a_power_cut_at_any_call_leaves_the_old_or_the_new(
    tmp_path_factory: pytest.TempPathFactory, act: str
) -> None:
    """Three images at each call: only fsynced names, all names with only fsynced bytes, and everything as it was."""
    for cut_at in range(100):
        base = prepared(tmp_path_factory.mktemp("cut"))
        disk = PowerLossDisk(base, cut_at)
        try:
            ACTS[act](LocalStore(base / "run", disk))
        except Crash:
            store = LocalStore(base / "run")
            check_image({o.key: store.read(o.key) for o in store.list("")}, act)
            check_image(objects(disk.left()), act)
            check_image(objects(disk.left("current")), act)
        else:
            break
    assert cut_at >= 3


def test_after_any_sequence_of_acts_everything_is_durable(tmp_path: pathlib.Path) -> None:
    disk = PowerLossDisk(tmp_path)
    store = LocalStore(tmp_path / "run", disk)
    source, expected = random.Random(7), dict[str, bytes]()
    for turn in range(120):
        key = source.choice(["a", "b/1", "b/2", "c/d/1", "c/d/2", "c/e/f/1"])
        data = b"%d" % turn
        if source.random() < 0.4:
            store.delete([key])
            expected.pop(key, None)
        elif key in expected:
            (store.replace if turn % 2 else store.append)(key, data)
            expected[key] = data if turn % 2 else expected[key] + data
        else:
            source.choice([store.create, store.replace, store.append, lambda k, d: store.write(k, [d])])(
                key, data
            )
            expected[key] = data
        assert objects(disk.left()) == expected


class FsyncFails(PowerLossDisk):
    """The n-th fsync of a file fails, as on a dying disk."""

    def __init__(self, base: pathlib.Path, fail_at: int = 1) -> None:
        super().__init__(base)
        self.fail_at = fail_at
        self.failed: str | None = None

    def fsync(self, fd: int) -> None:
        self.fail_at -= 1
        if self.fail_at == 0:
            self.failed = self._paths[fd]
            self.calls.append(("fsync failed", self.failed))
            raise OSError(5, "Input/output error")
        super().fsync(fd)


@pytest.mark.parametrize("act", ["create", "replace", "write", "write several", "create in a new directory"])
def test_a_file_whose_fsync_failed_is_given_up(base: pathlib.Path, act: str) -> None:
    disk = FsyncFails(base)
    store = LocalStore(base / "run", disk)
    with pytest.raises(StoreError, match="Input/output error"):
        ACTS[act](store)
    position = disk.calls.index(("fsync failed", disk.failed))
    assert [call for call, path in disk.calls[position + 1 :] if path == disk.failed] == ["unlink"], (
        "never tried again"
    )
    assert {o.key: store.read(o.key) for o in store.list("")} == BEFORE
    ACTS[act](store)
    assert objects(disk.left()) == after(act)
    opened = [path for call, path in disk.calls if call == "open_new"]
    assert act.startswith("write") or opened[-1] != disk.failed, "the next attempt writes another file"
