"""An exact, seekable data position for map-style datasets: (seed, epoch, samples consumed by all ranks).

The order of an epoch is a pure function of (seed, epoch, length), and the position in it is one global
number. So a resume seeks instead of replaying, and goes on under another world size, batch size or number of
workers.
"""

from __future__ import annotations

import hashlib
import operator
import struct
import sys
from collections.abc import Iterator, Mapping, Sized
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import MissingDependency, StateError
from holdfast.core.units import format_count

if TYPE_CHECKING:
    from holdfast.state.adapters.torch_loader import ResumableLoader

__all__ = ["EpochPass", "ResumableSampler", "SampleIndex", "epoch_order"]

ORDER = "philox4x64-sort"  # names `epoch_order` in a checkpoint; another algorithm takes another name
_WORD = 1 << 64


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """Compute the shuffled order of one epoch: a permutation of `range(length)`, 8 bytes per sample.

    Sample i gets the i-th word of the Philox4x64-10 stream of key (seed, epoch), counter 0 (Salmon et al.,
    SC'11); samples are sorted by that word shifted left by `bit_length(length - 1)`, ties by i. The raw
    stream is used because numpy may change `Generator.permutation` (NEP 19). Frozen by
    `tests/data/test_order.py`: it never changes.
    """
    bits = (length - 1).bit_length()
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(length)
    keys <<= np.uint64(bits)
    keys |= np.arange(length, dtype=np.uint64)  # unique keys: every sort algorithm gives the same order
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.view(np.int64)


class SampleIndex(int):
    """Be a dataset index that knows which draw of the run it is: its seed, epoch and global position.

    It is an int wherever one is expected. Positions count samples from the start of the epoch; a sample that
    pads the last batch has a position >= the dataset's length.
    """

    position: int
    _origin: tuple[int, int]
    _pass: EpochPass | None

    def __new__(
        cls, value: int, position: int, origin: tuple[int, int], drawn_by: EpochPass | None = None
    ) -> SampleIndex:
        self = super().__new__(cls, value)
        self.position = position
        self._origin = origin  # one tuple for a whole pass, so that pickle writes it once per batch
        self._pass = drawn_by
        return self

    @property
    def seed(self) -> int:
        """Return the sampler's seed."""
        return self._origin[0]

    @property
    def epoch(self) -> int:
        """Return the epoch, counted from 0."""
        return self._origin[1]

    @property
    def sample_seed(self) -> int:
        """Return 64 bits that are the same for this draw in every process, layout and resume."""
        return _hash64(b"holdfast.sample", *self._origin, self.position)

    def __reduce__(self) -> tuple[type[SampleIndex], tuple[int, int, tuple[int, int]]]:
        if self._pass is not None:  # bound for another process: drawn is no longer the same as seen
            self._pass.drawn_ahead = True
        return SampleIndex, (int(self), self.position, self._origin)

    def __copy__(self) -> SampleIndex:
        return self

    def __deepcopy__(self, memo: object) -> SampleIndex:
        return self


class EpochPass:
    """One walk over what is left of an epoch; only the sampler's newest pass may move the position."""

    def __init__(self, sampler: ResumableSampler, *, tracked: bool) -> None:
        self._sampler = sampler
        self._tracked = tracked
        self._epoch = sampler.epoch
        self._start = sampler.position
        before = sampler._counted_by
        self.drawn_ahead: bool = not tracked and before is not None and before.drawn_ahead

    @property
    def worker_seed(self) -> int:
        """Return 64 bits that differ for each epoch and each point of resume, for worker base seeds."""
        return _hash64(b"holdfast.worker", self._sampler.seed, self._epoch, self._start)

    def batches(self) -> Iterator[list[int]]:
        """Draw this rank's batches without moving the position; may run ahead of the training loop."""
        sampler, position = self._sampler, self._start
        order = epoch_order(sampler.seed, self._epoch, sampler.length) if sampler.shuffle else None
        origin, marked = (sampler.seed, self._epoch), None if self._tracked else self
        while count := sampler._share(position):
            first = position + sampler.rank * count
            places = np.arange(first, first + count) % sampler.length
            values = (places if order is None else order[places]).tolist()
            yield [SampleIndex(value, first + i, origin, marked) for i, value in enumerate(values)]
            position += sampler.global_batch_size

    def check(self) -> None:
        """Raise StateError unless this is the sampler's newest pass."""
        if self._sampler._pass is not self:
            raise StateError(
                "this data iterator is out of date: expected the one made by the last iter(), found that the "
                f"position has been moved since by {self._sampler._moved_by}; create the iterator after that"
            )

    def advance(self) -> None:
        """Count one batch as handed to the training loop."""
        sampler = self._sampler
        sampler._position = min(sampler._position + sampler.global_batch_size, sampler.length)
        sampler._unfinished = True

    def finish(self) -> None:
        """Close the epoch: the position becomes the start of the next one."""
        self._sampler._move(self._epoch + 1, 0, by="the end of the epoch")


class ResumableSampler:
    """Draw batches of indices, in an order that a checkpoint can continue exactly; a torch batch sampler.

    `dataset_or_length` is a map-style dataset or its number of samples; `seed` is in [0, 2**64). A global
    batch is `batch_size * world_size` samples; rank r takes its r-th contiguous part. The last incomplete one
    is dropped with `drop_last`; else every rank gets the same number of samples, and the last ranks wrap
    round to the epoch's start. `rank` and `world_size` come from `torch.distributed` when it is initialised,
    else 0 and 1. A `fingerprint` (any string naming the data's version) is stored, and a restore under
    another one is refused.

    The position counts the batches handed to the training loop. Plain `DataLoader` workers draw ahead of it,
    so build the loader with `sampler.loader(...)`; a prefetcher of your own around either one is not seen and
    not counted.

    The first `iter()` after construction or a restore starts at the position. A pass that ends moves to the
    next epoch; `iter()` after a pass that was broken off starts the next epoch too. A state saved after an
    epoch's last batch resumes with an empty rest of that epoch, so nested epoch loops run on as if
    uninterrupted.

    Raises StateError for arguments that make no sense, or leave an epoch without a batch.
    """

    def __init__(
        self,
        dataset_or_length: Sized | int,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self._dataset = None if isinstance(dataset_or_length, int | np.integer) else dataset_or_length
        self.length = _length_of(dataset_or_length)
        # Of numpy they would be stored as such, and a position that follows from them too.
        self.seed, self.batch_size = _integer("seed", seed), _integer("batch_size", batch_size)
        self.shuffle, self.drop_last, self.fingerprint = bool(shuffle), bool(drop_last), fingerprint
        self.rank, self.world_size = _place(rank, world_size)
        self._pass: EpochPass | None = None
        self._counted_by: EpochPass | None = None
        self._move(0, 0, by="construction")
        self._check_arguments()

    def _check_arguments(self) -> None:
        if not 0 <= self.seed < _WORD:
            raise StateError(f"seed: expected 0 <= seed < 2**64, found {self.seed}; pass another seed")
        if self.batch_size < 1:
            raise StateError(f"batch_size: expected at least 1, found {self.batch_size}; it counts per rank")
        if not self._share(0):
            batch = format_count(self.global_batch_size, "sample")
            raise StateError(
                f"dataset: expected at least one global batch of {batch}, found {self.length} with "
                f"drop_last={self.drop_last}; use a smaller batch_size or drop_last=False"
            )

    @property
    def global_batch_size(self) -> int:
        """Return the samples that all ranks together take per step."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int:
        """Return the epoch of the position, counted from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """Return the samples of this epoch that all ranks together have been handed, in [0, length]."""
        return self._position

    @property
    def remaining(self) -> int:
        """Return the batches that each rank has left in this epoch."""
        return self._batches(self.length - self._position)

    def __len__(self) -> int:
        """Return the batches of a full epoch for each rank, wherever the position is."""
        return self._batches(self.length)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches from the position on, counting each one as it is yielded."""
        return _counted(self.begin_pass(tracked=False))

    def begin_pass(self, *, tracked: bool) -> EpochPass:
        """Start a pass at the position and outdate any earlier one; if `tracked`, the caller counts."""
        if self._unfinished:
            self._move(self._epoch + 1, 0, by="a newer iter()")
        self._moved_by = "a newer iter()"
        self._pass = self._counted_by = EpochPass(self, tracked=tracked)
        return self._pass

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` run `epoch`: from the position if that is the current epoch, else from 0."""
        if epoch != self._epoch:
            if not 0 <= epoch < _WORD:
                raise StateError(f"epoch: expected 0 <= epoch < 2**64, found {epoch}; count epochs from 0")
            self._move(epoch, 0, by="set_epoch()")
        self._unfinished = False

    def loader(
        self, dataset: Sized | None = None, *, batched_reads: bool = False, **dataloader_kwargs: object
    ) -> ResumableLoader[Any]:
        """Build a torch DataLoader that keeps this position right whatever its workers prefetch.

        `dataset` defaults to the one given to the sampler. `dataloader_kwargs` are
        `torch.utils.data.DataLoader`'s, without those the sampler decides; for `batched_reads` see
        `ResumableLoader`. Raises StateError where the two do not fit, MissingDependency without torch.
        """
        try:
            from holdfast.state.adapters.torch_loader import ResumableLoader  # torch is optional
        except ModuleNotFoundError as missing:
            raise MissingDependency(
                "sampler.loader() needs torch; pip install 'holdfast[torch]'"
            ) from missing
        source = self._dataset if dataset is None else dataset
        if source is None:
            raise StateError("loader: expected a dataset, found only a length; call loader(dataset, ...)")
        if _length_of(source) != self.length:
            raise StateError(
                f"loader: expected a dataset of {format_count(self.length, 'sample')}, as the sampler has, found "
                f"{len(source)}; build the sampler from this dataset"
            )
        return ResumableLoader(source, self, batched_reads=batched_reads, **dataloader_kwargs)

    def state_dict(self) -> dict[str, int | bool | str | None]:
        """Return the position and what it depends on, as plain values; every rank has the same.

        Raises StateError when a plain DataLoader's workers have drawn ahead, so that the position is unknown.
        """
        if self._counted_by is not None and self._counted_by.drawn_ahead:
            raise StateError(
                "data position: expected to count what the loop was handed, found indices that a plain "
                "DataLoader sent ahead to its workers; build the loader with sampler.loader(dataset, ...)"
            )
        keys = ("epoch", "position", *_MUST_MATCH, "batch_size", "world_size", "drop_last")
        return {"order": ORDER, **{key: getattr(self, key) for key in keys}}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Continue at the position of `state_dict`; iterators made before this are out of date and say so.

        batch_size, world_size and drop_last stay as constructed. Raises StateError, and changes nothing, when
        the order cannot be continued: another length, seed, shuffle or fingerprint, or not a state of this
        class.
        """
        epoch, position = _checked(state_dict, self)
        self._counted_by = None
        self._move(epoch, position, by="load_state_dict()")

    def _move(self, epoch: int, position: int, *, by: str) -> None:
        self._epoch, self._position, self._moved_by = epoch, position, by
        self._pass, self._unfinished = None, False

    def _share(self, position: int) -> int:
        """Return the samples each rank takes in the global batch at `position`; 0 at the end of the epoch."""
        left = self.length - position
        if left >= self.global_batch_size:
            return self.batch_size
        return 0 if self.drop_last or left <= 0 else -(-left // self.world_size)

    def _batches(self, samples: int) -> int:
        size = self.global_batch_size
        return samples // size if self.drop_last else -(-samples // size)


_MUST_MATCH = {
    "length": "restore with the dataset the checkpoint was made with",
    "seed": "pass the same seed to ResumableSampler",
    "shuffle": "pass the same shuffle to ResumableSampler",
    "fingerprint": "restore with the dataset version the checkpoint was made with",
}


def _counted(walk: EpochPass) -> Iterator[list[int]]:
    for batch in walk.batches():
        walk.check()
        walk.advance()
        yield batch
    walk.check()
    walk.finish()


def _checked(state: Mapping[str, object], sampler: ResumableSampler) -> tuple[int, int]:
    order = state.get("order")
    if order != ORDER:
        raise StateError(
            f"data position: expected a ResumableSampler state of order {ORDER!r}, found {order!r}; restore "
            "what a ResumableSampler saved, with a holdfast that knows this order"
        )
    for key, advice in _MUST_MATCH.items():
        mine, theirs = getattr(sampler, key), state.get(key)
        if key == "fingerprint" and None in (mine, theirs):
            continue  # one side does not know its data's version
        if mine != theirs:
            raise StateError(
                f"data position: expected {key} {mine!r} (this sampler), found {theirs!r} (the "
                f"checkpoint), so its order would not go on; {advice}, or start anew: put the data under a "
                'new key of the state, with missing=["<new key>"] and unexpected=["<old key>"]'
            )
    epoch, position = state.get("epoch"), state.get("position")
    epoch, position = _integer("data position", epoch), _integer("data position", position)
    if not (0 <= epoch < _WORD and 0 <= position <= sampler.length):
        raise StateError(
            f"data position: expected epoch >= 0 and 0 <= position <= {sampler.length}, found epoch {epoch}, "
            f"position {position}; the state was edited or is not this sampler's"
        )
    return epoch, position


def _length_of(dataset: Sized | int) -> int:
    if isinstance(dataset, int | np.integer):
        return operator.index(dataset)
    torch_data = sys.modules.get("torch.utils.data")
    if not hasattr(dataset, "__len__") or (torch_data and isinstance(dataset, torch_data.IterableDataset)):
        raise StateError(
            f"dataset: expected a map-style one with a length, found {type(dataset).__name__}; for an "
            "iterable-style dataset use torchdata.stateful_dataloader.StatefulDataLoader as the data state"
        )
    return len(dataset)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise StateError(f"expected rank and world_size together, found {rank} and {world_size}; pass both")
    if rank is None or world_size is None:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return int(distributed.get_rank()), int(distributed.get_world_size())
    rank, world_size = _integer("rank", rank), _integer("world_size", world_size)
    if not 0 <= rank < world_size:
        raise StateError(f"rank: expected 0 <= rank < world_size, found {rank} of {world_size}; correct them")
    return rank, world_size


def _integer(name: str, value: object) -> int:
    if not isinstance(value, Integral):
        raise StateError(f"{name}: expected an integer, found {value!r} ({type(value).__name__}); correct it")
    return int(value)


def _hash64(purpose: bytes, seed: int, epoch: int, position: int) -> int:
    words = struct.pack("<QQQ", seed, epoch, position)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8, person=purpose).digest(), "little")
