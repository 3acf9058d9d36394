"""A store that runs full: foreseen, made room in, paused for, or said clearly; and never at the cost of what is there.

On a real file system of a few megabytes where we may mount one, and on a disk that counts.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, Run, best, every, last
from holdfast.core.errors import CommitUnknown, OutOfSpace, PolicyError, SaveFailed
from holdfast.replication.scrub import scrub
from holdfast.stores import LocalStore
from holdfast.stores.disk import OsDisk
from holdfast.testing import FaultyDisk

STATE_BYTES = 2_000_000
ROOM_BYTES = 7 << 20  # for three checkpoints, and the spare megabyte; not for four


class SmallDisk(OsDisk):
    """A disk of so many bytes: what is under its directory counts."""

    def __init__(self, root: pathlib.Path, size: int) -> None:
        self.root, self.size = root, size

    def used(self) -> int:
        found = 0
        for path in self.walk(str(self.root)):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, by a thread of its own
                found += os.stat(path).st_size
        return found

    def write(self, fd: int, data) -> int:
        if len(memoryview(data).cast("B")) > self.size - self.used():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)

    def room(self, path: str) -> int:
        return max(0, self.size - self.used())


@pytest.fixture(params=["counted", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[LocalStore]:
    root = tmp_path / "small"
    root.mkdir()
    if request.param == "counted":
        yield LocalStore(root / "run", SmallDisk(root, ROOM_BYTES))
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", str(root)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system may be mounted here")
    try:
        yield LocalStore(root / "run")
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def go(place: LocalStore, total: int, at=None, **how) -> Checkpointer:
    """Train, saving each step; `at` is called in each step."""
    held = {"w": np.zeros(STATE_BYTES // 8), "n": [0]}
    ckpt = Checkpointer(place, {"model": held}, save=every(steps=1), **how)
    with ckpt:
        for step in ckpt.steps(total):
            held["w"][:] = step + 1
            held["n"][0] = step + 1
            ckpt.log(loss=1.0 / (step + 1))
            if at is not None:
                ckpt.wait()
                at(step)
    return ckpt


def whole(place: LocalStore) -> list[int]:
    run = Run(LocalStore(place.root))
    assert not run.broken
    assert not any(run.verify().values())
    for step in run.steps:
        assert holdfast.load(run.store, step=step)["model"]["w"][0] == step
    return run.steps


def ballast(place: LocalStore) -> pathlib.Path:
    return pathlib.Path(place.root).parent / "ballast"


@pytest.mark.parametrize("writer", ["process", "thread", "inline"])
def test_a_loop_that_keeps_few_lives_on_a_small_disk(place: LocalStore, writer) -> None:
    if writer == "process" and isinstance(place.disk, SmallDisk):
        pytest.skip("another process does not see this disk")
    go(place, 12, keep=last(2), writer=writer)
    assert whole(place) == [11, 12]


def test_what_is_too_much_is_said_with_figures_and_fails_as_a_full_disk(
    place: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SaveFailed, match="No space left") as raised:
        go(place, 12, writer="thread")
    assert isinstance(raised.value.__cause__, OutOfSpace)
    assert whole(place) == [1, 2, 3]
    told = [r.getMessage() for r in caplog.records if "has room for" in r.getMessage()]
    assert len(told) == 1
    assert "is expected to take 3.1 MB" in told[0]
    assert "it is tried all the same" in told[0]


def test_retention_goes_first_where_that_was_asked_for(place: LocalStore, caplog) -> None:
    go(place, 10, keep=last(3), when_full="prune", writer="thread")
    assert whole(place)[-1] == 10
    assert "retention goes before the save" in caplog.text
    assert len(whole(place)) == 3


def test_retention_ahead_never_takes_the_newest_or_a_tagged_one(place: LocalStore) -> None:
    """A rule that will keep the coming one alone: until that is there, the one before it stays."""
    seen: list[list[int]] = []
    held = {"w": np.zeros(STATE_BYTES // 8)}
    with Checkpointer(place, {"model": held}, keep=last(1), when_full="prune", writer="inline") as ckpt:
        ckpt.save(tag="first")
        create = place.create

        def note_what_is_there(key: str, data) -> None:
            if key.startswith("checkpoints/"):
                seen.append(list(Run(LocalStore(place.root)).steps))
            create(key, data)

        place.create = note_what_is_there  # type: ignore[method-assign]
        for step in ckpt.steps(4):
            held["w"][:] = step + 1
            ckpt.save()
            ballast(place).write_bytes(bytes(1_000_000))
    assert all(steps for steps in seen)
    assert [steps[-1] for steps in seen] == [0, 1, 2, 3]
    assert all(0 in steps for steps in seen)


def test_the_trash_is_emptied_first(place: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    go(place, 3, keep=last(1), grace="24h", writer="thread")
    assert [d.step for d in Run(place).trash()] == [1, 2]
    go(place, 9, keep=last(1), grace="24h", writer="thread")
    assert whole(place) == [3, 9], "the one it resumed from stays"
    assert "its trash is emptied" in caplog.text
    left = Run(place).trash()
    assert 0 < len(left) < 3
    assert Run(place).undelete(left[-1].step).step == left[-1].step


def test_saving_is_paused_until_there_is_room_again(place: LocalStore, caplog) -> None:
    there: dict[int, list[int]] = {}

    def at(step: int) -> None:
        if step == 2:
            ballast(place).write_bytes(bytes(ROOM_BYTES - place_used(place) - 2_000_000))
        if step == 6:
            ballast(place).unlink()
        there[step] = Run(LocalStore(place.root)).steps

    go(place, 10, at, keep=last(2), when_full="pause", writer="thread")
    assert there[6] == there[3] == [1, 2], "nothing was saved meanwhile, and nothing lost"
    assert whole(place) == [9, 10]
    told = [r.getMessage() for r in caplog.records]
    assert sum("saving is paused" in m for m in told) == 1
    assert sum("has room again" in m for m in told) == 1
    assert any("there is room again" in r for e in Run(place).events() for r in getattr(e, "reasons", []))


def place_used(place: LocalStore) -> int:
    return ROOM_BYTES - (place.room() or 0)


def test_the_last_state_is_saved_or_its_loss_is_told(place: LocalStore) -> None:
    """Paused to the end: the end is tried all the same, and that it failed is raised."""

    def at(step: int) -> None:
        if step == 2:
            ballast(place).write_bytes(bytes(ROOM_BYTES - place_used(place) - 500_000))

    with pytest.raises(SaveFailed, match="No space left"):
        go(place, 6, at, keep=last(2), when_full="pause", writer="thread")
    assert whole(place) == [1, 2]


def test_training_is_stopped_where_that_was_asked_for(place: LocalStore) -> None:
    reached: list[int] = []
    with pytest.raises(OutOfSpace, match="Training is stopped, as when_full='stop' asks for") as raised:
        go(place, 12, reached.append, when_full="stop", writer="thread")
    assert raised.value.errno == errno.ENOSPC
    assert whole(place) == [1, 2, 3]
    assert reached[-1] == 3
    go(place, 4, keep=last(1), when_full="prune", writer="thread")
    assert whole(place)[-1] == 4


def test_what_never_changes_is_not_expected_to_be_written_again(place: LocalStore) -> None:
    """Five megabytes of which little changes: the second and all later saves need little room."""
    frozen, head = np.arange(600_000.0), np.zeros(10_000)
    with Checkpointer(
        place, {"frozen": frozen, "head": head}, save=every(steps=1), when_full="stop", writer="thread"
    ) as ckpt:
        for step in ckpt.steps(9):
            head[:] = step
            ckpt.wait()
    assert len(Run(place).steps) == 9


@pytest.mark.parametrize("word", ["", "panic", None])
def test_a_policy_that_there_is_not_is_refused(tmp_path: pathlib.Path, word) -> None:
    with pytest.raises(PolicyError, match="when_full"):
        Checkpointer(tmp_path / "r", {"n": [0]}, when_full=word)
    with pytest.raises(PolicyError, match="duration"):
        Checkpointer(tmp_path / "r", {"n": [0]}, grace="soon")


# ---- a disk that is full though it had said that there is room --------------------------------------------------------


@pytest.mark.parametrize("writer", ["thread", "inline"])
def test_no_room_amid_a_save_empties_the_trash_and_tries_again(tmp_path: pathlib.Path, writer) -> None:
    """Every call of a save once."""
    n, retried = 0, 0
    while True:
        n += 1
        root = tmp_path / f"run{n}"
        for step in (1, 2):
            holdfast.save(root, {"m": {"w": np.full(9, step)}}, step=step)
        Run(root).remove([1])
        disk = FaultyDisk(10**9, errno.ENOSPC)
        held = {"w": np.full(9, 0)}
        ckpt = Checkpointer(LocalStore(root, disk), {"m": held}, writer=writer)
        ckpt.restore("latest")
        held["w"][:] = 3
        disk.calls.clear()
        disk.fail_at = n
        failed: BaseException | None = None
        try:
            ckpt.save()
            ckpt.wait()
        except SaveFailed as e:
            failed = e.__cause__
        fired = disk.fired
        disk.fail_at = 10**9
        with contextlib.suppress(OutOfSpace):  # of a deletion behind the save
            ckpt.close()
        assert failed is None or isinstance(failed, CommitUnknown) or "could not delete" in str(failed), n
        run = Run(root)
        assert not any(run.verify().values())
        if not fired:
            break
        assert holdfast.load(root)["m"]["w"][0] == 3, n
        retried += run.trash() == []
    assert retried >= 15


def test_best_is_not_given_up_for_room(place: LocalStore) -> None:
    go(place, 8, keep=last(1) | best("loss", mode="max"), when_full="prune", writer="thread")
    assert whole(place) == [1, 8]


def fill(place: LocalStore, spare: int = 0) -> None:
    """Leave exactly so many bytes free."""
    with ballast(place).open("ab") as file:
        disk = place.disk
        if isinstance(disk, SmallDisk):
            file.truncate(file.seek(0, os.SEEK_END) + disk.size - disk.used() - spare)
            return
        with contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        file.truncate(file.seek(0, os.SEEK_END) // 4096 * 4096 - spare)


def test_a_store_without_a_byte_is_freed_in_the_place_of_what_only_saves_work(place: LocalStore) -> None:
    go(place, 3, writer="inline")
    scrub(place)
    place.replace("index.json", bytes(2048))
    fill(place)
    with pytest.raises(OutOfSpace):
        place.create("another", bytes(100))
    assert [d.step for d in Run(place).prune(last(1), grace=0) if d.action == "drop"] == [1, 2]
    ballast(place).unlink()
    assert whole(place) == [3]


@pytest.mark.parametrize("verb", ["prune", "collect"])
def test_a_store_without_a_byte_says_what_to_do_and_then_frees(place: LocalStore, verb: str) -> None:
    go(place, 3, writer="inline")
    Run(place).remove([1])

    def act() -> None:
        Run(place).prune(last(1), grace=0) if verb == "prune" else Run(place).collect(grace=0)

    before = [place.info(key) for key in place.names("")]
    fill(place)
    with pytest.raises(OutOfSpace, match=r"cannot even be taken for writing .*Delete some other file"):
        act()
    assert [place.info(key) for key in place.names("")] == before
    fill(place, spare=100_000)
    act()
    assert not Run(place).trash() or verb == "prune"
    ballast(place).unlink()
    assert whole(place) == ([3] if verb == "prune" else [2, 3])
