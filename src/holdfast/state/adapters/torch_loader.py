"""A torch DataLoader that counts what the training loop was handed, with exact augmentation randomness."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from holdfast.core.errors import StateError

__all__ = ["Pass", "PositionedSampler", "ResumableLoader", "SeededDataset", "preserved_rng"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_DECIDED_BY_SAMPLER = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")


class Pass(Protocol):
    """One walk over the rest of an epoch: draws batches, and counts those that were handed out."""

    @property
    def worker_seed(self) -> int: ...
    def batches(self) -> Iterator[list[int]]: ...
    def check(self) -> None: ...
    def advance(self) -> None: ...
    def finish(self) -> None: ...


class PositionedSampler(Protocol):
    """What the loader needs of `holdfast.ResumableSampler`."""

    batch_size: int
    drop_last: bool

    def __len__(self) -> int: ...
    def begin_pass(self, *, tracked: bool) -> Pass: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state_dict: Mapping[str, object]) -> None: ...


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the global generators of python, numpy and torch (CPU) as they were; about 0.1 ms."""
    python, legacy = random.getstate(), np.random.get_state(legacy=False)
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.default_generator.set_state(torch_state)


class SeededDataset(Dataset[T]):
    """Seed the global generators of python, numpy and torch (CPU) before each sample, from its draw.

    An index with a `sample_seed` (`holdfast.SampleIndex`) seeds; any other is passed on as it is. What a
    sample's augmentation draws then depends on (seed, epoch, position) alone. Generators that the dataset
    owns, or that are seeded from the system such as `numpy.random.default_rng()`, are not seeded: derive them
    from `index.sample_seed`. Attributes are read from and written to `wrapped`, so a `worker_init_fn` finds
    the dataset it knows.

    In the main process wrap the access in `preserved_rng()`, as `ResumableLoader` does.
    """

    wrapped: Dataset[T]

    def __init__(self, wrapped: Dataset[T], *, batched_reads: bool = False) -> None:
        if batched_reads and not hasattr(wrapped, "__getitems__"):
            raise StateError(
                f"batched_reads: expected a __getitems__ method, found {type(wrapped).__name__}; drop it"
            )
        self.__dict__.update(wrapped=wrapped, batched_reads=batched_reads)

    def __getitem__(self, index: int) -> T:
        _seed_for(index)
        return self.wrapped[index]

    def __getitems__(self, indices: Sequence[int]) -> list[T]:
        if not self.__dict__["batched_reads"]:
            return [self[index] for index in indices]
        _seed_for(indices[0])
        return cast("list[T]", self.wrapped.__getitems__(indices))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.wrapped)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "wrapped":  # unpickling asks before `wrapped` is there
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.wrapped, name, value)


class ResumableLoader(DataLoader[T_co]):
    """Load a map-style dataset in a `ResumableSampler`'s order and count what was handed out.

    Built by `sampler.loader()`. A batch counts when the loop receives it, whatever workers have prefetched; a
    restore seeks to the next one and loads nothing that was skipped. Randomness inside the dataset and
    `collate_fn` is the same for every number of workers, prefetch and world size, and does not touch the main
    process's generators; nor does `iter()`.

    `options` are DataLoader's. With `batched_reads=True` a dataset's own `__getitems__` reads whole batches
    (faster for columnar data); randomness is then exact per batch, so no longer independent of batch and
    world size.

    Raises StateError for an option that the sampler decides, for `in_order=False` with several workers (what
    was handed out is then no single position), and from an iterator that is older than the last restore.
    """

    def __init__(
        self, dataset: object, sampler: PositionedSampler, *, batched_reads: bool = False, **options: object
    ) -> None:
        _check_options(options)
        self._position, self._draws = sampler, _Draws(sampler)
        self._own_generator = torch.Generator() if options.get("generator") is None else None
        keywords = cast("dict[str, Any]", options)
        if self._own_generator is not None:
            keywords["generator"] = self._own_generator
        seeded = SeededDataset(cast("Dataset[T_co]", dataset), batched_reads=batched_reads)
        super().__init__(seeded, batch_sampler=self._draws, **keywords)

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # the base names its private class
        walk = self._position.begin_pass(tracked=True)
        if self._own_generator is not None:  # anew per epoch and point of resume: no worker repeats itself
            self._own_generator.manual_seed(walk.worker_seed)
        with preserved_rng(), self._draws.of(walk):
            batches = super().__iter__()
        return _HandedOut(batches, walk, in_this_process=self.num_workers == 0)

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` run `epoch`, as the sampler's method does."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> Mapping[str, object]:
        """Return the sampler's state: the position after the last batch that was handed out."""
        return self._position.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Seek to the position of `state_dict`; create the iterator after this."""
        self._position.load_state_dict(state_dict)


class _HandedOut(Iterator[T]):
    """Count each batch at the moment it is handed out."""

    def __init__(self, batches: Iterator[T], walk: Pass, *, in_this_process: bool) -> None:
        self._batches: Iterator[T] | None = batches
        self._pass = walk
        self._in_this_process = in_this_process
        self._failed = 0

    def __next__(self) -> T:
        if self._batches is None:
            raise StopIteration
        self._pass.check()
        try:
            with preserved_rng() if self._in_this_process else contextlib.nullcontext():
                batch = next(self._batches)
        except StopIteration:
            self._batches = None
            self._pass.finish()
            raise
        except Exception:  # DataLoader goes on with the batch after: counted once the loop goes on too
            self._failed += 1
            raise
        for _ in range(1 + self._failed):
            self._pass.advance()
        self._failed = 0
        return batch


class _Draws:
    """The batch sampler that DataLoader sees: draws from the loader's pass, and does not count."""

    def __init__(self, sampler: PositionedSampler) -> None:
        self.sampler = sampler  # frameworks look for `batch_sampler.sampler.set_epoch`
        self.batch_size, self.drop_last = sampler.batch_size, sampler.drop_last
        self._pass: Pass | None = None

    @contextlib.contextmanager
    def of(self, walk: Pass) -> Iterator[None]:
        self._pass = walk
        try:
            yield
        finally:
            self._pass = None

    def __iter__(self) -> Iterator[list[int]]:
        if self._pass is None:
            raise StateError(
                "batch_sampler: expected to be drawn by its ResumableLoader, found another iteration, which "
                "no one would count; iterate the loader itself, or build one with sampler.loader(...)"
            )
        return self._pass.batches()

    def __len__(self) -> int:
        return len(self.sampler)


def _seed_for(index: int) -> None:
    seed = getattr(index, "sample_seed", None)
    if seed is None:
        return
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed: it queues a lazy CUDA seed per call. The CPU engine takes 32 bits: not numpy's.
    torch.default_generator.manual_seed(seed >> 32)


def _check_options(options: Mapping[str, object]) -> None:
    for name in _DECIDED_BY_SAMPLER:
        if name in options:
            raise StateError(
                f"loader: expected DataLoader options, found {name}, which the sampler decides; set "
                "batch_size, shuffle and drop_last on the ResumableSampler"
            )
    workers = options.get("num_workers", 0)
    if not options.get("in_order", True) and isinstance(workers, int) and workers > 1:
        raise StateError(
            f"loader: expected in_order=True, found False with {workers} workers: batches would be handed "
            "out as they come, which is no position to resume from; leave in_order alone, or use one worker"
        )
