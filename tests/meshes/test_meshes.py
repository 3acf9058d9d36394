"""States that are spread over a mesh of devices, restored on others, and trained on after a kill; real processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from meshes.launching import losses, run, started

pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

STEPS = 24


def test_saved_on_one_mesh_and_restored_on_others(tmp_path: Path) -> None:
    run(8, "save", tmp_path / "a", "4x2")
    meshes = ("4x2", "2x4", "8", "1", "2x2")
    assert run(8, "restore", tmp_path / "a", *meshes) == [f"exact on {mesh} of 8" for mesh in meshes]
    meshes = ("2x2", "4", "1x4")
    assert run(4, "restore", tmp_path / "a", *meshes) == [f"exact on {mesh} of 4" for mesh in meshes]


def test_saved_on_four_devices_and_restored_on_eight(tmp_path: Path) -> None:
    run(4, "save", tmp_path / "a", "2x2")
    assert run(8, "restore", tmp_path / "a", "2x4", "8") == ["exact on 2x4 of 8", "exact on 8 of 8"]


def test_killed_and_started_again_it_is_the_undisturbed_run(tmp_path: Path) -> None:
    whole = run(4, "train", tmp_path / "whole", "2x2", STEPS)
    expected = losses(whole)
    assert sorted(expected) == list(range(STEPS))
    assert len(set(expected.values())) == STEPS

    process = started(4, "worker.py", "train", tmp_path / "killed", "2x2", STEPS, 13)
    before: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        before.append(line)
        if line.startswith("step 13 "):
            process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    after = run(4, "train", tmp_path / "killed", "2x2", STEPS)
    again = losses(after)
    assert 0 < min(again) <= 14
    assert max(again) == STEPS - 1
    seen = losses(before)
    assert seen == {step: expected[step] for step in seen}
    assert again == {step: expected[step] for step in again}
    assert after[-1] == whole[-1]
