"""Whether a run's store holds no left-overs, so that its next holder need not search all of it.

Who leaves a long run with nothing owing says so in a mark: its own generation, and when all is to be searched again in
any case. The mark counts for the very next generation alone; a holder who dies or fails leaves none that counts. It
only saves searching: where it is wrong, left-overs stay until the next search, and nothing is freed that is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.catalog.deletion import Ages, expired
from holdfast.catalog.history import History
from holdfast.catalog.keys import TIDY, TRASH
from holdfast.catalog.lease import Lease
from holdfast.core.errors import (
    HoldfastError,
    LeaseLost,
    NotFound,
    StoreError,
    UnsupportedVersion,
)
from holdfast.format.documents import Count, Moment, Name, decode_document
from holdfast.format.manifest import FORMAT_VERSION, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["Tidiness", "check_mark"]

MARK_FROM = 64  # manifests: fewer are searched as quickly
HALF_MADE_SECONDS = 3600.0  # younger ones may be under way
SEARCH_SECONDS = 24 * 3600.0  # for what those leave who write without the lease: tags, observations


class _Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    run: Name
    generation: Count
    search_by: Moment


class Tidiness:
    """What a holder of a run's lease knows of left-overs. Times are seconds since the Unix epoch."""

    def __init__(self, history: History, run: str, lease: Lease) -> None:
        self._history = history
        self._store = history.store
        self._run = run
        self._lease = lease
        self._search_by = 0.0
        self._next_search = HALF_MADE_SECONDS
        self._owing: set[object] = {
            self
        }  # what was begun and is not known to have ended well; first: the search

    def inherited(self, now: float, ages: Ages) -> bool:
        """Return whether the holder before left nothing that is to be freed now."""
        try:
            mark = _read(self._store)
        except HoldfastError:
            return False
        if (mark.run, mark.generation) != (self._run, self._lease.generation - 1):
            return False
        self._next_search = SEARCH_SECONDS
        due = expired(self._store.list(TRASH), ages)
        if not now < mark.search_by <= now + SEARCH_SECONDS or due:
            return False
        self._search_by = mark.search_by
        self._owing.discard(self)
        return True

    def searched(self, now: float) -> None:
        """Note that all was searched; where a manifest could not be read nothing was freed, and all stays owing.

        What a dead writer had just begun to make cannot be told from what is under way: the next search frees it,
        once it is old.
        """
        self._search_by = now + self._next_search
        if self._history.known.settled:
            self._owing.discard(self)

    def begin(self, act: object) -> None:
        """Note that an act may leave something behind, until it is known to have ended well."""
        self._owing.add(act)

    def end(self, act: object) -> None:
        """Note that an act ended well."""
        self._owing.discard(act)

    @contextlib.contextmanager
    def freeing(self) -> Iterator[None]:
        """Take what is done meanwhile as an act that ends well if it succeeds and no data has to stay for want of
        knowing what needs it."""
        act = object()
        self.begin(act)
        yield
        if self._history.known.settled:
            self.end(act)

    def leave(self) -> None:
        """Store the mark if nothing is owing, in a run of many manifests. That it cannot be stored is no failure."""
        with contextlib.suppress(StoreError, LeaseLost):
            if not self._owing and len(self._history.known.by_key) >= MARK_FROM:
                self._lease.check()
                mark = _Mark(FORMAT_VERSION, self._run, self._lease.generation, self._search_by)
                self._store.replace(TIDY, seal(msgspec.json.encode(mark)))


def check_mark(store: Store) -> None:
    """Raise IntegrityError when there is a mark that does not verify."""
    with contextlib.suppress(NotFound, UnsupportedVersion):
        _read(store)


def _read(store: Store) -> _Mark:
    body = unseal(read_document(store, TIDY), TIDY)
    check_version(body, TIDY)
    return decode_document(body, _Mark, TIDY, "the mark of a tidy run")
