"""SIGKILL at every call that changes the disk, enumerated: the old stays, the new is whole or invisible, the next works."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("kill_every_call.py")


@pytest.mark.parametrize("when", ["before", "after", "torn"])
@pytest.mark.parametrize("scenario", ["save", "train", "remove"])
def test_killed_at_every_call(scenario: str, when: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), scenario, when], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    calls = int(done.stdout.split()[-1])
    assert calls >= (5 if when == "torn" else 20), (
        f"only {calls} calls were tried: the scenario does not reach the disk"
    )
