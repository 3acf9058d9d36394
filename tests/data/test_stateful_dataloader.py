"""torchdata's StatefulDataLoader needs nothing from us; these tests say what it can and cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from noisy_dataset import Noisy

from holdfast.core.errors import StateError
from holdfast.state.sampler import ResumableSampler

stateful = pytest.importorskip("torchdata.stateful_dataloader")
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:'set_vital' is deprecated:UserWarning"
    ),  # torchdata 0.11, torch >= 2.13
]


def build(workers: int, *, generator: bool = False) -> Any:
    own = torch.Generator().manual_seed(3) if generator else None
    return stateful.StatefulDataLoader(
        Noisy(23), batch_size=4, shuffle=True, num_workers=workers, generator=own
    )


def indices(batches: Any) -> list[list[int]]:
    return [[int(row[0]) for row in batch] for batch in batches]


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 2, 6])
def test_mid_epoch_state_gives_the_remaining_batches(workers: int, done: int, generator: bool) -> None:
    torch.manual_seed(0)
    loader = build(workers, generator=generator)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = loader.state_dict()
    tail, second = indices(iterator), indices(loader)
    assert len(tail) == 6 - done
    torch.manual_seed(99)
    again = build(workers, generator=generator)
    again.load_state_dict(state)
    assert indices(again) == tail
    if generator and workers == 0:
        return  # torchdata 0.11 goes on in another order after that: a limit worth knowing, not a promise
    assert indices(again) == second


def test_seeking_reads_no_skipped_sample() -> None:
    loader = build(0)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    again = build(0)
    again.load_state_dict(loader.state_dict())
    next(iter(again))
    assert len(again.dataset.reads) == 4


def test_our_sampler_inside_it_works_without_workers_and_refuses_with_them() -> None:
    def ours(workers: int) -> Any:
        sampler = ResumableSampler(Noisy(23), batch_size=4, seed=6)
        return stateful.StatefulDataLoader(Noisy(23), batch_sampler=sampler, num_workers=workers)

    loader = ours(0)
    iterator = iter(loader)
    next(iterator)
    state, tail = loader.state_dict(), indices(iterator)
    again = ours(0)
    again.load_state_dict(state)
    assert indices(again) == tail
    with pytest.raises(StateError, match=r"sampler\.loader"):
        indices(ours(2))
