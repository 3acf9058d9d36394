"""Batches from a loader that knows its position, across epochs and resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from holdfast.core.errors import StateError
from holdfast.state.rng import preserved_rng

__all__ = ["BatchSource"]


class BatchSource:
    """Takes batches from a loader; `batch` counts those taken in the present pass over the data."""

    def __init__(self, loader: Iterable[object]) -> None:
        if not hasattr(loader, "state_dict"):
            raise StateError(
                f"the data given to steps() is a {type(loader).__name__}, which has no position of its own, so a "
                "resume could not find its place: build it with "
                "holdfast.ResumableSampler(dataset, batch_size=...).loader(), or use torchdata's "
                "StatefulDataLoader, and put it into the state"
            )
        self._loader = loader
        self._iterator: Iterator[object] | None = None
        self._ended = 0  # passes, since there was a batch
        self.batch = 0

    @property
    def is_open(self) -> bool:
        """Whether a pass over the data is under way."""
        return self._iterator is not None

    def open(self, *, resumed_at: int) -> None:
        """Start a pass; `resumed_at` batches of it were taken before a resume.

        A loader may draw random numbers when an iterator is made. In the middle of a pass the uninterrupted run had
        made its iterator long before, so there the draw is undone.
        """
        with preserved_rng() if resumed_at else contextlib.nullcontext():
            self._iterator = iter(self._loader)
        self.batch = resumed_at

    def take(self) -> tuple[bool, object]:
        """Return (True, the next batch), or (False, None) at the end of the pass.

        Raises:
            StateError: two whole passes gave no batch. The rest of one that was resumed at its end gives none.
        """
        if self._iterator is None:
            raise RuntimeError("take() before open()")
        try:
            value = next(self._iterator)
        except StopIteration:
            self._iterator = None
            self._ended += 1
            if self._ended > 2:
                raise StateError(
                    f"the data given to steps() is a {type(self._loader).__name__} that has no batch: it came to its "
                    "end twice without one; look for an empty dataset, or one that is smaller than a batch, with "
                    "drop_last=True"
                ) from None
            return False, None
        self._ended = 0
        self.batch += 1
        return True, value

    def drop(self) -> None:
        """Forget the iterator: the position was moved by a restore."""
        self._iterator = None
