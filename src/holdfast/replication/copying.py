"""Verified copies between stores: of a data file, of a checkpoint, and of what lies beside the checkpoints.

Nothing is copied that does not verify at its source, byte for byte on the way. An object of the target that is whole is
left alone; one that is not gives its place to a copy in one step, when the copy is whole and durable. So a crash or a
source that proves bad half-way changes nothing that could be read before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import CHECKPOINTS, RUN, TAGS, packed_key, parse_manifest_key, signature_key
from holdfast.catalog.signatures import read_signatures
from holdfast.catalog.tags import decode_tag
from holdfast.core.buffers import Buffer
from holdfast.core.errors import (
    AlreadyExists,
    CommitConflict,
    IntegrityError,
    InvalidFormat,
    MissingObject,
    NotARun,
    NotFound,
    StateError,
)
from holdfast.core.workers import Workers
from holdfast.format.datafile import encode_header
from holdfast.format.manifest import FileEntry, Manifest, decode_manifest
from holdfast.format.packed import Pack
from holdfast.format.packing import Packing
from holdfast.format.signature import encode_signatures
from holdfast.replication.segments import copy_log
from holdfast.replication.streaming import verified_pieces
from holdfast.stores import Store, Stream, prove_create

__all__ = [
    "BY_TURNS",
    "Copied",
    "Progress",
    "check_is_of",
    "copy_beside",
    "copy_checkpoint",
    "copy_file",
    "copy_identity",
    "copy_signatures",
    "copy_tags",
    "read_manifest",
    "send_blocks",
    "send_file",
]

logger = logging.getLogger("holdfast")

BY_TURNS = (  # what to do where another process writes the place that a copy goes to
    "If it copies there too, as a trainer with mirrors and `holdfast sync` do, nothing is wrong: copies are made one "
    "after the other, and this one can be made when that has ended"
)
SMALL_BYTES = 16 << 20  # files up to this are copied several at once
TOGETHER = 4

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Copied:
    """What was really written: objects, and their bytes."""

    objects: int = 0
    bytes: int = 0

    def __add__(self, other: Copied) -> Copied:
        return Copied(self.objects + other.objects, self.bytes + other.bytes)


def _silent(done: int) -> None:
    """Tell nobody."""


def copy_file(
    source: Store, target: Store, entry: FileEntry, *, pack: Pack | None = None, progress: Progress = _silent
) -> int:
    """Copy a data file, verified on the way; return the bytes written, 0 when the target holds it already.

    What the target holds, plain or packed, is judged by its size and the digest of its header; `replication.repair`
    reads all of it. With `pack` what is written is a packed file. `progress` is told the bytes that were copied since
    its last call.

    Raises:
        IntegrityError: the source's bytes are not what was committed; the target is as it was.
    """
    try:
        open_file(target, entry)
    except IntegrityError:
        return send_file(source, target, entry, pack=pack, progress=progress)
    return 0


def send_file(
    source: Store, target: Store, entry: FileEntry, *, pack: Pack | None = None, progress: Progress = _silent
) -> int:
    """Copy a data file as `copy_file` does, whatever the target holds of it. Return the bytes written."""
    with _naming(source):
        return send_blocks([open_file(source, entry)], target, pack=pack, progress=progress)


def send_blocks(
    copies: Sequence[DataFile], target: Store, *, pack: Pack | None = None, progress: Progress = _silent
) -> int:
    """Put a data file into the target, over whatever it holds of it; return the bytes written.

    Each block comes from the first of the `copies`, which are of one file, in which it verifies.

    Raises:
        IntegrityError: a block verifies in none of them; the target is as it was.
    """
    file = copies[0]
    plain, packed = file.entry.key, packed_key(file.entry.key)
    # Closed here and now: left to the garbage collector, its threads might be waited for in one of them.
    with contextlib.closing(verified_pieces(copies, progress)) as pieces:
        # durability: either way the object has its name when it is whole, and not before
        if pack is None:
            written, other = file.entry.size, packed
            header = encode_header(file.header.tensors, file.header.digests)  # a file has one byte form
            _put(target, plain, chain([header], pieces), written)
        else:
            packing, other = Packing(file.header, pack), plain
            with contextlib.closing(packing.body(pieces)) as body:
                _put(target, packed, body, packing.most_bytes)
            written = packing.packed_bytes
    with contextlib.suppress(NotFound):
        target.info(other)
        target.delete([other])  # it was not whole, and a plain file hides a packed one
    return written


def _put(target: Store, key: str, body: Iterable[Buffer], size: int) -> None:
    target.write_streams([Stream(key, 0, body, bytes, over=True, body_bytes=size)])


@contextlib.contextmanager
def _naming(source: Store) -> Iterator[None]:
    """Say in which store it is that bytes are wrong."""
    try:
        yield
    except IntegrityError as e:
        raise type(e)(f"{source.url}: {e}") from e


def copy_checkpoint(
    source: Store, target: Store, key: str, *, pack: Pack | None = None, progress: Progress = _silent
) -> Copied:
    """Copy the checkpoint whose manifest is at `key`: its data files, its signatures, then the manifest, byte for byte.

    A file that the target holds is not copied again, so a second call finishes what the first did not.

    Raises:
        IntegrityError: an object of the source is not what was committed, by name. No manifest was written.
        CommitConflict: the target holds another checkpoint at this key.
    """
    raw, manifest = read_manifest(source, key)
    present = _present_manifest(target, key, raw)
    copied = _copy_files(source, target, manifest, pack=pack, progress=progress)
    copied += copy_signatures(source, target, manifest)
    if present == raw:
        return copied
    try:
        if present is None:
            target.create(key, raw)  # durability: the commit, when everything that it needs is there
        else:
            target.replace(key, raw)  # durability: the same, over one that does not verify
    except AlreadyExists:
        if _present_manifest(target, key, raw) != raw:
            raise
        return copied
    return copied + Copied(1, len(raw))


def copy_signatures(source: Store, target: Store, manifest: Manifest) -> Copied:
    """Make the target hold every signature of a checkpoint that the source holds; it keeps those it has besides.

    They are not checked here: whom to trust is for a reader to say. What is damaged at the source is not copied.
    """
    step, attempt = manifest.step, manifest.attempt
    try:
        theirs = read_signatures(source, step, attempt)
    except IntegrityError as e:
        logger.warning("signatures of %s are not copied: %s", source.url, e)
        return Copied()
    try:
        ours = read_signatures(target, step, attempt)
    except IntegrityError:
        ours = []
    new = [s for s in theirs if s not in ours]
    if not new:
        return Copied()
    raw = encode_signatures([*ours, *new])
    target.replace(signature_key(step, attempt), raw)
    return Copied(1, len(raw))


def read_manifest(store: Store, key: str) -> tuple[bytes, Manifest]:
    """Return the manifest at a key, as it is stored and decoded.

    Raises:
        IntegrityError: it is gone, does not verify, or is of another step.
    """
    try:
        raw = store.read(key)
    except NotFound as e:
        raise MissingObject(f"{store.url}/{key}: the manifest is gone") from e
    manifest = decode_manifest(raw, f"{store.url}/{key}")
    parsed = parse_manifest_key(key)
    if parsed is None or parsed[0] != manifest.step:
        raise InvalidFormat(
            f"{store.url}/{key}: holds the manifest of step {manifest.step}; files were swapped"
        )
    return raw, manifest


def _present_manifest(target: Store, key: str, wanted: bytes) -> bytes | None:
    """Return what the target holds at a manifest's key. Raises CommitConflict when that is another sound manifest."""
    try:
        present = target.read(key)
    except NotFound:
        return None
    if present == wanted:
        return present
    try:
        _, manifest = read_manifest(target, key)
    except IntegrityError:
        return present
    raise CommitConflict(
        f"{target.url}/{key}: holds another checkpoint of step {manifest.step} (attempt {manifest.attempt}); "
        "it is intact and stays. Remove it there (holdfast rm) if it is to be replaced"
    )


def _copy_files(
    source: Store, target: Store, manifest: Manifest, *, pack: Pack | None, progress: Progress
) -> Copied:
    """Copy the data files of a checkpoint: large ones one by one, small ones several at once."""
    files = list({f.key: f for part in manifest.parts.values() for f in part.files}.values())
    small = [f for f in files if f.size <= SMALL_BYTES]
    written = [
        copy_file(source, target, f, pack=pack, progress=progress) for f in files if f.size > SMALL_BYTES
    ]
    with Workers(TOGETHER, "holdfast-files") as pool:
        jobs = [pool.submit(copy_file, source, target, f, pack=pack, progress=progress) for f in small]
        written += [job.result() for job in jobs]
    return Copied(sum(1 for n in written if n), sum(written))


def copy_beside(source: Store, target: Store) -> Copied:
    """Copy what lies beside the checkpoints: `run.json`, the log, the tags, so that the target's are the source's.

    A line of the log or a tag that does not verify at its source is reported and not copied.

    Raises:
        IntegrityError: the source's `run.json` does not verify.
        StateError: the target holds another run.
    """
    copied = copy_identity(source, target)
    copied += Copied(*copy_log(source, target))
    return copied + copy_tags(source, target)


def copy_identity(source: Store, target: Store) -> Copied:
    """Make the target the same run as the source.

    Raises:
        StateError: it is another run already.
        StoreError: the target's server overwrites what is to be created only if absent.
    """
    prove_create(target)
    identity = read_identity(source)
    raw = source.read(RUN)
    try:
        found = read_identity(target)
    except (NotARun, IntegrityError) as e:
        check_is_of(target, identity.run, source)
        (target.create if isinstance(e, NotARun) else target.replace)(RUN, raw)
    else:
        if found.run != identity.run:
            raise StateError(
                f"{target.url} holds the run {found.run}, and {source.url} the run {identity.run}; "
                "copies of a run go to a place of their own"
            )
        return Copied()
    return Copied(1, len(raw))


def check_is_of(target: Store, run: str, source: Store) -> None:
    """Raise StateError when a checkpoint shows that a store without a sound identity is not of the run of `source`."""
    for key in target.names(CHECKPOINTS):
        try:
            found = read_manifest(target, key)[1].run
        except IntegrityError:
            continue
        if found != run:
            raise StateError(
                f"{target.url}/{key} is of run {found}, and {source.url} is run {run}; copies of a run go to a "
                "place of their own, and what is damaged is mended from copies of the same run"
            )


def copy_tags(source: Store, target: Store, attempts: Collection[str] | None = None) -> Copied:
    """Copy tags: each that the target lacks, has damaged, or has older than the source; with `attempts`, those that
    point to one of them."""
    copied = Copied()
    for found in source.list(TAGS):
        try:
            raw = source.read(found.key)
            tag = decode_tag(raw, found.key)
        except NotFound:  # removed meanwhile
            continue
        except IntegrityError as e:
            logger.warning("a tag of %s is not copied: %s", source.url, e)
            continue
        wanted = attempts is None or tag.attempt in attempts
        if wanted and not _has_tag(target, found.key, raw, tag.time):
            target.replace(found.key, raw)
            copied += Copied(1, len(raw))
    return copied


def _has_tag(target: Store, key: str, raw: bytes, time: float) -> bool:
    """Return whether the target has this very tag, or a sound one that was set later."""
    try:
        present = target.read(key)
        return present == raw or decode_tag(present, key).time > time
    except (NotFound, IntegrityError):
        return False
