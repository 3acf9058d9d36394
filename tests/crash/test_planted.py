"""Tests must be able to fail: each planted defect turns a named test red, which is green without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crash import ledger
from crash.planted import CAUGHT_BY, DEFECTS

TESTS = Path(__file__).parents[1]
# A broken promise, a run that cannot be taken up, damage that nobody noticed: and not a defect of the planting.
SAYS = re.compile(
    r"^E .*(Broken: I\d|LeaseHeld: .* 0 bytes were read|were named|no error was told)", re.MULTILINE
)


def outcome(defect: str, *tests: str) -> tuple[int, str]:
    """Run tests in a process of their own, with a defect ("" for none)."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), *sys.path])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HOLDFAST_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "crash.planted", "-p", "no:cacheprovider", *(str(TESTS / test) for test in tests)],
        capture_output=True, text=True, check=False, cwd=TESTS.parent,
        env={**env, "PYTHONPATH": path, "HOLDFAST_PLANT": defect},
    )  # fmt: skip
    return done.returncode, done.stdout[-3000:]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defect: str) -> None:
    caught = 0
    for test in CAUGHT_BY[defect] if ledger.LONG else CAUGHT_BY[defect][:1]:
        code, output = outcome(defect, test)
        if "1 skipped" in output:
            continue
        assert code == 1, f"with {defect!r} planted, {test} ends with {code}:\n{output}"
        assert "1 failed" in output, output
        assert SAYS.search(output), f"red, but not for the defect:\n{output}"
        caught += 1
    ledger.count(f"planted: {defect}", "(a test of it goes red)", caught)


def test_without_a_defect_they_are_green() -> None:
    tests = sorted({test for tests in CAUGHT_BY.values() for test in tests[:1]})
    code, output = outcome("", *tests)
    assert code == 0, output
    assert f"{len(tests)} passed" in output, output
