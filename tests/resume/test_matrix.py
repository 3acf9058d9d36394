"""A resumed run is the same run, bit for bit: optimizers x schedules x loss scaling x accumulation x workers x where."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from resume.training import OPTIMIZERS, SCHEDULERS

TESTS = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_bit_exact(optimizer: str, scheduler: str) -> None:
    """Eight cases a row, six resumes each: step 0, mid-epoch, epoch boundary, twice in one epoch, extension, control."""
    done = subprocess.run(
        [sys.executable, "-m", "resume.matrix", optimizer, scheduler],
        cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split()[-1] == "48"
