"""The index: one object with the summaries of a run's manifests, so that a long history is not read one by one.

It is a cache and never the truth. A checkpoint exists because its manifest is listed; the index only saves reading
manifests that it can prove to speak of. Keys are used again after a removal, so an entry is tied to the object by size
and time of last change, and only *settled* objects are entered: another one was listed with them that changed more than
`SETTLED_SECONDS` later. What takes a settled object's place changes later still by the store's own clock, so it cannot
have the same time, however coarse that clock is. An entry that was true once is therefore true of that object for ever:
an index that is old, was put back, or comes from a holder who had lost the lease is at worst of less use.
Source of the idea: the "racy" entries of git's index (Documentation/technical/racy-git.txt).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.catalog.keys import CHECKPOINTS, INDEX, TRASH
from holdfast.catalog.lease import Lease
from holdfast.catalog.summary import Summary
from holdfast.core.errors import HoldfastError, NotFound, UnsupportedVersion
from holdfast.format.documents import Count, Name, decode_document
from holdfast.format.manifest import FORMAT_VERSION, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.stores import ObjectInfo, Store

__all__ = ["Index", "check_index"]

MAX_BYTES = 1 << 28
SETTLED_SECONDS = 3.0  # more than the coarsest clock of a store ticks in: 2 s on FAT, 1 s on object stores


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A manifest in the index: size and time of last change of the object, and what it says."""

    size: Count
    modified: float
    says: Summary

    def is_of(self, found: ObjectInfo) -> bool:
        return self.size == found.size and self.modified == found.modified


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    run: Name
    manifests: dict[str, _Entry]


class Index:
    """What can be said of a run's manifests without reading them. The stored index is read when first asked."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        self._entries: dict[str, _Entry] | None = None
        self._offered: frozenset[str] = frozenset()  # what was known when it was stored

    @property
    def entries(self) -> dict[str, _Entry]:
        if self._entries is None:
            self._entries = _find(self._store, self._run)
            self._offered = frozenset(self._entries)
        return self._entries

    def prove(self, listed: Sequence[ObjectInfo]) -> dict[str, Summary]:
        """Return, by key, what the manifests say that entries are proven to speak of."""
        entries = self.entries
        return {o.key: e.says for o in listed if (e := entries.get(o.key)) is not None and e.is_of(o)}

    def learn(self, listed: Sequence[ObjectInfo], said: Mapping[str, Summary]) -> None:
        """Make entries of what was read, for those that are settled. `listed` is older than the reading."""
        newest = max((o.modified for o in listed), default=0.0)
        for o in listed:
            if o.key in said and o.modified + SETTLED_SECONDS < newest:
                made = self.entries.get(o.key)
                if made is None or made.says is not said[o.key] or not made.is_of(o):
                    self.entries[o.key] = _Entry(o.size, o.modified, said[o.key])

    def rewrite(self, said: Mapping[str, Summary], lease: Lease) -> None:
        """Store the entries of what is listed now. `said` is what the holder of the lease knows of it.

        The lease is looked at behind the listing: so what was listed is what this holder knows, and no rival's.

        Raises:
            LeaseLost: it is no longer the holder.
        """
        listed = [*self._store.list(CHECKPOINTS), *self._store.list(TRASH)]
        lease.check()
        self._entries = {}
        self.learn(listed, said)
        self._offered = frozenset(said)
        document = _Document(FORMAT_VERSION, self._run, self._entries)
        self._store.replace(INDEX, seal(msgspec.json.encode(document)))

    def behind(self, said: Mapping[str, Summary]) -> int:
        """Return how many manifests came or went since the index was stored."""
        return len(self._offered ^ said.keys())


def check_index(store: Store) -> None:
    """Raise IntegrityError when there is an index that does not verify."""
    with contextlib.suppress(NotFound, UnsupportedVersion):
        _read(store)


def _find(store: Store, run: str) -> dict[str, _Entry]:
    """Return the stored entries; none where there is no index, it does not verify, or it is of another run."""
    try:
        document = _read(store)
    except HoldfastError:  # nothing is missed but time, and the next writer makes it anew
        return {}
    return document.manifests if document.run == run else {}


def _read(store: Store) -> _Document:
    body = unseal(read_document(store, INDEX, MAX_BYTES), INDEX)
    check_version(body, INDEX)
    return decode_document(body, _Document, INDEX, "an index")
