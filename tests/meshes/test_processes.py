"""Meshes over several processes of jax.distributed: each saves its boxes, and reads back no more than it holds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from meshes.launching import losses, run_several, start_several

pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

STEPS = 18


def exact(rank: int, value: float) -> list[str]:
    return [f"exact; own {rank} {[value] * 3}"]


@pytest.mark.slow
def test_saved_by_two_processes_and_restored_by_two_and_by_one(tmp_path: Path) -> None:
    run_several(2, 2, "save", tmp_path / "a", "2x2")
    assert run_several(2, 2, "restore", tmp_path / "a", "4") == [exact(0, 0.0), exact(1, 1.0)]
    assert run_several(1, 4, "restore", tmp_path / "a", "2x2") == [exact(0, 0.0)]


def test_saved_by_one_process_and_restored_by_two(tmp_path: Path) -> None:
    run_several(1, 8, "save", tmp_path / "a", "4x2")
    assert run_several(2, 2, "restore", tmp_path / "a", "2x2") == [exact(0, 0.0), exact(0, 0.0)]


def test_a_process_reads_what_its_devices_hold(tmp_path: Path) -> None:
    run_several(1, 4, "save-rows", tmp_path / "one")
    assert run_several(2, 2, "restore-rows", tmp_path / "one") == [["read 16"], ["read 16"]]


@pytest.mark.slow
def test_two_killed_processes_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = run_several(2, 2, "train", tmp_path / "whole", "2x2", STEPS)
    expected = losses(whole[0])
    assert sorted(expected) == list(range(STEPS))

    first, second = start_several(2, 2, "train", tmp_path / "killed", "2x2", STEPS, 10)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step 10 "):
            first.send_signal(signal.SIGKILL)
            second.send_signal(signal.SIGKILL)
    first.communicate()
    second.communicate()
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, -signal.SIGKILL)

    after = run_several(2, 2, "train", tmp_path / "killed", "2x2", STEPS)
    for lines, there in zip(after, whole, strict=True):
        again = losses(lines)
        assert 0 < min(again) <= 11
        assert again == {step: expected[step] for step in range(min(again), STEPS)}
        assert lines[-1] == there[-1]
