"""The order of an epoch is frozen: a checkpoint written today must find the same samples in ten years."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.state.sampler import ResumableSampler, SampleIndex, epoch_order

# Never regenerate these: if one fails, the code is wrong, or needs a new name in `sampler.ORDER`.
GOLDEN = {
    (0, 0, 10): [3, 4, 8, 9, 6, 0, 5, 7, 2, 1],
    (7, 3, 10): [7, 3, 5, 6, 9, 8, 1, 0, 2, 4],
    (2**64 - 1, 2**63, 5): [3, 1, 0, 2, 4],
    (0, 0, 1): [0],
    (0, 0, 2): [0, 1],
}
GOLDEN_CHECKSUM_OF_A_MILLION = 249981978327118989


@pytest.mark.parametrize("key", list(GOLDEN))
def test_golden_order(key: tuple[int, int, int]) -> None:
    assert epoch_order(*key).tolist() == GOLDEN[key]


def test_golden_order_of_a_million() -> None:
    order = epoch_order(42, 1, 1_000_000)
    weights = np.arange(1_000_000, dtype=np.uint64)
    assert int((order.astype(np.uint64) * weights).sum()) == GOLDEN_CHECKSUM_OF_A_MILLION


def test_golden_sample_seeds() -> None:
    assert SampleIndex(5, 17, (42, 1)).sample_seed == 4377651547545538399
    assert SampleIndex(6, 17, (42, 1)).sample_seed == 4377651547545538399  # the draw counts, not the sample


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(1, 300),
)
def test_order_is_a_permutation(seed: int, epoch: int, length: int) -> None:
    assert sorted(epoch_order(seed, epoch, length).tolist()) == list(range(length))


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated() -> None:
    n = 2000
    base = epoch_order(0, 0, n)
    for other in (epoch_order(0, 1, n), epoch_order(1, 0, n), epoch_order(1, 1, n), np.arange(n)):
        assert int((base == other).sum()) < 12  # about 1 expected
        assert abs(float(np.corrcoef(base, other)[0, 1])) < 0.12


def test_order_is_uniform_over_permutations() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        key = tuple(epoch_order(9, epoch, 4).tolist())
        counts[key] = counts.get(key, 0) + 1
    chi_square = sum((count - 250) ** 2 / 250 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 50  # 23 degrees of freedom: p = 0.001


def test_index_is_an_int_and_survives_pickle_and_copy() -> None:
    index = SampleIndex(5, 17, (42, 1))
    assert index == 5
    assert [10, 11, 12, 13, 14, 15][index] == 15
    assert {5: "x"}[index] == "x"
    for other in (pickle.loads(pickle.dumps(index)), copy.copy(index), copy.deepcopy(index)):
        assert (int(other), other.seed, other.epoch, other.position) == (5, 42, 1, 17)
        assert other.sample_seed == index.sample_seed


def test_a_batch_is_cheap_to_send_to_a_worker() -> None:
    batch = next(iter(ResumableSampler(10_000, batch_size=256)))
    assert len(pickle.dumps(batch)) < 256 * 16
