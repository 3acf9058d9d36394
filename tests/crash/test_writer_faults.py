"""The writer process dies, or its disk fails, at calls of its own: the trainer is told, the old stays, the next works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crash import ledger
from crash.loop import ERRORS, KILLED, FaultKind
from crash.operations import state, truth
from holdfast import Checkpointer, every
from holdfast.core.errors import SaveFailed
from holdfast.testing import forget_this_process, invariants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the writer process needs memfd")

STICKY = FaultKind("disk full from then on", "ENOSPC", times=None)
KINDS = [*KILLED[:2], ERRORS[0], ERRORS[1], STICKY]
CELLS = [(kind.name, "async save (process)") for kind in KINDS]


@pytest.fixture
def writer_fault(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("in_writer")))
    return lambda kind, at: monkeypatch.setenv(
        "HOLDFAST_WRITER_FAULT", f"{kind.kind},{at},{kind.when},{0 if kind.times is None else kind.times}"
    )


def save_twice(root: Path) -> BaseException | None:
    """Save steps 1 and 2 from a writer process; return what the trainer is told."""
    held = state(1)
    try:
        with Checkpointer(root, held, writer="process", save=every(steps=1)) as ckpt:
            for step in ckpt.steps(2):
                ckpt.state.update(state(step + 1))
                ckpt.wait()
    except SaveFailed as e:
        return e
    return None


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_writer_whose_disk_fails(tmp_path: Path, kind: FaultKind, writer_fault: object) -> None:
    cases, met = 0, 0
    points = range(1, 200) if ledger.LONG else range(2 + len(kind.name) % 5, 60, 13)
    for at in points:
        root = tmp_path / str(at)
        writer_fault(kind, at)  # type: ignore[operator]
        error = save_twice(root)
        writer_fault(kind, 10**6)  # type: ignore[operator]
        steps = invariants.promises(root, {}, truth(1, 2))
        assert error is not None or steps == [1, 2]
        if error is None and at > 60:
            break  # the writer makes no more calls than that
        cases, met = cases + 1, met + (error is not None)
        forget_this_process()
        assert save_twice(root) is None, "the next attempt works"
        assert invariants.promises(root, {}, truth(1, 2)) == [1, 2]
        invariants.recovers(root, 9, state(9), temporary_at_most=1)
    assert met >= 2, f"the fault reached the writer in {met} of {cases} runs"
    ledger.count(kind.name, "async save (process)", cases)


def test_only_the_writer_is_met(tmp_path: Path) -> None:
    """The plan of the environment is for the writer process: any other Python goes on as ever."""
    code = f"from holdfast.stores import LocalStore; LocalStore({str(tmp_path)!r}).create('k', b'x')"
    path = os.pathsep.join([str(Path(__file__).with_name("in_writer")), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "HOLDFAST_WRITER_FAULT": "EIO,1,before,1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
