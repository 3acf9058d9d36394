"""DCP's own file storage is stood in for, so that frameworks which make it themselves store into runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.storage import StorageReader

from holdfast.catalog.keyfiles import KeySource, TrustSource
from holdfast.catalog.trust import Verifying
from holdfast.core.errors import PolicyError
from holdfast.integrations.dcp.in_place import InPlaceReader, InPlaceWriter
from holdfast.integrations.dcp.places import chosen_by_torch, install
from holdfast.integrations.dcp.placing import Terms, Where
from holdfast.integrations.dcp.reader import HoldfastReader
from holdfast.integrations.dcp.writer import HoldfastWriter
from holdfast.policies import Rule
from holdfast.replication.mirror import MirrorLike
from holdfast.stores import Store

__all__ = ["StandingIn", "in_place_of_files"]


def in_place_of_files(
    root: str | os.PathLike[str] | Store,
    *,
    where: Where | None = None,
    keep: Rule | None = None,
    grace: float | str = 0,
    mirrors: Sequence[MirrorLike] | None = None,
    metrics: Mapping[str, float] | None = None,
    self_contained: bool = False,
    sign: KeySource | None = None,
    cast: Sequence[str] = (),
    trusted: TrustSource | None = None,
    verify: Verifying | None = None,
) -> StandingIn:
    """Make DCP's file storage store into runs, in this process, until the returned object is closed or its `with` ends.

    Whoever makes a `FileSystemWriter` or `FileSystemReader`, or passes only a `checkpoint_id`, gets a `HoldfastWriter`
    or `HoldfastReader` for it. Of two that stand in, the later is asked. A path leads to a step of a run:

        out/checkpoint_3/pytorch_model_fsdp_0    step 3 of <root>/pytorch_model_fsdp_0
        checkpoints/epoch=3-step=1000.ckpt       step 1000 of <root>
        outputs/checkpoint/step-1000             step 1000 of <root>

    That is, one of its last two parts says the step, and what comes after names a run below the root. What a path was
    saved to before, as files of DCP's own, is loaded from there while the run does not have it.

    Args:
        root: the run's place, or the place that the runs lie below. All ranks must reach it.
        where: a function that is given the path and returns the run's place and the step, or None: as above.
        keep, grace, self_contained, sign: as for `HoldfastWriter`, of every run.
        mirrors: as for `HoldfastWriter`; a run below the root has its copies below each mirror. Not with `where`.
        metrics: as for `HoldfastWriter`; looked at when a save begins, so the training loop may go on changing it.
        cast, trusted, verify: as for `HoldfastReader`. Where signatures are required, no files of DCP are loaded.

    Raises:
        PolicyError: a rule, or what is given together, makes no sense.
        MissingDependency: this torch is not one that can be stood in for.
    """
    if where is not None and mirrors is not None:
        raise PolicyError(
            "mirrors= lie as the runs lie below the root, which where= decides; pass one of the two"
        )
    HoldfastWriter(root, keep=keep, grace=grace, mirrors=mirrors)
    terms = Terms(
        root, where, keep, grace, tuple(mirrors) if mirrors is not None else None, metrics, self_contained, sign,
        tuple(cast), trusted, verify,
    )  # fmt: skip
    return StandingIn(terms)


class StandingIn:
    """What stands in for DCP's file storage since it was made. A `with` ends that; it can be entered again."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._entered = False
        _push(self)

    def __enter__(self) -> StandingIn:
        if self._entered or not self.active:
            _push(self)
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        _pop(self)
        self._entered = self.active

    def close(self) -> None:
        """Put back what was there, as far as nobody else stands in. Doing it again does nothing."""
        while self.active:
            _pop(self)
        self._entered = False

    @property
    def active(self) -> bool:
        """Whether it stands in."""
        return self in _active

    def writer(self, path: str | os.PathLike[str]) -> HoldfastWriter:
        """Return what a `FileSystemWriter` of a path would be. Raises PolicyError: it does not say which step it is."""
        return InPlaceWriter(self._terms, path)

    def reader(self, path: str | os.PathLike[str]) -> HoldfastReader:
        """Return what a `FileSystemReader` of a path would be."""
        return InPlaceReader(self._terms, path, _files_at)


# ---- who stands in ------------------------------------------------------------------------------------------------

_active: list[StandingIn] = []
_put_back: list[Callable[[], None]] = []
_lock = threading.RLock()
_aside: ContextVar[bool] = ContextVar("holdfast_stands_aside", default=False)


def _push(one: StandingIn) -> None:
    with _lock:
        if not _active:
            _put_back.append(install(_choose))
        _active.append(one)


def _pop(one: StandingIn) -> None:
    with _lock:
        if one not in _active:
            return
        del _active[len(_active) - 1 - _active[::-1].index(one)]
        if not _active:
            _put_back.pop()()


@contextmanager
def _standing_aside() -> Iterator[None]:
    before = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(before)


def _choose(reader: bool, given: Mapping[str, Any]) -> object | None:
    """Return what stands in for a storage of DCP that is made of these arguments; None: nobody stands in."""
    with _lock:
        current = _active[-1] if _active and not _aside.get() else None
    if current is None:
        return None
    path = given["path"]
    if reader:
        registry = given.get("_extension_registry")
        return InPlaceReader(current._terms, path, lambda of: _files_at(of, registry))
    if given.get("_extensions"):
        raise PolicyError(
            "FileSystemWriter(_extensions=...) changes the bytes of DCP's files, and a run has none of them; leave it "
            "out, or leave in_place_of_files for this save"
        )
    return current.writer(path)


def _files_at(path: str, registry: Any = None) -> StorageReader:
    """Return the reader that torch itself would use."""
    with _standing_aside():
        found = chosen_by_torch(path) if registry is None else FileSystemReader(path, registry)
    assert isinstance(found, StorageReader)
    return found
