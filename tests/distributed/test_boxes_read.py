"""A part of a tensor is put together from whatever parts it was stored in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.restoring.reader import Reader
from holdfast.state.restoring import BoxWanted
from holdfast.stores import open_store


@pytest.mark.parametrize("seed", range(40))
def test_any_box_is_what_a_slice_is(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = tuple(int(n) for n in rng.integers(1, 9, size=int(rng.integers(1, 4))))
    value = rng.standard_normal(whole).astype(np.float32)
    holdfast.save(str(tmp_path / "run"), {"w": {"x": value}}, step=1)
    checkpoint = holdfast.open(str(tmp_path / "run"))
    first = [int(rng.integers(0, n)) for n in whole]
    shape = tuple(int(rng.integers(0, n - f + 1)) for n, f in zip(whole, first, strict=True))
    reader = Reader(open_store(str(tmp_path / "run")), checkpoint.manifest)
    found = reader.read([], {"a box": BoxWanted("w/x", (tuple(first), whole), shape)})["a box"]
    there = value[tuple(slice(f, f + n) for f, n in zip(first, shape, strict=True))]
    assert bytes(found.data) == np.ascontiguousarray(there).tobytes()
    assert found.spec.shape == shape
