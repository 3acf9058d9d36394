"""The arena grows with the state: what the writer maps is what was copied, and what was touched stays so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, Run, every
from holdfast.core.memory import PAGE, Memory
from holdfast.saving.arena import Arena

MEGABYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared by memfd")


@linux
def test_a_shared_arena_keeps_its_pages_as_it_grows() -> None:
    arena = Arena(shared=True)
    (small,) = arena.reserve([MEGABYTE])
    small[:] = b"a" * MEGABYTE
    first = arena.memory
    assert first is not None
    large, tail = arena.reserve([2 * MEGABYTE, PAGE])
    assert arena.memory is not first
    assert large[:MEGABYTE] == small  # the same pages, which were not given up and made anew
    tail[:] = b"z" * PAGE
    large[:1] = b"b"
    assert small[:1] == b"b"  # whoever still looks at the smaller one may
    theirs = Memory.of(os.dup(arena.memory.fd))
    assert theirs.view[:2] == b"ba"
    assert theirs.view[2 * MEGABYTE :] == tail


@pytest.mark.parametrize("shared", [pytest.param(True, marks=linux), False])
def test_what_is_made_ready_is_what_is_handed_out(shared: bool) -> None:
    arena = Arena(shared=shared)
    for sizes in ([PAGE], [PAGE, 3 * MEGABYTE], [MEGABYTE]):
        arena.prewarm(sizes)
        assert arena.fits(sizes)
        made = arena.memory
        pieces = arena.reserve(sizes)
        assert arena.memory is made
        assert [len(piece) for piece in pieces] == sizes


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_state_that_grows_is_saved_whole(tmp_path: Path, writer: str) -> None:
    state: dict[str, object] = {}
    with Checkpointer(tmp_path, {"m": state}, save=every(steps=1), writer=writer) as ckpt:
        for step in ckpt.steps(5):
            state[f"w{step}"] = np.full((step + 1) * 40_000, float(step))
    for step in range(1, 6):
        found = holdfast.load(tmp_path, step=step, as_="numpy")["m"]
        assert {name: float(value.sum() / value.size) for name, value in found.items()} == {
            f"w{i}": float(i) for i in range(step)
        }
    assert not any(Run(tmp_path).verify().values())
