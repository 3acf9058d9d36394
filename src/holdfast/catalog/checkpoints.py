"""The acts on a run's checkpoints: list, read, commit, set aside, remove, reclaim.

Writing is data first, manifest last; deleting is the reverse. A crash between any two calls leaves at worst bytes that
nothing refers to, which `reclaim` frees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from holdfast.catalog.keys import (
    CHECKPOINTS,
    DATA,
    TRASH,
    is_data_key,
    manifest_key,
    parse_manifest_key,
    trash_key,
)
from holdfast.catalog.lease import Lease
from holdfast.core.errors import (
    CommitConflict,
    CommitUnknown,
    HoldfastError,
    InvalidFormat,
    MissingObject,
    NotFound,
    StoreError,
)
from holdfast.format.manifest import Manifest, decode_manifest, encode_manifest
from holdfast.stores import Store

__all__ = ["Entry", "commit", "entries", "read_entry", "reclaim", "remove", "retire"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed checkpoint by its key: step, ordinal (0, or higher for a later state of the same step)."""

    key: str
    step: int
    ordinal: int


def entries(store: Store) -> list[Entry]:
    """Return the committed checkpoints in step order; of a step that was committed again, the newest state only."""
    newest: dict[int, Entry] = {}
    for found in store.list(CHECKPOINTS):
        parsed = parse_manifest_key(found.key)
        if parsed is not None:
            step, ordinal = parsed
            if step not in newest or ordinal > newest[step].ordinal:  # "…-0001.json" sorts before "….json"
                newest[step] = Entry(found.key, step, ordinal)
    return [newest[s] for s in sorted(newest)]


def read_entry(store: Store, entry: Entry) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        IntegrityError: it does not verify, or speaks of another step.
        MissingObject: it was deleted meanwhile.
    """
    try:
        manifest = decode_manifest(store.read(entry.key), entry.key)
    except NotFound as e:
        raise MissingObject(f"{entry.key}: the manifest is gone") from e
    if manifest.step != entry.step:
        raise InvalidFormat(f"{entry.key}: holds the manifest of step {manifest.step}; files were swapped")
    return manifest


def commit(store: Store, manifest: Manifest, lease: Lease) -> Entry:
    """Make a checkpoint exist. Its data must be durable already.

    A step that has a checkpoint gets a newer state under the next ordinal; the older one is removed afterwards by
    whoever prunes.

    Raises:
        LeaseLost: another process took the run over.
        CommitConflict: a rival committed at this very place.
        CommitUnknown: the store failed in a way that leaves the outcome open.
    """
    lease.check()
    present = [e for e in entries(store) if e.step == manifest.step]
    ordinal = present[0].ordinal + 1 if present else 0
    key = manifest_key(manifest.step, ordinal)
    try:
        store.create(key, encode_manifest(manifest))  # durability: the commit
    except StoreError as e:
        _settle(store, key, manifest, e)
    lease.check()
    return Entry(key, manifest.step, ordinal)


def _settle(store: Store, key: str, manifest: Manifest, cause: StoreError) -> None:
    """Find out, after a failed create, whether the manifest is there; never guess. Even a name that is taken may be
    taken by this very manifest, when a request was carried out, its answer lost, and it was sent again."""
    try:
        found = decode_manifest(store.read(key), key)
    except NotFound:
        raise cause from None
    except HoldfastError as e:
        raise CommitUnknown(
            f"{key}: the commit failed ({cause}) and what is there cannot be read ({e})"
        ) from cause
    if found.attempt == manifest.attempt:
        raise CommitUnknown(
            f"{key}: the commit was written but the store did not confirm that it is durable ({cause})"
        ) from cause
    raise CommitConflict(
        f"{key}: another writer committed this step first; its checkpoint is intact"
    ) from cause


def retire(store: Store, entry: Entry, attempt: str) -> None:
    """Set a checkpoint aside: it is no longer listed, its bytes stay until `reclaim` frees the trash."""
    try:
        raw = store.read(entry.key)
    except NotFound:
        return
    store.replace(trash_key(entry.step, attempt), raw)
    _delete_names(store, [entry])


def _delete_names(store: Store, gone: Sequence[Entry]) -> None:
    """Delete manifests. Older states of the same steps go first: without the newer ones they would be listed again."""
    newest = {e.step: e.ordinal for e in gone}
    found = [(parse_manifest_key(o.key), o.key) for o in store.list(CHECKPOINTS)]
    older = [key for parsed, key in found if parsed is not None and parsed[1] < newest.get(parsed[0], 0)]
    if older:
        store.delete(older)
    store.delete([e.key for e in gone])


def remove(store: Store, victims: Sequence[tuple[Entry, Manifest]], known: Mapping[str, Manifest]) -> int:
    """Delete checkpoints, then every data file that only they referred to; return the bytes freed.

    What must stay is what the store lists, not what the caller remembers: `known` saves reading manifests that were
    read before, by key. While one of the others cannot be read all data stays, for a later `reclaim`.
    """
    _delete_names(store, [entry for entry, _ in victims])  # durability: no name before its bytes
    needed = _needed(store, known)
    if needed is None:
        return 0
    sizes = {f.key: f.size for _, m in victims for p in m.parts.values() for f in p.files}
    unreferenced = sorted(set(sizes) - needed)
    store.delete(unreferenced)
    return sum(sizes[key] for key in unreferenced)


def _needed(store: Store, known: Mapping[str, Manifest]) -> set[str] | None:
    """Return the data that any manifest of the store needs, listed or set aside; None when one cannot be read."""
    needed: set[str] = set()
    for key in _manifest_keys(store):
        try:
            manifest = known[key] if key in known else decode_manifest(store.read(key), key)
        except HoldfastError:
            return None
        needed |= manifest.file_keys
    return needed


def _manifest_keys(store: Store) -> list[str]:
    """Return the key of every manifest, listed or set aside, older states of a step included."""
    listed = [o.key for o in store.list(CHECKPOINTS) if parse_manifest_key(o.key) is not None]
    return listed + [o.key for o in store.list(TRASH)]


def reclaim(
    store: Store,
    known: Mapping[str, Manifest] = MappingProxyType({}),
    *,
    trash_before: float = 0.0,
    half_made_before: float = 0.0,
) -> int:
    """Free what nothing refers to: attempts that never committed, older states of a step, trash and half-made files
    from before the given times (seconds since the Unix epoch). `known` is as for `remove`.

    Only the holder of the lease may call this, with no save under way. While any manifest cannot be read no data is
    freed: what it refers to is unknown, and it may be repaired. Returns the bytes freed.
    """
    store.sweep(half_made_before)
    store.delete([o.key for o in store.list(TRASH) if o.modified < trash_before])
    newest = {e.key for e in entries(store)}
    manifests = [o.key for o in store.list(CHECKPOINTS) if parse_manifest_key(o.key) is not None]
    store.delete([key for key in manifests if key not in newest])
    listed = store.list(DATA)
    needed = _needed(store, known)
    if needed is None:
        return 0
    orphans = [o for o in listed if is_data_key(o.key) and o.key not in needed]
    store.delete([o.key for o in orphans])
    return sum(o.size for o in orphans)
