"""float32 rounds to bfloat16 as IEEE 754 says, and as torch does."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.format.rounding import is_rounded, rounded

torch = pytest.importorskip("torch")


def every_upper_half() -> np.ndarray:
    """Each upper half with the lower halves at which something changes: none, below, at and above the middle."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    return np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])


def test_every_upper_half_rounds_as_in_torch() -> None:
    bits = every_upper_half()
    floats = torch.from_numpy(bits.view(np.float32).copy())
    want = floats.bfloat16().view(torch.int16).numpy().view(np.uint16).copy()
    nan = np.isnan(bits.view(np.float32))
    want[nan] = 0x7FC0  # torch has several, by the instructions that it uses
    assert np.array_equal(np.frombuffer(rounded(bits.tobytes()), np.uint16), want)
    assert is_rounded(bits.tobytes(), want.tobytes())


@pytest.mark.parametrize("at", [0, 1 << 18, -1])
def test_one_other_bit_is_seen(at: int) -> None:
    bits = every_upper_half()
    data = np.frombuffer(rounded(bits.tobytes()), np.uint16).copy()
    data[at] ^= 1
    assert not is_rounded(bits.tobytes(), data.tobytes())


def test_nothing_rounds_to_nothing() -> None:
    assert rounded(b"") == b""
    assert is_rounded(b"", b"")
