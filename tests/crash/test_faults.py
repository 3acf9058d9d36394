"""Every call that changes the disk fails once, by every error: the save says so, the old stays, the next save works."""

from __future__ import annotations

import errno
import pathlib
import shutil

import pytest

import holdfast
from crash.scenarios import check_run, fresh_copy, prepare, save_step_3, state, train_and_prune
from holdfast.core.errors import CommitUnknown, HoldfastError, OutOfSpace, SaveFailed
from holdfast.stores import LocalStore
from holdfast.testing import FaultyDisk

SCENARIOS = {"save": save_step_3, "train": train_and_prune}


@pytest.mark.parametrize("applied", [False, True], ids=["instead", "applied"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_call_fails(tmp_path: pathlib.Path, scenario: str, code: int, applied: bool) -> None:
    base, root = tmp_path / "base", tmp_path / "run"
    prepare(base)
    n = 0
    while True:
        n += 1
        fresh_copy(base, root)
        disk = FaultyDisk(n, code, applied=applied)
        error: HoldfastError | None = None
        try:
            SCENARIOS[scenario](LocalStore(root, disk))
        except HoldfastError as e:
            error = e
        if not disk.fired:
            assert error is None
            break
        steps = check_run(root)
        if scenario == "save":
            assert {1, 2} <= set(steps)
            # No error means that the fault hit something that is made good later; then the checkpoint is there.
            assert error is not None or 3 in steps
            if error is not None and 3 in steps:
                assert isinstance(error, (CommitUnknown, HoldfastError))
        _give_up_lease(root)
        holdfast.save(root, state(9), step=9)
        assert 9 in check_run(root)
    assert n > 20


def _give_up_lease(root: pathlib.Path) -> None:
    """This process is the dead writer and the next one at once: end the lease that the failed attempt may hold."""
    shutil.rmtree(root / "lease", ignore_errors=True)


def test_full_disk_names_the_remedy(tmp_path: pathlib.Path) -> None:
    holdfast.save(tmp_path, state(1), step=1)
    with pytest.raises(OutOfSpace, match="holdfast prune --dry-run"):
        holdfast.save(LocalStore(tmp_path, FaultyDisk(12, errno.ENOSPC, sticky=True)), state(2), step=2)


def test_a_background_failure_is_raised_at_the_next_step(tmp_path: pathlib.Path) -> None:
    disk = FaultyDisk(10**9, errno.ENOSPC, sticky=True)
    live = state(1)
    ckpt = holdfast.Checkpointer(LocalStore(tmp_path, disk), live, save=holdfast.every(steps=1))
    reached = []
    with pytest.raises(SaveFailed, match=r"No space left"):
        for step in ckpt.steps(10):
            reached.append(step)
            if step == 3:
                ckpt.wait()
                disk.fail_at = 0
    assert reached[-1] <= 5  # at the next boundary, or the one after, and not at the end
    disk.fail_at = 10**9
    ckpt.save()
    ckpt.wait()
    assert holdfast.Run(tmp_path).latest.step == ckpt.step
    ckpt.close()
