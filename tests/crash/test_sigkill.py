"""A real SIGKILL at a call that changes the disk: the old stays, the new is whole or invisible, the next works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crash import ledger

SCRIPT = Path(__file__).with_name("kill_every_call.py")
TESTS = SCRIPT.parents[1]
ROWS = {
    "before": "killed before a call (SIGKILL)",
    "after": "killed after a call (SIGKILL)",
    "torn": "killed amid a write (SIGKILL)",
}
OPERATIONS = ["save", "async save (inline)"]
FURTHER = ["prune", "remove", "tag", "mirror", "cp"]  # in the campaign
CELLS = [(row, operation) for row in ROWS.values() for operation in OPERATIONS + FURTHER]


@pytest.mark.parametrize("when", ROWS)
@pytest.mark.parametrize("operation", OPERATIONS + FURTHER if ledger.BROAD else OPERATIONS)
def test_killed_at_calls(operation: str, when: str) -> None:
    stride = str(ledger.budget(2 if when == "torn" else 9, 1))
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), operation, when, stride],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ledger.count(ROWS[when], operation, int(done.stdout.split()[-1]))
