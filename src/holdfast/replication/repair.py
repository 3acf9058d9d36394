"""Repair: mend what is wrong with a run from copies of it that verify.

Nothing that is whole is touched, and nothing takes the place of anything before it was verified to its last byte. What
is whole nowhere is named and stays as it is. A data file is put together block by block, from what is whole of it here
and elsewhere. Data comes before the manifests that need it, so a repair that is cut off anywhere has listed nothing
that is not whole, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.keys import DATA, packed_key
from holdfast.catalog.lease import Lease, acquire
from holdfast.catalog.proofs import Proofs
from holdfast.catalog.runlog import LogReader, LogWriter
from holdfast.catalog.verify import verify_file
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import HoldfastError, IntegrityError, LeaseHeld, NotFound, StoreError
from holdfast.format.events import Verified
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.format.packed import Pack
from holdfast.replication.copying import send_blocks
from holdfast.replication.mending import Hands, Mended, RepairReport
from holdfast.replication.mending_beside import (
    mend_caches,
    mend_identity,
    mend_log,
    mend_signatures,
    mend_tags,
)
from holdfast.replication.merged_log import events_of, merge_log, untagged
from holdfast.replication.streaming import verified_pieces
from holdfast.replication.witnesses import Sought, Witnesses
from holdfast.stores import Store, open_store

__all__ = ["repair"]


@dataclass(slots=True)
class _Repair:
    """One repair at work."""

    hands: Hands
    sources: Sequence[Store]
    time: TimeSource
    progress: Callable[[int], None]
    proofs: Proofs
    whole: dict[str, bool] = field(
        default_factory=dict
    )  # data files that were looked at, and how they are now
    checked: int = 0
    checked_bytes: int = 0

    @property
    def target(self) -> Store:
        return self.hands.target

    def mend_data(self, entry: FileEntry) -> bool:
        """Verify a data file and mend it if need be; return whether it is whole now, or would be."""
        if entry.key in self.whole:
            return self.whole[entry.key]
        was = self._wrong_with(entry)
        self.whole[entry.key] = was is None or self._mend(entry, was)
        return self.whole[entry.key]

    def _wrong_with(self, entry: FileEntry) -> str | None:
        """Return what is wrong with the target's copy of a file; None when every byte is right."""
        problem = next(verify_file(self.target, entry, self.progress), None)
        self.checked += 1
        self.checked_bytes += entry.size
        for key in (entry.key, packed_key(entry.key)):
            with contextlib.suppress(NotFound):
                self.proofs.note(self.target.info(key), self.time.now(), problem.message if problem else "")
                break
        return None if problem is None else problem.message

    def _mend(self, entry: FileEntry, was: str) -> bool:
        copies, reasons = self._copies(entry)
        if not copies:
            self.hands.give_up(entry.key, was, reasons)
            return False
        try:
            if self.hands.dry_run:
                for _ in verified_pieces(copies):
                    pass
            else:
                send_blocks(copies, self.target, pack=self._pack_of(entry))
        except IntegrityError as e:
            self.hands.give_up(entry.key, was, [str(e)])
            return False
        if not self.hands.dry_run:
            still = self._wrong_with(entry)
            if still is not None:
                self.hands.give_up(entry.key, was, [f"it was mended, and is wrong again: {still}"])
                return False
        origin = ", ".join(c.store.url for c in copies if c.store is not self.target)
        self.hands.mended.append(Mended(entry.key, was, origin))
        return True

    def _copies(self, entry: FileEntry) -> tuple[list[DataFile], list[str]]:
        """Return the copies of a file from which blocks may come, the target's own first: it is the nearest; and why
        others have none."""
        found: list[DataFile] = []
        reasons: list[str] = []
        for store in self.sources:
            try:
                found.append(open_file(store, entry))
            except (IntegrityError, StoreError) as e:
                reasons.append(f"{store.url}: {e}")
        with contextlib.suppress(HoldfastError):
            return [open_file(self.target, entry), *found] if found else [], reasons
        if found and self._has_plain(
            entry
        ):  # its header is wrong: the header of a copy tells the blocks apart
            return [DataFile(self.target, entry, found[0].header), *found], reasons
        return found, reasons

    def _has_plain(self, entry: FileEntry) -> bool:
        with contextlib.suppress(NotFound):
            return self.target.info(entry.key).size > entry.header_size
        return False

    def _pack_of(self, entry: FileEntry) -> Pack | None:
        """Return how to store a file: packed where it is packed already."""
        try:
            self.target.info(packed_key(entry.key))
        except NotFound:
            return None
        return Pack()


def repair(
    run: str | os.PathLike[str] | Store,
    sources: Sequence[str | os.PathLike[str] | Store],
    *,
    dry_run: bool = False,
    bring_back: bool = True,
    lease: Lease | None = None,
    progress: Callable[[int], None] = lambda done: None,
    planned: Callable[[int], None] = lambda total: None,
    time: TimeSource | None = None,
) -> RepairReport:
    """Mend a run from copies of it, and say what was mended, what is lost, and what has to wait.

    The run's lease is taken for it, unless `lease` is one that the caller holds. While a training process holds it only
    data files are mended. With `bring_back`, checkpoints and tags come back that are gone here and were not removed on
    purpose. `dry_run` changes nothing, and reads as much. `planned` is told how many bytes are to be read at least, and
    `progress` how many were.

    Raises:
        NotARun: the run, or a source, is none.
        StateError: a source is another run.
        StoreError: the run's store failed; what was mended before stays.
    """
    target, places = open_store(run), [open_store(source) for source in sources]
    time = time or SystemTime()
    witnesses = Witnesses.of(target, places)
    with _held(target, lease, time, dry_run=dry_run) as busy:
        hands = Hands(target, dry_run, busy)
        mend_identity(hands, witnesses)
        work = _Repair(hands, places, time, progress, Proofs.of(target, witnesses.run))
        log = merge_log(target, places)
        events = events_of(log)
        sought = witnesses.seek(events, bring_back=bring_back)
        planned(sum(f.size for f in _files(sought.all)))
        here = sought.needed_here
        for entry in _files(sought.all):
            if entry.key in here or not hands.busy:
                work.mend_data(entry)
        mend_log(hands, log)
        for manifest in sought.all:
            mend_signatures(hands, places, manifest)
        _mend_manifests(work, sought)  # durability: behind everything that they need
        attempts = {m.attempt for m in sought.all}
        mend_tags(hands, places, attempts, untagged(events), bring_back=bring_back)
        mend_caches(hands)
        if not dry_run:
            work.proofs.save(target, {o.key for o in target.list(DATA)})
            _note_whole(work, sought)
    return RepairReport(
        target.url, dry_run, work.checked, work.checked_bytes,
        tuple(hands.mended), tuple(hands.lost), tuple(hands.left),
    )  # fmt: skip


@contextlib.contextmanager
def _held(target: Store, lease: Lease | None, time: TimeSource, *, dry_run: bool) -> Iterator[str]:
    """Hold the run for writing; yield who else does, as words for what has to wait, empty when nobody."""
    if lease is not None or dry_run:
        yield ""
        return
    try:
        own = acquire(target, time)
    except LeaseHeld as e:
        yield f"it waits, because {e}"
        return
    try:
        yield ""
    finally:
        own.release()


def _files(manifests: Sequence[Manifest]) -> list[FileEntry]:
    return list({f.key: f for m in manifests for part in m.parts.values() for f in part.files}.values())


def _mend_manifests(work: _Repair, sought: Sought) -> None:
    """Put manifests in place. One that is gone comes back only with its data; one that is there is mended anyway."""
    for found in sought.found:
        if found.missing and not work.hands.busy and not all(map(work.mend_data, _files([found.manifest]))):
            work.hands.give_up(found.key, found.was, ["its data is whole nowhere, so it stays away"])
        else:
            work.hands.place(found.key, found.raw, found.was, found.origin, new=found.missing)
    work.hands.lost += sought.lost


def _note_whole(work: _Repair, sought: Sought) -> None:
    """Say in the run log that checkpoints which were known to be damaged are whole again."""
    if work.hands.busy:
        return
    facts = LogReader(work.target).facts()
    log = LogWriter(work.target, f"o{secrets.token_hex(6)}")
    for manifest in sought.all:
        known = facts.found.get(manifest.attempt)
        if known is not None and not known[1] and all(work.whole.get(k) for k in manifest.file_keys):
            log.record(Verified(work.time.now(), manifest.step, manifest.attempt))
    log.flush()
