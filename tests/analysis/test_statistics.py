"""Statistics of a tensor against numpy, for every element type and every odd value."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import holdfast
from holdfast.analysis import numbers
from holdfast.analysis.numbers import as_native
from holdfast.analysis.statistics import BINS, Statistics, describe
from holdfast.stores import MemoryStore


def stats(array: NDArray[np.generic]) -> Statistics:
    return describe(holdfast.save(MemoryStore(), {"m": {"x": array, "other": np.ones(1)}}).reader, "m/x")


TYPES = ["bool", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
TYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_element_type(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 7, (5, 11)).astype(dtype)
    found = stats(array)
    wide = np.abs(array.astype(np.complex128)) if array.dtype.kind == "c" else array.astype(np.float64)
    assert (found.count, found.finite) == (55, 55)
    assert found.zeros == int((wide == 0).sum())
    assert (found.minimum, found.maximum) == (wide.min(), wide.max())
    assert found.mean == pytest.approx(wide.mean())
    assert found.std == pytest.approx(wide.std())
    assert found.norm == pytest.approx(np.linalg.norm(wide))
    assert sum(found.histogram) == 55


@given(hnp.arrays(np.float32, hnp.array_shapes(max_side=20), elements=st.floats(width=32)))
@settings(max_examples=100, deadline=None)
def test_any_floats(array: NDArray[np.float32]) -> None:
    found = stats(array)
    good = array[np.isfinite(array)].astype(np.float64)
    assert found.nan == int(np.isnan(array).sum())
    assert found.positive_infinite == int((array == np.inf).sum())
    assert found.negative_infinite == int((array == -np.inf).sum())
    assert found.finite == good.size
    if good.size:
        assert (found.minimum, found.maximum) == (good.min(), good.max())
        assert found.mean == pytest.approx(good.mean(), rel=1e-9, abs=1e-9 * np.abs(good).max())
        assert found.std == pytest.approx(good.std(), rel=1e-6, abs=1e-9 * np.abs(good).max())
        assert sum(found.histogram) == good.size
    else:
        assert (found.minimum, found.mean, found.std, found.norm, found.histogram) == (
            None,
            None,
            None,
            None,
            (),
        )


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    array = (1e6 + np.random.default_rng(1).normal(size=100_003)).astype(np.float32)
    whole = stats(array)
    monkeypatch.setattr(numbers, "CHUNK_ELEMENTS", 1000)
    parts = stats(array)
    assert parts.std == pytest.approx(float(array.astype(np.float64).std()), rel=1e-9)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12)
    assert parts.histogram == whole.histogram


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    found = stats(np.full(shape, 2.5))
    assert found.count == int(np.prod(shape))
    assert found.maximum == (2.5 if found.count else None)


def test_large_integers_stay_exact() -> None:
    found = stats(np.array([-(2**63), 2**63 - 1, 0]))
    assert (found.minimum, found.maximum) == (-(2**63), 2**63 - 1)
    assert stats(np.array([2**64 - 1], np.uint64)).maximum == 2**64 - 1


def test_the_widest_floats_have_a_histogram() -> None:
    top = np.finfo(np.float64).max
    found = stats(np.array([-top, 0.0, top]))
    assert (found.histogram[0], found.histogram[BINS // 2], found.histogram[-1]) == (1, 1, 1)


def test_packed_float4() -> None:
    want = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    packed = np.array([low | (low + 1) << 4 for low in range(0, 16, 2)], np.uint8)
    np.testing.assert_array_equal(as_native(packed.data, "float4_e2m1fn_x2"), want)


def test_complex32() -> None:
    pairs = np.array([1, -2, 0.5, 4], np.float16)
    np.testing.assert_array_equal(as_native(pairs.tobytes(), "complex32"), np.array([1 - 2j, 0.5 + 4j]))


def test_a_changed_byte_is_an_error(tmp_path: Path) -> None:
    checkpoint = holdfast.save(tmp_path / "r", {"m": {"x": np.zeros(50_000)}})
    ((key, start, _),) = checkpoint.reader.places("m/x")
    raw = bytearray((tmp_path / "r" / key).read_bytes())
    raw[start + 7] = 1
    (tmp_path / "r" / key).write_bytes(raw)
    with pytest.raises(holdfast.HoldfastError, match="tensor 'x'"):
        describe(checkpoint.reader, "m/x")
