"""The example of several ranks, as its first lines say to run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from distributed.launching import environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "ranks.py"


def run(world: int, *options: str) -> list[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(EXAMPLE), *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment(), timeout=150, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if " ranks  step " in line]


@pytest.mark.slow
def test_two_ranks_train_and_three_go_on(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    assert [line.split()[3] for line in run(2, "--url", url, "--steps", "60")] == ["25", "50"]
    assert holdfast.Run(url).latest.step == 60
    assert [line.split()[3] for line in run(3, "--url", url, "--steps", "110")] == ["75", "100"]
    found = holdfast.Run(url)
    assert found.latest.step == 110
    assert found.latest.manifest.world_size == 3
    assert found.best("accuracy", mode="max").metrics["accuracy"] > 0.8
    assert list(found.latest.verify()) == []
