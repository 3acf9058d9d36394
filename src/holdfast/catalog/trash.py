"""The trash: checkpoints that were deleted and can be brought back until their grace ends.

Nothing moves but the manifest: a checkpoint in the trash needs its data files as a listed one does. Putting it there is
the document first, then the name off the list; bringing it back is the reverse. A crash between leaves it in both
places, which costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.catalog.checkpoints import Entry, newest_states
from holdfast.catalog.content import open_file
from holdfast.catalog.deletion import delete_names
from holdfast.catalog.keys import (
    CHECKPOINTS,
    TRASH,
    manifest_key,
    parse_manifest_key,
    parse_trash_key,
    step_prefix,
    trash_key,
)
from holdfast.catalog.summary import Summaries
from holdfast.core.errors import (
    AlreadyExists,
    HoldfastError,
    IntegrityError,
    InvalidFormat,
    MissingObject,
    NotFound,
    StateError,
)
from holdfast.format.manifest import Manifest, decode_manifest
from holdfast.format.trash import TrashDoc, decode_trash, encode_trash
from holdfast.stores import ObjectInfo, Store

__all__ = [
    "BROKEN",
    "Deleted",
    "Leaving",
    "Trashed",
    "describe_trash",
    "list_trash",
    "read_trash",
    "restore_from_trash",
    "retire",
]

BROKEN = "broken"  # in the place of an attempt that cannot be read


@dataclass(frozen=True, slots=True)
class Leaving:
    """A checkpoint that goes into the trash, with what is to be known of it there."""

    entry: Entry
    attempt: str
    reasons: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trashed:
    """A checkpoint in the trash, as its key and the listing tell. Times are by the store's clock."""

    key: str
    step: int
    attempt: str
    grace_seconds: int
    since: float
    size: int

    @property
    def until(self) -> float:
        """When it may be freed."""
        return self.since + self.grace_seconds


@dataclass(frozen=True, slots=True)
class Deleted:
    """A checkpoint in the trash as people see it.

    `time` is when it was deleted, `until` when it may be freed, both in seconds since the Unix epoch; `freed_bytes` is
    what only it needs. `problem` says why it cannot be brought back, and then the rest is empty.
    """

    step: int
    attempt: str
    time: float
    until: float
    reasons: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    stored_bytes: int = 0
    freed_bytes: int = 0
    demoted: bool = False
    problem: str = ""


def list_trash(store: Store) -> list[Trashed]:
    """Return what is in the trash, in step order and for each step the newest last."""
    found = [made for o in store.list(TRASH) if (made := _trashed(o)) is not None]
    return sorted(found, key=lambda t: (t.step, t.since, t.key))


def _trashed(listed: ObjectInfo) -> Trashed | None:
    parsed = parse_trash_key(listed.key)
    return None if parsed is None else Trashed(listed.key, *parsed, listed.modified, listed.size)


def read_trash(store: Store, trashed: Trashed) -> tuple[Manifest, TrashDoc]:
    """Return the manifest of what is in the trash, and the document around it.

    Raises:
        MissingObject: it was brought back or freed meanwhile.
        IntegrityError: it does not verify.
    """
    try:
        manifest, doc = decode_trash(store.read(trashed.key), trashed.key)
    except NotFound as e:
        raise MissingObject(f"{trashed.key}: is no longer in the trash") from e
    if (manifest.step, manifest.attempt) != (trashed.step, trashed.attempt):
        raise InvalidFormat(f"{trashed.key}: holds the manifest of step {manifest.step}; files were swapped")
    return manifest, doc


def describe_trash(store: Store, known: Summaries) -> list[Deleted]:
    """Return what is in the trash and not listed again, with what each would free. `known` is brought up to date."""
    known.complete(store)
    listed = {summary.attempt for key, summary in known.by_key.items() if parse_manifest_key(key) is not None}
    users: Counter[str] = Counter()
    for summary in known.by_key.values():
        users.update(summary.sizes().keys())
    return [_described(store, t, known, users) for t in list_trash(store) if t.attempt not in listed]


def _described(store: Store, trashed: Trashed, known: Summaries, users: Mapping[str, int]) -> Deleted:
    try:
        manifest, doc = read_trash(store, trashed)
    except HoldfastError as e:
        return Deleted(trashed.step, trashed.attempt, trashed.since, trashed.until, problem=str(e))
    sizes = manifest.file_sizes
    alone = sum(n for key, n in sizes.items() if users[key] <= 1 and key not in known.readers.files)
    return Deleted(
        trashed.step, trashed.attempt, doc.deleted or trashed.since, trashed.until,
        tuple(doc.reasons), tuple(doc.tags), manifest.stored_bytes, alone, manifest.demoted,
    )  # fmt: skip


def retire(store: Store, leaving: Sequence[Leaving], *, now: float, grace_seconds: int) -> None:
    """Put checkpoints into the trash: they are no longer listed, their bytes stay until the grace has ended."""
    for one in leaving:
        try:
            raw = store.read(one.entry.key)
        except NotFound:
            continue
        if one.attempt == BROKEN:  # as it is: it may be repaired by hand
            store.replace(trash_key(one.entry.step, BROKEN, grace_seconds), raw)
            continue
        document = encode_trash(
            raw, one.entry.key,
            deleted=now, grace_seconds=grace_seconds, reasons=list(one.reasons), tags=list(one.tags),
        )  # fmt: skip
        # durability: the document before the name goes, so that something refers to the data all the time
        store.replace(trash_key(one.entry.step, one.attempt, grace_seconds), document)
    delete_names(store, [one.entry for one in leaving])


def restore_from_trash(store: Store, trashed: Trashed) -> tuple[Entry, Manifest, TrashDoc]:
    """Bring a checkpoint back from the trash whole: under its key, with the bytes of its manifest unchanged.

    Needs no lease. Who collects deletes the place in the trash first, and looks what is listed then; so if that place
    is still taken once the manifest is listed, whoever collects sees it and leaves the data alone.

    Raises:
        MissingObject, Truncated, DigestMismatch: a data file is gone or is not what was committed; nothing was changed.
        StateError: the step has another checkpoint now.
    """
    manifest, doc = read_trash(store, trashed)
    _check_data(store, manifest, trashed)
    key = doc.key or manifest_key(trashed.step)
    parsed = parse_manifest_key(key)
    if parsed is None or parsed[0] != trashed.step:
        raise InvalidFormat(f"{trashed.key}: says that it was listed as {key[:80]!r}")
    present = newest_states(store.names(CHECKPOINTS, after=step_prefix(trashed.step))).get(trashed.step)
    if present is not None:
        return _found(store, present, trashed), manifest, doc
    try:
        store.create(key, doc.manifest_bytes)  # durability: listed again, and only then out of the trash
    except AlreadyExists:
        return _found(store, Entry(key, *parsed), trashed), manifest, doc
    try:
        store.info(trashed.key)
    except NotFound:
        store.delete([key])
        raise MissingObject(
            f"{trashed.key}: was just freed, because its grace had ended; step {trashed.step} cannot be brought back"
        ) from None
    store.delete([trashed.key])
    return Entry(key, *parsed), manifest, doc


def _found(store: Store, present: Entry, trashed: Trashed) -> Entry:
    """Return the checkpoint of this step that is listed, if it is the very one. Its place in the trash stays: whoever
    brought it back is perhaps just looking there."""
    try:
        attempt = decode_manifest(store.read(present.key), present.key).attempt
    except HoldfastError as e:
        attempt = f"that cannot be read ({e})"
    if attempt != trashed.attempt:
        raise StateError(
            f"step {trashed.step} has another checkpoint now, of attempt {attempt}, in the place of attempt "
            f"{trashed.attempt} from the trash; nothing was changed. If the older one is wanted, remove the newer first"
        )
    return present


def _check_data(store: Store, manifest: Manifest, trashed: Trashed) -> None:
    for entry in {file.key: file for part in manifest.parts.values() for file in part.files}.values():
        try:
            open_file(store, entry)
        except IntegrityError as e:
            raise type(e)(f"step {trashed.step} cannot be brought back whole: {e}") from e
