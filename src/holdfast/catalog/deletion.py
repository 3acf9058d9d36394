"""How bytes go: by reachability, and names always before bytes.

What is needed is what the store lists when the names are gone: manifests, the trash, and readers. Data that none of
them needs will never be needed again, because whoever refers to data takes it from a listed manifest, and whoever
brings one back from the trash looks afterwards whether its place there is still taken. So data may be deleted late, and
by somebody who has lost the run meanwhile, as long as it was listed under the lease.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from holdfast.catalog.checkpoints import Entry, newest_states, read_entry
from holdfast.catalog.keys import (
    CHECKPOINTS,
    DATA,
    SIGNATURES,
    TRASH,
    is_data_key,
    packed_key,
    parse_manifest_key,
    parse_trash_key,
)
from holdfast.catalog.signatures import forgotten_signatures, orphaned_signatures
from holdfast.catalog.summary import Summaries, Summary, read_summary, summarize
from holdfast.core.errors import HoldfastError, NotFound
from holdfast.stores import ObjectInfo, Store

__all__ = ["Ages", "Freed", "collect", "delete_names", "expire", "expired", "remove"]


@dataclass(frozen=True, slots=True)
class Ages:
    """How old things must be to go. `now` is by the store's own clock, which dates what it holds.

    `grace_seconds`: of what is in the trash, instead of what each says; `half_made_seconds`: of temporary files, which
    younger ones may be under way; `attempt_seconds`: of data of attempts that never committed. That is 0 where the
    holder before is known to have ended, so that nobody can still commit them.
    """

    now: float = 0.0
    grace_seconds: float | None = None
    half_made_seconds: float = 3600.0
    attempt_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Freed:
    """What was freed: checkpoints that left the trash, older states of a step, and data files with their bytes."""

    trashed: int = 0
    states: int = 0
    files: int = 0
    nbytes: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(
            self.trashed + other.trashed,
            self.states + other.states,
            self.files + other.files,
            self.nbytes + other.nbytes,
        )


def delete_names(store: Store, gone: Sequence[Entry]) -> int:
    """Delete manifests. Older states of the same steps go first: without the newer ones they would be listed again.
    Return how many such there were."""
    newest = {e.step: e.ordinal for e in gone}
    found = [(parse_manifest_key(key), key) for key in store.names(CHECKPOINTS)]
    older = [key for parsed, key in found if parsed is not None and parsed[1] < newest.get(parsed[0], 0)]
    if older:
        store.delete(older)
    store.delete([e.key for e in gone])
    return len(older)


def remove(
    store: Store,
    victims: Sequence[Entry],
    known: Summaries,
    free: Callable[[Sequence[str]], None] | None = None,
) -> int:
    """Delete checkpoints, then every data file that only they referred to; return the bytes freed.

    What must stay is what the store lists, not what the caller remembers: `known` saves reading manifests whose
    summaries are known. While one of the others cannot be read all data stays, for a later `collect`. `free` deletes
    the data, perhaps later.
    """
    gone: list[Summary] = []
    known.settled, unread = False, 0
    for entry in victims:
        try:
            gone.append(known.by_key.get(entry.key) or summarize(read_entry(store, entry)))
        except HoldfastError:  # what a broken one needs is found by `collect`
            unread += 1
    unread += delete_names(store, victims)  # durability: no name before its bytes
    return _free_unneeded(store, gone, known, free or store.delete, all_known=unread == 0)


def expire(
    store: Store, keys: Sequence[str], known: Summaries, free: Callable[[Sequence[str]], None] | None = None
) -> int:
    """Take checkpoints out of the trash for good; return the bytes freed. Otherwise as `remove`; a save may be under
    way."""
    gone: list[Summary] = []
    known.settled, unread = False, 0
    for key in keys:
        try:
            gone.append(known.by_key.get(key) or read_summary(store, key))
        except HoldfastError:
            unread += 1
    store.delete(keys)  # durability: no name before its bytes; and before the look at who is listed
    return _free_unneeded(store, gone, known, free or store.delete, all_known=unread == 0)


def _free_unneeded(
    store: Store,
    gone: Sequence[Summary],
    known: Summaries,
    free: Callable[[Sequence[str]], None],
    *,
    all_known: bool,
) -> int:
    """Delete the data of manifests that are gone, as far as nothing that is there needs it."""
    sizes: dict[str, int] = {}
    for summary in gone:
        sizes |= summary.sizes()
    if not known.complete(store):
        return 0
    unneeded = sorted(key for key in sizes if is_data_key(key) and not known.needs(key))
    packed = [packed_key(key) for key in unneeded]
    free([*unneeded, *packed, *forgotten_signatures(gone, known)])
    known.settled = all_known and known.readers.files.isdisjoint(sizes)
    return sum(sizes[key] for key in unneeded)


def expired(listed: Iterable[ObjectInfo], ages: Ages) -> list[str]:
    """Return the keys of what has been in the trash for long enough."""
    found: list[str] = []
    for o in listed:
        parsed = parse_trash_key(o.key)
        if parsed is not None:
            grace = parsed[2] if ages.grace_seconds is None else ages.grace_seconds
            if o.modified + grace <= ages.now:
                found.append(o.key)
    return found


def collect(
    store: Store,
    known: Summaries | None = None,
    ages: Ages | None = None,
    check: Callable[[], None] = lambda: None,
) -> Freed:
    """Free what nothing refers to: attempts that never committed, older states of a step, what has been in the trash
    for long enough, half-made files and uploads. `known` is as for `remove`.

    Only the holder of the lease may call this, with no save under way; `check` raises when the run was taken over.
    While any manifest cannot be read no data is freed: what it refers to is unknown, and it may be repaired.
    """
    ages = ages or Ages()
    store.sweep(ages.now - ages.half_made_seconds)
    going = expired(store.list(TRASH), ages)
    manifests = [key for key in store.names(CHECKPOINTS) if parse_manifest_key(key) is not None]
    newest = {e.key for e in newest_states(manifests).values()}
    older = [key for key in manifests if key not in newest]
    check()
    store.delete(going)  # durability: no name before its bytes; and before the look at who is listed
    store.delete(older)
    names, signatures = store.names(DATA), store.list(SIGNATURES)
    known = Summaries() if known is None else known
    known.settled = False
    if not known.complete(store):
        return Freed(len(going), len(older))
    store.delete(known.readers.ended)
    check()  # behind the listing: an attempt of a new holder is not among what was found
    unneeded = [key for key in names if is_data_key(key) and not known.needs(key)]
    found: list[ObjectInfo] = []
    for key in unneeded:
        with contextlib.suppress(NotFound):  # its writer lives, and has given up
            found.append(store.info(key))
    margin = ages.attempt_seconds
    orphans = orphaned_signatures(signatures, known)  # a signature comes before its manifest, as data does
    free = [o for o in found if not margin or o.modified + margin <= ages.now]
    unsigned = [o for o in orphans if not margin or o.modified + margin <= ages.now]
    store.delete([o.key for o in (*free, *unsigned)])
    known.settled = (len(free), len(unsigned)) == (len(found), len(orphans)) and not known.readers.files
    return Freed(len(going), len(older), len(free), sum(o.size for o in free))
