"""An error names its remedy, and one in the background is raised at the next step."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import threading

import pytest

import holdfast
from crash.operations import state
from holdfast.core.errors import CommitUnknown, OutOfSpace, SaveFailed
from holdfast.saving.arena import Arena, Arenas
from holdfast.stores import LocalStore, MemoryStore
from holdfast.testing import Fault, FaultPlan, FaultStore, FaultyDisk


def test_full_disk_names_the_remedy(tmp_path: pathlib.Path) -> None:
    holdfast.save(tmp_path, state(1), step=1)
    with pytest.raises(OutOfSpace, match="holdfast prune --dry-run"):
        holdfast.save(LocalStore(tmp_path, FaultyDisk(12, errno.ENOSPC, sticky=True)), state(2), step=2)


def test_a_commit_that_is_open_is_said_to_be_even_when_the_store_stays_away() -> None:
    """What failed first is what is said: not that the log could not be closed either."""
    plan = FaultPlan(
        Fault("EIO", call="create", key="checkpoints/*", when="after"),
        Fault("ENOSPC", call="append", key="log/*", at=2, times=None),
    )
    with pytest.raises(CommitUnknown):
        holdfast.save(FaultStore(MemoryStore(), plan), state(1), step=1)
    plan.check_fired()


@pytest.mark.parametrize("late", [False, True])
def test_a_background_failure_is_raised_at_the_next_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """However late the thread that saves goes on once the memory of a save that failed may be used again."""
    disk = FaultyDisk(10**9, errno.ENOSPC, sticky=True)
    go_on, give_back = threading.Event(), Arenas.give_back

    def given(self: Arenas, arena: Arena) -> None:
        give_back(self, arena)
        if late and disk.fired and threading.current_thread() is not threading.main_thread():
            go_on.wait(2)

    monkeypatch.setattr(Arenas, "give_back", given)
    live = state(1)
    ckpt = holdfast.Checkpointer(LocalStore(tmp_path, disk), live, save=holdfast.every(steps=1))
    reached = []
    with pytest.raises(SaveFailed, match=r"No space left"):
        for step in ckpt.steps(10):
            reached.append(step)
            if step == 3:
                ckpt.wait()
                disk.fail_at = 0
    go_on.set()
    assert reached[-1] <= 5  # at the next boundary, or the one after, and not at the end
    # Where another save was under way behind it, the disk was full for that one too.
    with contextlib.suppress(SaveFailed):
        ckpt.wait()
    disk.fail_at = 10**9
    ckpt.save()
    ckpt.wait()
    assert holdfast.Run(tmp_path).latest.step == ckpt.step
    ckpt.close()
