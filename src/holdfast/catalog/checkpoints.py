"""The acts on a run's checkpoints: list, read, commit, set aside, remove, reclaim.

Writing is data first, manifest last; deleting is the reverse. A crash between any two calls leaves at worst bytes that
nothing refers to, which `reclaim` frees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from holdfast.catalog.keys import (
    CHECKPOINTS,
    DATA,
    TRASH,
    is_data_key,
    manifest_key,
    packed_key,
    parse_manifest_key,
    step_prefix,
    trash_key,
)
from holdfast.catalog.lease import Lease
from holdfast.catalog.signatures import add_signature, forgotten_signatures, orphaned_signatures
from holdfast.catalog.summary import Summaries, Summary, summarize
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
from holdfast.format.signing import SigningKey
from holdfast.stores import Store

__all__ = [
    "Entry",
    "commit",
    "entries",
    "newest_states",
    "read_entry",
    "reclaim",
    "remove",
    "retire",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed checkpoint by its key: step, ordinal (0, or higher for a later state of the same step)."""

    key: str
    step: int
    ordinal: int


def entries(store: Store) -> list[Entry]:
    """Return the committed checkpoints in step order; of a step that was committed again, the newest state only."""
    return list(newest_states(store.names(CHECKPOINTS)).values())


def newest_states(keys: Iterable[str]) -> dict[int, Entry]:
    """Return, by step and in step order, the newest state of each step that some keys name."""
    newest: dict[int, Entry] = {}
    for key in keys:
        parsed = parse_manifest_key(key)
        if parsed is not None:
            step, ordinal = parsed
            if step not in newest or ordinal > newest[step].ordinal:  # "…-0001.json" sorts before "….json"
                newest[step] = Entry(key, step, ordinal)
    return {step: newest[step] for step in sorted(newest)}


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


def commit(store: Store, manifest: Manifest, lease: Lease, key: SigningKey | None = None) -> Entry:
    """Make a checkpoint exist, signed where there is a key. Its data must be durable already.

    A step that has a checkpoint gets a newer state under the next ordinal; the older one is removed afterwards by
    whoever prunes.

    Raises:
        LeaseLost: another process took the run over.
        CommitConflict: a rival committed at this very place.
        CommitUnknown: the store failed in a way that leaves the outcome open.
    """
    lease.check()
    present = newest_states(store.names(CHECKPOINTS, after=step_prefix(manifest.step))).get(manifest.step)
    ordinal = present.ordinal + 1 if present is not None else 0
    name, raw = manifest_key(manifest.step, ordinal), encode_manifest(manifest)
    if key is not None:
        add_signature(store, manifest, raw, key, manifest.time)  # no commit without its signature
    try:
        store.create(name, raw)  # durability: the commit
    except StoreError as e:
        _settle(store, name, manifest, e)
    lease.check()
    return Entry(name, manifest.step, ordinal)


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


def retire(store: Store, leaving: Sequence[tuple[Entry, str]]) -> None:
    """Set checkpoints aside, each with its attempt: they are no longer listed, their bytes stay until `reclaim` frees
    the trash."""
    for entry, attempt in leaving:
        with contextlib.suppress(NotFound):
            store.replace(trash_key(entry.step, attempt), store.read(entry.key))
    _delete_names(store, [entry for entry, _ in leaving])


def _delete_names(store: Store, gone: Sequence[Entry]) -> int:
    """Delete manifests. Older states of the same steps go first: without the newer ones they would be listed again.
    Return how many such there were."""
    newest = {e.step: e.ordinal for e in gone}
    found = [(parse_manifest_key(key), key) for key in store.names(CHECKPOINTS)]
    older = [key for parsed, key in found if parsed is not None and parsed[1] < newest.get(parsed[0], 0)]
    if older:
        store.delete(older)
    store.delete([e.key for e in gone])
    return len(older)


def remove(store: Store, victims: Sequence[Entry], known: Summaries) -> int:
    """Delete checkpoints, then every data file that only they referred to; return the bytes freed.

    What must stay is what the store lists, not what the caller remembers: `known` saves reading manifests whose
    summaries are known. While one of the others cannot be read all data stays, for a later `reclaim`.
    """
    sizes: dict[str, int] = {}
    gone: list[Summary] = []
    known.settled, unread = False, 0
    for entry in victims:
        try:
            gone.append(known.by_key.get(entry.key) or summarize(read_entry(store, entry)))
            sizes |= gone[-1].sizes()
        except HoldfastError:  # what a broken one needs is found by `reclaim`
            unread += 1
    unread += _delete_names(store, victims)  # durability: no name before its bytes
    if not known.complete(store):
        return 0
    unreferenced = sorted(key for key in sizes if is_data_key(key) and not known.needs(key))
    packed = [packed_key(key) for key in unreferenced]
    store.delete([*unreferenced, *packed, *forgotten_signatures(gone, known)])
    known.settled = unread == 0
    return sum(sizes[key] for key in unreferenced)


def reclaim(
    store: Store,
    known: Summaries | None = None,
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
    manifests = [key for key in store.names(CHECKPOINTS) if parse_manifest_key(key) is not None]
    newest = {e.key for e in newest_states(manifests).values()}
    store.delete([key for key in manifests if key not in newest])
    names = store.names(DATA)
    known = Summaries() if known is None else known
    known.settled = False
    if not known.complete(store):
        return 0
    orphans = [key for key in names if is_data_key(key) and not known.needs(key)]
    freed = 0
    for key in orphans:
        with contextlib.suppress(NotFound):  # its writer lives, and has given up
            freed += store.info(key).size
    store.delete([*orphans, *orphaned_signatures(store, known)])
    known.settled = True
    return freed
