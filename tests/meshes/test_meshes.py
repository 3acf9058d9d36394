"""States that are spread over a mesh of devices, restored on others, and trained on after a kill; real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

WORKER = Path(__file__).with_name("worker.py")


def started(devices: int, *words: str | Path) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(WORKER), *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(devices: int, *words: str | Path) -> list[str]:
    process = started(devices, *words)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.splitlines()


def test_saved_on_one_mesh_and_restored_on_others(tmp_path: Path) -> None:
    run(8, "save", tmp_path / "a", "4x2")
    meshes = ("4x2", "2x4", "8", "1", "2x2")
    assert run(8, "restore", tmp_path / "a", *meshes) == [f"exact on {mesh} of 8" for mesh in meshes]
    meshes = ("2x2", "4", "1x4")
    assert run(4, "restore", tmp_path / "a", *meshes) == [f"exact on {mesh} of 4" for mesh in meshes]


def test_saved_on_four_devices_and_restored_on_eight(tmp_path: Path) -> None:
    run(4, "save", tmp_path / "a", "2x2")
    assert run(8, "restore", tmp_path / "a", "2x4", "8") == ["exact on 2x4 of 8", "exact on 8 of 8"]


def losses(lines: list[str]) -> dict[int, str]:
    return {int(m[1]): m[2] for line in lines if (m := re.fullmatch(r"step (\d+) (\S+)", line))}


def test_killed_and_started_again_it_is_the_undisturbed_run(tmp_path: Path) -> None:
    steps = 24
    whole = run(4, "train", tmp_path / "whole", "2x2", str(steps))
    expected = losses(whole)
    assert sorted(expected) == list(range(steps))
    assert len(set(expected.values())) == steps

    process = started(4, "train", tmp_path / "killed", "2x2", str(steps))
    before: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        before.append(line.strip())
        if line.startswith("step 13 "):
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()

    after = run(4, "train", tmp_path / "killed", "2x2", str(steps))
    again = losses(after)
    assert 0 < min(again) <= 14
    assert max(again) == steps - 1
    seen = losses(before)
    assert seen == {step: expected[step] for step in seen}
    assert again == {step: expected[step] for step in again}
    assert after[-1] == whole[-1]
