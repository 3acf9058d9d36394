"""torchrun starts all ranks again when one is killed: they take the run up where it was, without a line of user code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from distributed.launching import TIMEOUT, WORKER, environment, results, torchrun

pytest.importorskip("torch.distributed.run")


# torch 2.13 gives a restarted group the store of the one before, and gloo finds the addresses of the dead there: "Connection
# refused", or a hang, in most restarts, with or without holdfast.
ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def elastic(world: int, order: dict[str, object]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        "--max-restarts=2", "--monitor-interval=0.1", str(WORKER), json.dumps(order),
    ]  # fmt: skip
    return subprocess.run(
        command, env=environment(**ANEW), timeout=TIMEOUT, check=False, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "killed"), [("fsdp", 0)])
def test_a_group_that_is_restarted_resumes_exactly(tmp_path: Path, kind: str, killed: int) -> None:
    def order(name: str, **more: object) -> dict[str, object]:
        run = str(tmp_path / name)
        return {"kind": kind, "run": run, "steps": 9, "out": str(tmp_path), "name": name, **more}

    assert torchrun(2, order("whole")) == 0
    ended = elastic(2, order("cut", kill_at=5, kill=[killed]))
    assert ended.returncode == 0, ended.stderr
    assert "exitcode: -9" in ended.stderr  # it was killed indeed
    for whole, cut in zip(results(tmp_path, "whole", 2), results(tmp_path, "cut", 2), strict=True):
        assert len(cut["losses"]) == 5  # of the second life
        assert cut["losses"] == whole["losses"][-5:]
        assert cut["digest"] == whole["digest"]
        assert cut["drawn"] == whole["drawn"]
        assert cut["notes"] == []
    run = holdfast.Run(str(tmp_path / "cut"))
    assert [c.step for c in run] == [2, 4, 6, 8, 9]
    assert list(run.latest.verify()) == []
