"""A job: one image on its way to a committed checkpoint; the same code in each host."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from holdfast.catalog.checkpoints import Entry, commit
from holdfast.catalog.keys import data_prefix
from holdfast.catalog.lease import Lease
from holdfast.catalog.runlog import write_segment
from holdfast.catalog.tags import Tag, set_tag
from holdfast.core.errors import IntegrityError, OutOfSpace, StoreError
from holdfast.distributed.words import Agreement, Company
from holdfast.format.manifest import DERIVED_VERSION, Derived, FileEntry, Manifest, Part, decode_manifest
from holdfast.format.signing import SigningKey
from holdfast.saving.image import Image
from holdfast.saving.persist import KnownTensors, persist_parts
from holdfast.stores import Store

__all__ = [
    "Ahead",
    "Base",
    "Committed",
    "Committer",
    "Committing",
    "DataWriter",
    "Host",
    "Job",
    "discard",
    "entry_of",
    "set_tags",
    "with_files",
]

logger = logging.getLogger("holdfast")


class Base(msgspec.Struct, frozen=True):
    """The checkpoint that a new one may refer to for what did not change: its manifest's key, and its attempt."""

    key: str
    attempt: str


class Job(msgspec.Struct, frozen=True):
    """What is to become of an image: a manifest without parts yet, the log lines that must be durable before it, and
    the tags to set after it.

    A state that comes in waves is one job for each; all but the last say that there is `more`, and commit nothing.
    """

    manifest: Manifest
    log_key: str
    log_lines: bytes
    tags: list[str]
    base: Base | None
    self_contained: bool = False
    derive: bool = False
    wave: int = 0
    more: bool = False
    agreement: Agreement = Agreement()  # of several ranks


class Committed(msgspec.Struct, frozen=True):
    """A committed checkpoint: its manifest's key and ordinal, each part's files, the bytes that were written, and
    what of each part follows from other tensors.

    A wave of one that is not committed yet has no key.
    """

    key: str
    ordinal: int
    files: dict[str, list[FileEntry]]
    new_bytes: int
    manifest: Manifest | None = None  # where it is not that of the image and the files alone
    derived: dict[str, dict[str, Derived]] = {}


class Host(Protocol):
    """Where jobs are carried out: in this process, or in one of its own that outlives it."""

    @property
    def pid(self) -> int:
        """The process that commits, 0 for this one."""
        ...

    def start(
        self, store: Store, lease: Lease, key: SigningKey | None = None, company: Company | None = None
    ) -> None:
        """Commit under this lease from now on, and sign with this key; in `company` as one of several ranks."""
        ...

    def begin(self, job: Job, image: Image) -> None:
        """Take a job on. The image may still be being copied."""
        ...

    def finish(self, job: Job, image: Image) -> Committed:
        """Return when the job that was begun last is done. Raises what it failed with."""
        ...

    def close(self) -> None:
        """Let the host go; no job is under way."""
        ...


def with_files(
    job: Job,
    image: Image,
    files: dict[str, list[FileEntry]],
    new_bytes: int,
    derived: dict[str, dict[str, Derived]],
) -> Manifest:
    """Return the manifest of a job whose data is written."""
    parts = {
        name: Part(part.tree, part.kind, files[name], part.aliases, derived.get(name, {}))
        for name, part in image.parts.items()
    }
    version = DERIVED_VERSION if derived else job.manifest.format
    return msgspec.structs.replace(job.manifest, format=version, parts=parts, new_bytes=new_bytes)


@dataclass(slots=True)
class Ahead:
    """What the waves of an attempt have written so far."""

    attempt: str = ""
    known: KnownTensors = field(default_factory=KnownTensors)
    written: int = 0
    derived: dict[str, dict[str, Derived]] = field(
        default_factory=dict
    )  # by part; only where all is one wave

    def add(self, wave: KnownTensors, written: int, before: KnownTensors) -> None:
        """Take in what one more wave has written. What is referred to stays behind it, in the order it had `before`."""
        self.written += written
        for name, entries in wave.files.items():
            both = {f.key: f for f in (*self.known.files.get(name, []), *entries)}
            older = [f for f in before.files.get(name, []) if both.pop(f.key, None) is not None]
            self.known.files[name] = [*both.values(), *older]
            self.known.parts.setdefault(name, {}).update(wave.parts[name])


@dataclass(slots=True)
class DataWriter:
    """Writes images as data files, one after the other, and remembers what the newest checkpoint holds. `mark` tells
    the files of one of several ranks from those of the others."""

    store: Store
    mark: str = ""
    _known: KnownTensors | None = None
    _held_by: Base | None = None  # which checkpoint `_known` is of
    _ahead: Ahead = field(default_factory=Ahead)  # what the present attempt has written so far

    def write(self, job: Job, image: Image) -> Ahead:
        """Make what is new of an image durable; return what all waves of its attempt have written."""
        known = self._known_of(job.base)
        step, attempt = job.manifest.step, job.manifest.attempt
        if self._ahead.attempt != attempt:
            self._ahead = Ahead(attempt)
        parts, found, written = persist_parts(
            self.store, step, attempt, image, known,
            self_contained=job.self_contained, wave=job.wave, mark=self.mark,
            derive=job.derive and not (job.wave or job.more),
        )  # fmt: skip
        self._ahead.derived = {name: part.derived for name, part in parts.items() if part.derived}
        image.wait(image.end)
        self._ahead.add(found, written, known)
        return self._ahead

    def committed(self, base: Base) -> None:
        """Note that what the present attempt has written is a checkpoint now."""
        self._known, self._held_by, self._ahead = self._ahead.known, base, Ahead()

    def forget(self) -> None:
        """Note that it may be none, and need not stay."""
        self._known, self._ahead = None, Ahead()

    def _known_of(self, base: Base | None) -> KnownTensors:
        if base is None:
            return KnownTensors()
        if self._known is not None and self._held_by == base:
            return self._known
        try:
            manifest = decode_manifest(self.store.read(base.key), base.key)
            found = KnownTensors.of(self.store, manifest, self.mark)
            self._known, self._held_by = found, base
            return found
        except (IntegrityError, StoreError) as e:
            logger.warning("%s cannot be built on, so everything is written anew: %s", base.key, e)
            return KnownTensors()


class Committing(Protocol):
    """Carries jobs out, one after the other."""

    def carry_out(self, job: Job, image: Image) -> Committed:
        """Make an image a committed checkpoint, or what is this rank's of it. Raises what keeps it from that."""
        ...


class Committer:
    """Carries out the jobs of a process that saves by itself."""

    def __init__(self, store: Store, lease: Lease, key: SigningKey | None = None) -> None:
        self._store, self._lease, self._key = store, lease, key
        self._data = DataWriter(store)

    def carry_out(self, job: Job, image: Image) -> Committed:
        """Make an image a committed checkpoint: data, log, signature, manifest, tags, in this order."""
        step, attempt = job.manifest.step, job.manifest.attempt
        try:
            ahead = self._data.write(job, image)
            if job.more:
                return Committed("", 0, {}, ahead.written)
            write_segment(self._store, job.log_key, job.log_lines)
        except BaseException:
            discard(self._store, step, attempt)
            raise
        files, written = ahead.known.files, ahead.written
        try:
            entry = commit(
                self._store, with_files(job, image, files, written, ahead.derived), self._lease, self._key
            )
        except OutOfSpace:  # and it is not there: a full store must not keep what came to nothing
            self._data.forget()
            discard(self._store, step, attempt)
            raise
        except BaseException:
            self._data.forget()
            raise
        self._data.committed(Base(entry.key, attempt))
        set_tags(self._store, job)
        return Committed(entry.key, entry.ordinal, files, written, derived=ahead.derived)


def set_tags(store: Store, job: Job) -> None:
    """Set the tags of a job that is committed."""
    for tag in job.tags:
        set_tag(store, Tag(tag, job.manifest.step, job.manifest.attempt, job.manifest.time))


def discard(store: Store, step: int, attempt: str) -> None:
    """Free what an attempt wrote that failed before its commit: a full disk must not fill with halves."""
    with contextlib.suppress(StoreError):  # the next owner of the run frees it
        store.delete([o.key for o in store.list(data_prefix(step, attempt))])


def entry_of(job: Job, done: Committed) -> Entry:
    """Return the catalog's entry of a committed job."""
    return Entry(done.key, job.manifest.step, done.ordinal)
