"""Damage beside the checkpoints must not keep a run from going on, and must not make it delete the wrong thing."""

from __future__ import annotations

import errno
import os
import pathlib

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, Run, every, last
from holdfast.core.buffers import Buffer
from holdfast.core.errors import HoldfastError, LeaseHeld, NotFound, SaveFailed, StoreError
from holdfast.stores import LocalStore, OsDisk


def go(url: pathlib.Path, total: int, **options: object) -> int:
    held = {"w": np.zeros(3), "empty": {"t": np.zeros((0, 4))}}
    with Checkpointer(url, held, save=every(steps=1), **options) as ckpt:
        for step in ckpt.steps(total):
            held["w"] += 1
            ckpt.log(loss=1.0 / (step + 1))
        return int(held["w"][0])


def flip(path: pathlib.Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_a_damaged_log_line_costs_that_line(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    go(tmp_path, 5)
    (segment,) = (tmp_path / "log").iterdir()
    flip(segment, segment.read_bytes().index(b"observed"))
    assert go(tmp_path, 8) == 8
    assert "line of the run log is left out" in caplog.text
    assert [o.clock.step for o in Run(tmp_path).observations()] == [2, 3, 4, 5, 6, 7, 8]


class Away(LocalStore):
    """A directory in which the newest checkpoint's data cannot be read."""

    def __init__(self, root: pathlib.Path, error: StoreError) -> None:
        super().__init__(root)
        self.error = error

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        if key.startswith("data/000000000003"):
            raise self.error
        super().read_into(key, start, target)


@pytest.mark.parametrize("code", [None, errno.EMFILE, errno.ETIMEDOUT])
def test_what_does_not_answer_is_not_passed_over_for_an_older_one(
    tmp_path: pathlib.Path, code: int | None
) -> None:
    go(tmp_path, 3)
    error = StoreError("status 503") if code is None else StoreError(code, "could not read")
    held = {"w": np.full(3, 7.0), "empty": {"t": np.zeros((0, 4))}}
    with pytest.raises(StoreError, match=r"step 3 cannot be read now: .*start again when its place answers"):
        holdfast.load(Away(tmp_path, error), into=held)
    assert held["w"][0] == 7
    assert Run(tmp_path).steps == [1, 2, 3]
    holdfast.load(Away(tmp_path, error), into=held, step=2)
    assert held["w"][0] == 2


@pytest.mark.parametrize("error", [StoreError(errno.EIO, "could not read"), NotFound("no object")])
def test_what_a_disk_has_lost_is_passed_over(tmp_path: pathlib.Path, error: StoreError) -> None:
    go(tmp_path, 3)
    held = {"w": np.zeros(3), "empty": {"t": np.zeros((0, 4))}}
    report = holdfast.load(Away(tmp_path, error), into=held)
    assert held["w"][0] == 2
    assert any("passed over step 3" in note for note in report.notes)


def test_a_manifest_that_somebody_deletes_meanwhile_costs_that_checkpoint(tmp_path: pathlib.Path) -> None:
    held = {"w": np.zeros(3)}
    with Checkpointer(tmp_path, held, save=every(steps=1), keep=last(3) | every(steps=4)) as ckpt:
        for step in ckpt.steps(10):
            held["w"] += 1
            ckpt.wait()
            if step == 6:
                (tmp_path / "checkpoints" / "000000000004.json").unlink()
    assert Run(tmp_path).steps == [6, 8, 9, 10]  # 6 was its neighbour when it went


def test_a_damaged_tag_stops_deletion_and_not_training(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path, 3)
    Run(tmp_path).tag("precious", 1)
    flip(tmp_path / "tags" / "precious.json", 5)
    assert go(tmp_path, 5, keep=last(1)) == 5
    assert "nothing is deleted" in caplog.text
    assert Run(tmp_path).steps == [1, 2, 3, 4, 5]
    Run(tmp_path).tag("precious", 1)
    go(tmp_path, 6, keep=last(1))
    assert Run(tmp_path).steps == [1, 5, 6]  # tagged, resumed from, newest


def test_removing_a_checkpoint_removes_its_tags(tmp_path: pathlib.Path) -> None:
    go(tmp_path, 3)
    run = Run(tmp_path)
    run.tag("old", 1)
    with pytest.raises(HoldfastError, match="has the tag 'old'"):
        run.remove([1])
    run.remove([1], force=True)
    assert run.store.list("tags") == []


def test_a_damaged_old_manifest_stays_where_it_is(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path, 3)
    flip(tmp_path / "checkpoints" / "000000000002.json", 20)
    assert go(tmp_path, 4) == 4
    assert "step 2 does not verify" in caplog.text
    run = Run(tmp_path)
    assert (run.steps, list(run.broken)) == ([1, 3, 4], [2])
    run.remove([2])
    assert Run(tmp_path).broken == {}
    assert not any(Run(tmp_path).verify().values())


def test_half_made_files_of_the_dead_are_swept(tmp_path: pathlib.Path) -> None:
    go(tmp_path, 2)
    old, young = tmp_path / "checkpoints" / ".tmp-dead", tmp_path / "tags" / ".tmp-alive"
    young.parent.mkdir(exist_ok=True)
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    go(tmp_path, 3)
    assert not old.exists()
    assert young.exists()  # somebody may be writing it at this moment


class FullDisk(OsDisk):
    """Takes `room` more writes, then has no space left; deleting still works."""

    left = 10**9

    def write(self, fd: int, data: Buffer) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)


@pytest.mark.parametrize("room", range(8))
def test_failed_saves_leave_nothing_behind_on_a_full_disk(tmp_path: pathlib.Path, room: int) -> None:
    disk = FullDisk()
    held = {"a": np.zeros(50_000), "b": np.zeros(50_000), "c": np.zeros(50_000)}
    ckpt = Checkpointer(LocalStore(tmp_path, disk), held, writer="inline")
    ckpt.save()
    before = sorted(p.name for p in (tmp_path / "data").rglob("*"))
    for part in held:
        held[part] += 1
    disk.left = room
    with pytest.raises(SaveFailed, match="No space left"):
        ckpt.save()
    disk.left = 10**9
    assert sorted(p.name for p in (tmp_path / "data").rglob("*")) == before
    ckpt.save()
    ckpt.close()
    assert not any(Run(tmp_path).verify().values())


def test_a_damaged_lease_lapses(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    go(tmp_path, 2)
    (lease,) = (tmp_path / "lease").iterdir()
    flip(lease, 10)
    with pytest.raises(LeaseHeld, match="can be taken in"):
        go(tmp_path, 3)
    os.utime(lease, (1, 1))
    assert go(tmp_path, 3) == 3
    assert "is taken over" in caplog.text
