"""Scrub: read again, a little at a time, everything that the checkpoints of a run need, and say what is wrong.

What was proven longest ago is read first, each file once however many checkpoints need it. What was proven is
recorded as it goes (`catalog.proofs`), so a scrub that was killed goes on where it was. It needs no lease: the run may
be written, and checkpoints may go, meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from holdfast.catalog.beside import verify_beside
from holdfast.catalog.content import open_file
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import CHECKPOINTS, DATA, packed_key, parse_manifest_key
from holdfast.catalog.proofs import Proofs
from holdfast.catalog.runlog import Facts, LogReader, LogWriter
from holdfast.catalog.verify import Problem, unheld_tensors, verify_file
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, OutOfSpace, PermissionDenied
from holdfast.format.events import Damaged, Verified
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.replication.copying import read_manifest
from holdfast.stores import ObjectInfo, Store

__all__ = ["ScrubLimits", "ScrubReport", "scrub"]

logger = logging.getLogger("holdfast")

SAVE_SECONDS = 10.0  # of work that a kill may cost, besides the file that is being read


@dataclass(frozen=True, slots=True)
class ScrubLimits:
    """How much to do: begin no further file after `max_seconds`; read what was not proven for `older_than_seconds`,
    instead of all."""

    max_seconds: float | None = None
    older_than_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """What a scrub found. `problems` are by object, and `damaged` are the steps that need one of those objects; `left`
    is how many files were not reached in time, `recorded` whether the proofs could be stored."""

    run: str
    files: int
    bytes: int
    left: int
    left_bytes: int
    problems: tuple[Problem, ...]
    damaged: tuple[int, ...]
    verified: tuple[int, ...]
    recorded: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class _Listed:
    """A checkpoint that is listed: all of its manifest that is needed here."""

    step: int
    attempt: str
    files: frozenset[str]

    @staticmethod
    def of(manifest: Manifest) -> _Listed:
        return _Listed(manifest.step, manifest.attempt, manifest.file_keys)


@dataclass(slots=True)
class _Wanted:
    """A data file, as it is listed, and the checkpoints that need it."""

    entry: FileEntry
    found: ObjectInfo | None = None
    owners: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Scrub:
    """One scrub at work."""

    store: Store
    time: TimeSource
    proofs: Proofs
    facts: Facts
    log: LogWriter
    since: float
    listed: dict[str, _Listed] = field(default_factory=dict)
    wanted: dict[str, _Wanted] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    damaged: dict[str, list[str]] = field(default_factory=dict)  # keys of wrong objects, by manifest
    broken: set[int] = field(default_factory=set)  # steps whose manifest is wrong
    verified: list[int] = field(default_factory=list)
    recorded: bool = True
    saved_at: float = 0.0

    # ---- what is to be read ---------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read the manifests, and what lies beside them."""
        for key in self.store.names(CHECKPOINTS):
            parsed = parse_manifest_key(key)
            if parsed is None:
                continue
            try:
                self._take(key, read_manifest(self.store, key)[1])
            except IntegrityError as e:
                if key in self.store.names(CHECKPOINTS):  # else it was removed meanwhile
                    self.problems.append(Problem(key, str(e)))
                    self.broken.add(parsed[0])
        self.problems += verify_beside(self.store)
        there = {o.key: o for o in self.store.list(DATA)}
        for key, wanted in self.wanted.items():
            wanted.found = there.get(key) or there.get(packed_key(key))

    def _take(self, key: str, manifest: Manifest) -> None:
        self.listed[key] = _Listed.of(manifest)
        files = {f.key: f for part in manifest.parts.values() for f in part.files}
        for entry in files.values():
            self.wanted.setdefault(entry.key, _Wanted(entry)).owners.append(key)

    def queue(self) -> list[_Wanted]:
        """Return what is to be read, that which was proven longest ago first, and the unproven before all."""
        now = self.time.now()
        ages = {key: self._proven(w, now) for key, w in self.wanted.items()}
        due = [key for key, proven in ages.items() if proven is None or proven < self.since]
        return [self.wanted[key] for key in sorted(due, key=lambda key: (ages[key] or 0.0, key))]

    def _proven(self, wanted: _Wanted, now: float) -> float | None:
        return None if wanted.found is None else self.proofs.proven(wanted.found, now)

    # ---- reading it -----------------------------------------------------------------------------------------------

    def read(self, wanted: _Wanted, progress: Callable[[int], None]) -> bool:
        """Read one file in full; return whether it counts: one that nothing needs any more does not."""
        problems = list(verify_file(self.store, wanted.entry, progress))
        if problems:
            # A store that is away says so when manifests are read: it proves nothing about the file.
            if not any(self._is_listed(key) for key in wanted.owners):
                return False
            for key in wanted.owners:
                self.damaged.setdefault(key, []).append(wanted.entry.key)
            self.problems += problems
        with contextlib.suppress(NotFound):
            found = wanted.found or self.store.info(wanted.entry.key)
            self.proofs.note(found, self.time.now(), problems[0].message if problems else "")
        return True

    def recall(self, wanted: _Wanted) -> None:
        """Say again what was wrong with a file that was not reached this time."""
        proof = self.proofs.objects.get(wanted.found.key) if wanted.found is not None else None
        if proof is not None and proof.problem:
            self.problems.append(Problem(wanted.entry.key, f"{proof.problem} (when it was last read)"))
            for key in wanted.owners:
                self.damaged.setdefault(key, []).append(wanted.entry.key)

    def _is_listed(self, key: str) -> bool:
        """Return whether a checkpoint is still there, and still the same one."""
        try:
            return _Listed.of(read_manifest(self.store, key)[1]) == self.listed[key]
        except IntegrityError:
            return False

    def conclude(self, *, whole: bool) -> None:
        """Note in the run log which checkpoints were proven, or found damaged, since this scrub's pass began."""
        now = self.time.now()
        unproven = {key for key, w in self.wanted.items() if not self._is_fresh(w, now)}
        known = self.facts.verified
        for key, one in self.listed.items():
            if key in self.damaged:
                if self.facts.found.get(one.attempt, (0.0, True))[1]:
                    self._record(Damaged(now, one.step, one.attempt, sorted(self.damaged[key])))
            elif unproven.isdisjoint(one.files):
                if one.attempt not in known:
                    if not self._holds_all(key):
                        continue
                    self._record(Verified(now, one.step, one.attempt))
                self.verified.append(one.step)
        if whole and self.proofs.ended is None:
            self.proofs.ended = now
        self.save()

    def _record(self, event: Verified | Damaged) -> None:
        self.log.record(event)
        self.facts.add(event)

    def _is_fresh(self, wanted: _Wanted, now: float) -> bool:
        proven = self._proven(wanted, now)
        return proven is not None and proven >= self.since

    def _holds_all(self, key: str) -> bool:
        """Return whether the files of a checkpoint hold every tensor of it; what they lack is a problem."""
        try:
            _, manifest = read_manifest(self.store, key)
            held = {
                name: [open_file(self.store, entry) for entry in part.files]
                for name, part in manifest.parts.items()
            }
        except IntegrityError:
            return False
        missing = list(unheld_tensors(manifest, held))
        self.problems += [Problem(key, f"{key}: {problem.message}") for problem in missing]
        return not missing

    # ---- keeping it -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Store what was proven so far."""
        self.saved_at = self.time.monotonic()
        needed = {w.found.key for w in self.wanted.values() if w.found is not None}
        self.recorded = self.recorded and self.proofs.save(self.store, needed)
        try:
            if self.recorded:
                self.log.flush()
        except (PermissionDenied, OutOfSpace) as e:
            logger.warning("what was proven is not in the run log: %s", e)
            self.recorded = False


def scrub(
    store: Store,
    limits: ScrubLimits | None = None,
    *,
    progress: Callable[[int], None] = lambda done: None,
    planned: Callable[[int], None] = lambda total: None,
    time: TimeSource | None = None,
) -> ScrubReport:
    """Read and verify what the checkpoints of a run need, and record what was proven.

    Without limits everything is read once; a scrub that was interrupted is continued. `planned` is told how many bytes
    are to be read, `progress` how many were. To read at a lower rate, give a `stores.wrappers.Throttled` store.

    Raises:
        NotARun, IntegrityError: there is no run, or its `run.json` does not verify.
        StoreError: the store is away; what was proven until then is recorded.
    """
    time, limits = time or SystemTime(), limits or ScrubLimits()
    run = read_identity(store).run
    proofs = Proofs.of(store, run)
    begun = time.monotonic()
    since = _begin(proofs, limits, time.now())
    log = LogWriter(store, f"o{secrets.token_hex(6)}")
    work = _Scrub(store, time, proofs, LogReader(store).facts(), log, since, saved_at=begun)
    work.look()
    queue = work.queue()
    planned(sum(w.entry.size for w in queue))
    done: list[_Wanted] = []
    reached = 0
    try:
        for wanted in _until(queue, limits, begun, time):
            reached += 1
            if work.read(wanted, progress):
                done.append(wanted)
            if time.monotonic() - work.saved_at >= SAVE_SECONDS:
                work.save()
    except BaseException:
        with contextlib.suppress(HoldfastError):
            work.save()
        raise
    left = queue[reached:]
    work.conclude(whole=not left)
    for wanted in left:
        work.recall(wanted)
    steps = sorted({*work.broken, *(work.listed[key].step for key in work.damaged)})
    return ScrubReport(
        store.url, len(done), sum(w.entry.size for w in done), len(left), sum(w.entry.size for w in left),
        tuple(work.problems), tuple(steps), tuple(sorted(work.verified)), work.recorded, time.monotonic() - begun,
    )  # fmt: skip


def _begin(proofs: Proofs, limits: ScrubLimits, now: float) -> float:
    """Return since when a proof counts for this scrub: the pass goes on that was not finished, or a new one begins."""
    if limits.older_than_seconds is not None:
        return now - limits.older_than_seconds
    if proofs.ended is not None or proofs.began > now:
        proofs.began, proofs.ended = now, None
    return proofs.began


def _until(
    queue: Sequence[_Wanted], limits: ScrubLimits, begun: float, time: TimeSource
) -> Iterator[_Wanted]:
    """Yield what is to be read until the time is up; one file at least, so that every scrub comes further."""
    for index, wanted in enumerate(queue):
        if limits.max_seconds is not None and index and time.monotonic() - begun >= limits.max_seconds:
            return
        yield wanted
