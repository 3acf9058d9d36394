"""A lane: small words between ranks that need not outlive the launch, by key.

Under torch.distributed it is the key-value store that the launch has anyway, which takes a fraction of a millisecond
and is no process group; elsewhere it is the run's own store.
"""

from __future__ import annotations

from typing import Protocol, cast

from holdfast.core.errors import HoldfastError, NotFound, RanksDisagree
from holdfast.state.registry import torch_store
from holdfast.stores import Store

__all__ = ["Lane", "StoreLane", "TorchLane", "lane_of"]


class Lane(Protocol):
    """Puts words where every rank can look for them."""

    meet_seconds: float  # how often it may be used without being felt

    def put(self, key: str, word: bytes) -> None:
        """Publish a word."""
        ...

    def look(self, key: str) -> bytes | None:
        """Return the word at a key, or None."""
        ...

    def drop(self, key: str) -> None:
        """Free a word that nobody looks for any more."""
        ...


class StoreLane:
    """A lane through a run's store."""

    meet_seconds = 10.0

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def put(self, key: str, word: bytes) -> None:
        self._store.replace(f"{self._prefix}/{key}", word)

    def look(self, key: str) -> bytes | None:
        try:
            return self._store.read(f"{self._prefix}/{key}")
        except NotFound:
            return None

    def drop(self, key: str) -> None:
        self._store.delete([f"{self._prefix}/{key}"])


class _KeyValues(Protocol):
    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...


class TorchLane:
    """A lane through the key-value store of torch.distributed, which is asked for each time: held here it would outlive
    its process group, and be taken down at the end of the interpreter."""

    meet_seconds = 1.0

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def put(self, key: str, word: bytes) -> None:
        try:
            _values().set(f"{self._prefix}/{key}", word)
        except RuntimeError as e:
            raise _unreachable(e) from e

    def look(self, key: str) -> bytes | None:
        try:
            values = _values()
            there = values.check([f"{self._prefix}/{key}"])
            return bytes(values.get(f"{self._prefix}/{key}")) if there else None
        except RuntimeError as e:
            raise _unreachable(e) from e

    def drop(self, key: str) -> None:
        try:
            _values().delete_key(f"{self._prefix}/{key}")
        except (RuntimeError, NotImplementedError):  # some kinds cannot, and a word is small
            return


def _values() -> _KeyValues:
    found = torch_store()
    if found is None:
        raise RuntimeError("its default group was destroyed")
    return cast("_KeyValues", found)


def _unreachable(error: Exception) -> HoldfastError:
    return RanksDisagree(
        f"the key-value store of torch.distributed cannot be reached any more: {error}; the process that holds it (the "
        "launcher, or rank 0) may have ended"
    )


def lane_of(store: Store, run: str, generation: int) -> Lane:
    """Return the quickest lane that there is."""
    if torch_store() is not None:
        return TorchLane(f"holdfast/{run}/{generation}")
    return StoreLane(store, f"ranks/{generation:012d}/lane")
