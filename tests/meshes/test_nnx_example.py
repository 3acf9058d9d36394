"""The example of Flax NNX: killed in the middle and started again it prints what the undisturbed run prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("jax", "optax", "flax", "sklearn"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flax_nnx.py"


def started(url: Path) -> subprocess.Popen[str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(EXAMPLE), str(url)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.mark.slow
def test_the_example_resumes_exactly(tmp_path: Path) -> None:
    whole = finished(started(tmp_path / "whole"))
    process = started(tmp_path / "killed")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 90 "):  # in the middle of the fifth epoch
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    rest = finished(started(tmp_path / "killed"))
    assert rest[0].startswith(("step 51 ", "step 67 ", "step 76 ", "step 89 "))
    assert rest == whole[-len(rest) :]
    assert whole[-1].startswith("best is step ")
    assert "accuracy 9" in whole[-1]
