"""The acts on a run's checkpoints: list, read, commit. How they go is in `catalog.deletion` and `catalog.trash`.

Writing is data first, manifest last; deleting is the reverse. A crash between any two calls leaves at worst bytes that
nothing refers to, which `collect` frees.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.catalog.keys import CHECKPOINTS, manifest_key, parse_manifest_key, step_prefix
from holdfast.catalog.lease import Lease
from holdfast.catalog.signatures import add_signature
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

__all__ = ["Entry", "commit", "entries", "newest_states", "read_entry"]


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
    present = newest_states(store.names(CHECKPOINTS, after=step_prefix(manifest.step))).get(manifest.step)
    ordinal = present.ordinal + 1 if present is not None else 0
    name, raw = manifest_key(manifest.step, ordinal), encode_manifest(manifest)
    if key is not None:
        add_signature(store, manifest, raw, key, manifest.time)  # no commit without its signature
    lease.check()  # behind the look: what a new holder commits is not overtaken under a higher ordinal
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
