"""`sampler.loader()`: exact batches, augmentation included, whatever the workers do ahead of the loop."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from noisy_dataset import Brittle, Columnar, Noisy, add_offset, as_bytes, noisy_collate
from torch.utils.data import DataLoader, IterableDataset, Subset

from holdfast.core.errors import StateError
from holdfast.state.adapters.torch_loader import ResumableLoader, SeededDataset
from holdfast.state.sampler import ResumableSampler

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LENGTH, BATCH = 23, 4
WORKERS = [
    {},
    {"num_workers": 1, "in_order": False},
    {"num_workers": 2},
    {"num_workers": 2, "prefetch_factor": 1},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
]


def build(loader: dict[str, Any] | None = None, **sampler: Any) -> ResumableLoader[Any]:
    options = {"batch_size": BATCH, "seed": 6, **sampler}
    return ResumableSampler(Noisy(LENGTH), **options).loader(**(loader or {}))


def reference(epochs: int = 2, **sampler: Any) -> tuple[list[list[bytes]], list[dict[str, Any]]]:
    """Return each epoch's batches, and the state before and after each batch of the first epoch."""
    loader = build(**sampler)
    states = [loader.state_dict()]
    first = []
    for batch in loader:
        first += as_bytes([batch])
        states.append(loader.state_dict())
    return [first, *(as_bytes(loader) for _ in range(epochs - 1))], states  # type: ignore[return-value]


def global_rng() -> tuple[object, ...]:
    legacy = np.random.get_state()
    return random.getstate(), legacy[1].tobytes(), legacy[2:], torch.get_rng_state().numpy().tobytes()  # type: ignore[union-attr,index]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", WORKERS, ids=str)
def test_resume_at_every_batch_gives_the_exact_tail(workers: dict[str, Any], drop_last: bool) -> None:
    (first, second), states = reference(drop_last=drop_last)
    assert len(first) == len(states) - 1 == (5 if drop_last else 6)
    reused = build(workers, drop_last=drop_last)
    for done, state in enumerate(states):
        fresh = build(workers, drop_last=drop_last) if done in (0, 3) else reused
        fresh.load_state_dict(state)
        assert as_bytes(fresh) == first[done:]
        if fresh is not reused:  # and the next epoch, from the same workers where they persist
            assert as_bytes(fresh) == second


@pytest.mark.parametrize(
    "workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str
)
def test_state_counts_what_was_handed_out_not_what_was_prefetched(workers: dict[str, Any]) -> None:
    loader = build(workers)
    _, states = reference()
    iterator = iter(loader)
    assert loader.state_dict() == states[0]
    for state in states[1:]:
        next(iterator)
        assert loader.state_dict() == state
    assert next(iterator, None) is None
    assert next(iterator, None) is None
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)


def test_two_resumes_in_one_epoch_with_workers() -> None:
    (first, second), _ = reference()
    got: list[bytes] = []
    state = None
    for steps in (2, 3, 4):
        loader = build({"num_workers": 2})
        if state is not None:
            loader.load_state_dict(state)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for batch in itertools.islice(batches, steps):
            got += as_bytes([batch])
            state = loader.state_dict()
    assert got == (first + second)[:9]


def test_nested_epoch_loops_resume_at_any_step_as_if_uninterrupted() -> None:
    def run(loader: ResumableLoader[Any], stop: int | None) -> Iterator[tuple[bytes, dict[str, Any]]]:
        steps = itertools.count(1)
        while loader.state_dict()["epoch"] < 3:
            for batch in loader:
                yield as_bytes([batch])[0], loader.state_dict()  # type: ignore[misc]
                if next(steps) == stop:
                    return

    whole = [batch for batch, _ in run(build(), None)]
    assert len(whole) == len(set(whole)) == 18
    for stop in range(1, 18):
        head = list(run(build(), stop))
        loader = build()
        loader.load_state_dict(head[-1][1])
        assert [batch for batch, _ in head] + [batch for batch, _ in run(loader, None)] == whole


def test_augmentation_is_the_same_in_another_world() -> None:
    def rows(world_size: int, batch_size: int, workers: int) -> dict[int, bytes]:
        found = {}
        for rank in range(world_size):
            sampler = ResumableSampler(Noisy(24), batch_size=batch_size, rank=rank, world_size=world_size)
            for batch in sampler.loader(num_workers=workers):
                found.update({int(row[0]): row.numpy().tobytes() for row in batch})
        return found

    alone = rows(1, 4, 0)
    assert len(alone) == 24
    assert rows(2, 3, 2) == alone
    assert rows(3, 2, 0) == alone


def test_random_collate_is_exact_too() -> None:
    batches = [as_bytes(build({"num_workers": n, "collate_fn": noisy_collate})) for n in (0, 2)]
    assert batches[0] == batches[1]
    assert len(set(batches[0])) == 6


def test_augmentation_differs_by_sample_and_epoch() -> None:
    loader = build()
    noise = [float(x) for _ in range(2) for batch in loader for x in batch[:, 1:].flatten()]
    assert len(set(noise)) == len(noise) == 2 * LENGTH * 3


@pytest.mark.parametrize("workers", WORKERS[:1] + WORKERS[2:5:2], ids=str)
def test_neither_iter_nor_next_shifts_the_main_process_rng(workers: dict[str, Any]) -> None:
    loader = build({**workers, "collate_fn": noisy_collate})
    torch.manual_seed(1)
    before = global_rng()
    iterator = iter(loader)
    assert global_rng() == before
    next(iterator)
    assert global_rng() == before
    assert sum(1 for _ in iterator) == 5
    assert global_rng() == before


def test_rng_is_preserved_when_a_sample_fails() -> None:
    sampler = ResumableSampler(Brittle(8, bad=1), batch_size=2, shuffle=False)
    before = global_rng()
    with pytest.raises(ValueError, match="sample 1 is broken"):
        next(iter(sampler.loader()))
    assert global_rng() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_batch_counts_once_the_loop_goes_on(workers: int) -> None:
    sampler = ResumableSampler(Brittle(10, bad=3), batch_size=2, shuffle=False)
    iterator = iter(sampler.loader(num_workers=workers))
    next(iterator)
    with pytest.raises(ValueError, match="sample 3 is broken"):
        next(iterator)
    assert sampler.position == 2  # a resume from here tries it again
    assert next(iterator)[:, 0].tolist() == [4, 5]
    assert sampler.position == 6
    assert next(iterator)[:, 0].tolist() == [6, 7]
    assert sampler.position == 8


def test_seeking_reads_no_skipped_sample() -> None:
    head = build()
    for _ in itertools.islice(head, 4):
        pass
    dataset = Noisy(LENGTH)
    loader = ResumableSampler(dataset, batch_size=BATCH, seed=6).loader()
    loader.load_state_dict(head.state_dict())
    assert dataset.reads == []
    rows = [int(row[0]) for batch in loader for row in batch]
    assert dataset.reads == rows
    assert len(rows) == LENGTH - 4 * BATCH


@pytest.mark.parametrize(
    "workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str
)
def test_an_iterator_older_than_the_restore_refuses(
    workers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The seconds that torch gives each worker of an iterator that is let go in the middle.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    (first, _), states = reference()
    loader = build(workers)
    stale = iter(loader)
    next(stale)
    loader.load_state_dict(states[3])
    with pytest.raises(StateError, match=r"out of date.*load_state_dict.*create the iterator after"):
        next(stale)
    assert loader.state_dict() == states[3]
    fresh = iter(loader)
    assert as_bytes([next(fresh)]) == first[3:4]
    with pytest.raises(StateError, match="out of date"):
        next(stale)
    assert as_bytes(fresh) == first[4:]


def test_plain_loader_counts_without_workers_and_refuses_with_them() -> None:
    sampler = ResumableSampler(Noisy(LENGTH), batch_size=BATCH, seed=6)
    iterator = iter(DataLoader(sampler._dataset, batch_sampler=sampler))  # type: ignore[arg-type,var-annotated]
    next(iterator)
    assert sampler.state_dict()["position"] == 4
    sampler.set_epoch(1)
    iterator = iter(DataLoader(sampler._dataset, batch_sampler=sampler, num_workers=2))  # type: ignore[arg-type]
    next(iterator)
    with pytest.raises(StateError, match=r"plain DataLoader.*sampler\.loader\("):
        sampler.state_dict()
    iter(sampler)  # nothing has been sent yet, but this loop will do as the last one did
    with pytest.raises(StateError, match="plain DataLoader"):
        sampler.state_dict()
    del iterator
    next(iter(sampler.loader(num_workers=2)))  # a loader that counts makes it known again
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (2, 4)


def test_a_restore_makes_an_unknown_position_known() -> None:
    sampler = ResumableSampler(Noisy(LENGTH), batch_size=BATCH, seed=6)
    state = sampler.state_dict()
    next(iter(DataLoader(sampler._dataset, batch_sampler=sampler, num_workers=1)))  # type: ignore[arg-type]
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state


def test_a_copy_of_the_loader_that_nobody_counts_refuses() -> None:
    loader = build()
    next(iter(loader))
    copy: DataLoader[Any] = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler)  # as frameworks do
    with pytest.raises(StateError, match="iterate the loader itself"):
        next(iter(copy))


@pytest.mark.parametrize("workers", [0, 2])
def test_columnar_datasets_may_read_whole_batches(workers: int) -> None:
    sampler = ResumableSampler(Columnar(8), batch_size=4)
    whole = list(sampler.loader(num_workers=workers, batched_reads=True))
    assert all(len(batch[:, 1].unique()) == 1 for batch in whole)  # one draw per batch ...
    sampler.set_epoch(0)
    assert as_bytes(sampler.loader(batched_reads=True)) == as_bytes(whole)  # ... and an exact one
    with pytest.raises(StateError, match="batched_reads: expected a __getitems__"):
        build({"batched_reads": True})


def test_a_subset_is_seeded_per_sample() -> None:
    subset = Subset(Noisy(40), range(10, 10 + LENGTH))
    loader = ResumableSampler(subset, batch_size=BATCH, seed=6).loader()  # type: ignore[arg-type]
    expected = torch.cat(list(build()))
    assert torch.equal(torch.cat(list(loader)) - torch.tensor([10.0, 0, 0, 0]), expected)


def test_worker_init_fn_finds_its_dataset() -> None:
    rows = torch.cat(list(build({"num_workers": 2, "worker_init_fn": add_offset})))
    assert torch.equal(rows - torch.tensor([1000.0, 0, 0, 0]), torch.cat(list(build())))


def test_worker_base_seeds_differ_by_epoch_and_by_point_of_resume() -> None:
    loader = build({"num_workers": 1, "collate_fn": worker_seed})
    seeds = [next(iter(loader)) for _ in range(2)]
    again = build({"num_workers": 1, "collate_fn": worker_seed})
    assert [next(iter(again)) for _ in range(2)] == seeds
    state = again.state_dict()
    again.load_state_dict({**state, "epoch": 0, "position": 4})
    assert len({*seeds, next(iter(again))}) == 3
    again.load_state_dict({**state, "epoch": 0, "position": 0})
    assert next(iter(again)) == seeds[0]


def worker_seed(_: object) -> int:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    return info.seed


def test_a_generator_of_the_user_is_used() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = build({"generator": generator, "num_workers": 1})
    assert as_bytes(loader) == reference()[0][0]
    assert loader.generator is generator
    before = global_rng()
    next(iter(build({"generator": torch.default_generator})))
    assert global_rng() == before


def test_the_loader_is_the_data_state() -> None:
    loader = build()
    assert len(loader) == 6
    assert isinstance(loader, DataLoader)
    loader.set_epoch(3)
    next(iter(loader))
    assert loader.batch_sampler.sampler.state_dict() == loader.state_dict()  # type: ignore[union-attr]
    assert loader.state_dict()["epoch"] == 3
    assert isinstance(loader.dataset, SeededDataset)
    assert isinstance(loader.dataset.wrapped, Noisy)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"batch_size": 4}, "batch_size, which the sampler decides"),
        ({"shuffle": True}, "shuffle, which the sampler decides"),
        ({"num_workers": 2, "in_order": False}, "expected in_order=True"),
        ({"dataset": Noisy(5)}, "expected a dataset of 23 samples.*found 5"),
    ],
)
def test_loader_refuses(options: dict[str, Any], found: str) -> None:
    with pytest.raises(StateError, match=found):
        build(options)


def test_loader_refuses_a_length_and_an_iterable_dataset() -> None:
    with pytest.raises(StateError, match="found only a length"):
        ResumableSampler(5, batch_size=1).loader()

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

        def __len__(self) -> int:
            return 5

    with pytest.raises(StateError, match="StatefulDataLoader"):
        ResumableSampler(Stream(), batch_size=1)
    with pytest.raises(StateError, match="StatefulDataLoader"):
        ResumableSampler(5, batch_size=1).loader(Stream())


def test_rank_and_world_size_come_from_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    sampler = ResumableSampler(30, batch_size=2, shuffle=False)
    assert (sampler.rank, sampler.world_size) == (1, 3)
    assert next(iter(sampler)) == [2, 3]


def test_pinned_memory_counts_alike() -> None:
    with (
        pytest.warns(UserWarning, match="pin_memory")
        if not torch.accelerator.is_available()
        else contextlib.nullcontext()
    ):
        loader = build({"pin_memory": True, "num_workers": 2})
        _, states = reference()
        for state, _batch in zip(states[1:], loader, strict=False):
            assert loader.state_dict() == state
