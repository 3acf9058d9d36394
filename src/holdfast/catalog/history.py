"""The history of a run: its checkpoints as records that policies and people read.

What is asked for is read then, and not before: for one checkpoint the names and its manifest; for the whole history the
index, and those manifests that it cannot speak of. A manifest that it speaks of is read when it is opened.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

from holdfast.catalog.checkpoints import Entry, newest_states, read_entry
from holdfast.catalog.deletion import expire, remove
from holdfast.catalog.index import Index
from holdfast.catalog.keys import CHECKPOINTS, TRASH, TRASH_SECONDS, trash_key
from holdfast.catalog.lease import Lease
from holdfast.catalog.readers import find_readers
from holdfast.catalog.runlog import Facts, LogReader
from holdfast.catalog.summary import Summaries, Summary, summarize
from holdfast.catalog.tags import Tag, find_tag, read_tags
from holdfast.catalog.trash import BROKEN, Leaving, retire
from holdfast.core.errors import HoldfastError, LeaseLost, MissingObject, NoCheckpoint, StoreError
from holdfast.core.records import CheckpointRecord
from holdfast.format.events import Event, Removed, Resumed, Started
from holdfast.format.manifest import Manifest
from holdfast.stores import Store

__all__ = ["History", "Marks", "marked_with"]

logger = logging.getLogger("holdfast")

FEW = 16  # manifests that are read rather than the index
INDEX_FROM = 64  # manifests: fewer are read as quickly one by one
BEHIND, BEHIND_AT_CLOSE = (
    64,
    8,
)  # manifests that come and go before the index is stored anew; or more, in a long history


Marks: TypeAlias = tuple[dict[str, set[str]], Facts, frozenset[str]]


def marked_with(record: CheckpointRecord, marks: Marks) -> CheckpointRecord:
    """Return a record with what tags and the log say of it, and whether it is being read."""
    names, facts, read = marks
    attempt = record.attempt
    return replace(
        record,
        metrics={**record.metrics, **facts.metrics.get(attempt, {})},
        tags=frozenset(names.get(attempt, ())),
        verified=attempt in facts.verified,
        resumed_from=attempt == facts.resumed,
        leased=attempt in read,
    )


class History:
    """What a store holds of a run, as of the last `refresh`, and what its owner has done to it since."""

    def __init__(self, store: Store, run: str = "") -> None:
        self.store = store
        self.run = run
        self.free: Callable[[Sequence[str]], None] = store.delete  # of data that nothing needs any more
        self._known = Summaries()
        self.manifests: Mapping[int, tuple[Entry, Manifest]] = _Manifests(self)
        self.broken_tags: list[str] = []
        self._log = LogReader(store)
        self._index = Index(store, run)
        self._named: dict[int, Entry] | None = None  # None: to be listed
        self._broken: dict[int, tuple[Entry, HoldfastError]] = {}
        self._loaded = False  # every entry is in `known` or in `_broken`
        self._manifest_bytes = 0  # as of the last load
        self._opened: tuple[Entry, Manifest] | None = None
        self._records: dict[str, tuple[Summary, CheckpointRecord]] = {}

    # ---- looking --------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look at the store again, when something is next asked for."""
        self._named = None
        self._forget()

    @property
    def _entries(self) -> dict[int, Entry]:
        """The newest state of each step, by its name alone."""
        if self._named is None:
            self._named = newest_states(self.store.names(CHECKPOINTS))
        return self._named

    def _forget(self) -> None:
        self._known, self._broken, self._opened, self._loaded = Summaries(), {}, None, False

    def _load(self) -> None:
        """Know what every checkpoint says: from the index where it can speak, else from its manifest."""
        if self._loaded:
            return
        listed = self.store.list(CHECKPOINTS)
        self._named = newest_states(o.key for o in listed)
        self._forget()
        self._known = Summaries(self._index.prove([*listed, *self.store.list(TRASH)]))
        for entry in [e for e in self._entries.values() if e.key not in self._known.by_key]:
            with contextlib.suppress(HoldfastError):
                self._open(entry)
        self._index.learn(listed, self._known.by_key)
        self._manifest_bytes = sum(o.size for o in listed)
        self._loaded = True

    def _open(self, entry: Entry) -> Manifest:
        """Read a manifest. One that does not verify is kept under `broken`, one that is gone is forgotten."""
        if self._opened is not None and self._opened[0] == entry:
            return self._opened[1]
        try:
            manifest = read_entry(self.store, entry)
            summary = summarize(manifest)
        except MissingObject:  # deleted while we read
            self._entries.pop(entry.step, None)
            raise
        except HoldfastError as e:
            self._broken[entry.step] = (entry, e)
            raise
        self._opened = (entry, manifest)
        if entry.key not in self._known.by_key:
            self._known.add(entry.key, summary)
        return manifest

    @property
    def known(self) -> Summaries:
        """What is known of every manifest, for those who delete."""
        self._load()
        return self._known

    @property
    def broken(self) -> Mapping[int, tuple[Entry, HoldfastError]]:
        """The steps whose manifest was read and does not verify; what the index speaks of is read when it is opened."""
        self._load()
        return self._broken

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint whose manifest verifies, oldest first."""
        self._load()
        return self._sound()

    def _sound(self) -> list[int]:
        """Return the steps whose manifest was read and verifies, once all were; what others deleted is not there."""
        known, broken = self._known.by_key, self._broken
        return [s for s, entry in sorted(self._entries.items()) if entry.key in known and s not in broken]

    @property
    def newest_step(self) -> int | None:
        """The highest step that has a manifest, read or not; None when there is none."""
        return max(self._entries, default=None)

    def entry(self, step: int) -> Entry:
        """Return where the checkpoint of a step lies, sound or broken."""
        return self._entries[step]

    def summary(self, step: int) -> Summary:
        """Return what the manifest of a step says but for its trees. Raises KeyError, IntegrityError."""
        entry = self._entries[step]
        if step in self._broken:
            raise self._broken[step][1]
        if entry.key not in self._known.by_key:
            self._open(entry)
        return self._known.by_key[entry.key]

    # ---- what belongs to it ---------------------------------------------------------------------------------------

    def tags(self) -> dict[str, Tag]:
        """Return the tags that point to a checkpoint of this history; what does not verify goes to `broken_tags`."""
        self.broken_tags = []
        found = read_tags(self.store, lambda e: self.broken_tags.append(str(e)))
        if len(found) > FEW:
            self._load()
        return {name: tag for name, tag in found.items() if self._has(tag)}

    def _has(self, tag: Tag) -> bool:
        try:
            return self.summary(tag.step).attempt == tag.attempt
        except (KeyError, HoldfastError):
            return False

    def events(self) -> list[Event]:
        """Return every event of the run log, oldest first."""
        return self._log.events()

    def turns(self) -> list[Started | Resumed | Removed]:
        """Return what the run log says of takings, resumes and departures, oldest first."""
        return self._log.turns()

    def records(self, tags: Mapping[str, Tag] | None = None) -> list[CheckpointRecord]:
        """Return every checkpoint as policies see it, in step order. `tags` saves reading them again."""
        self._load()
        marks = self.marks(tags)
        marked = {*marks[0], *marks[1].metrics, *marks[1].verified, marks[1].resumed, *marks[2]}
        plain = [self._plain_record(self._entries[step].key) for step in self._sound()]
        return [marked_with(record, marks) if record.attempt in marked else record for record in plain]

    def record(self, step: int) -> CheckpointRecord:
        """Return one checkpoint as policies see it. Raises KeyError, IntegrityError."""
        return marked_with(self.plain_record(step), self.marks())

    def marks(self, tags: Mapping[str, Tag] | None = None) -> Marks:
        """Return what may be said of checkpoints beside their manifests: tags by attempt, what the log tells, and the
        attempts that are being read."""
        names: dict[str, set[str]] = {}
        for name, tag in (self.tags() if tags is None else tags).items():
            names.setdefault(tag.attempt, set()).add(name)
        return names, self._log.facts(), find_readers(self.store).attempts

    def plain_record(self, step: int) -> CheckpointRecord:
        """Return one checkpoint as policies see it, but for what tags and the log say of it."""
        self.summary(step)
        return self._plain_record(self._entries[step].key)

    def _plain_record(self, key: str) -> CheckpointRecord:
        summary = self._known.by_key[key]
        made = self._records.get(key)
        if made is None or made[0] is not summary:
            made = self._records[key] = (summary, summary.record())
        return made[1]

    @property
    def stored_bytes(self) -> int:
        """The bytes of the checkpoints' manifests and of the data that they need; each file counts once."""
        self._load()
        return self._manifest_bytes + self._together(self._sound())

    def stored_together(self, records: Sequence[CheckpointRecord]) -> int:
        """Return the bytes that some checkpoints take together; a file that several refer to counts once."""
        return self._together([r.step for r in records if r.step in self._entries])

    def _together(self, steps: Sequence[int]) -> int:
        sizes: dict[str, int] = {}
        for step in steps:
            sizes.update(self.summary(step).sizes())
        return sum(sizes.values())

    # ---- finding one ----------------------------------------------------------------------------------------------

    def resolve(self, which: int | str) -> tuple[Entry, Manifest]:
        """Return the checkpoint of a step, "latest", or a tag. Only its manifest is read. The latest is the newest that
        has a sound one; a warning tells which newer ones were passed over.

        Raises:
            NoCheckpoint: there is none; the message lists what there is.
        """
        if isinstance(which, str) and which.isdigit():
            which = int(which)
        if which == "latest":
            for step in sorted(self._entries, reverse=True):
                try:
                    return self.manifests[step]
                except (KeyError, MissingObject):  # deleted while we read
                    continue
                except HoldfastError as e:
                    logger.warning("step %d of %s is passed over: %s", step, self.store.url, e)
        else:
            step = which if isinstance(which, int) else self._step_of(which)
            with contextlib.suppress(KeyError, MissingObject):
                return self.manifests[step]
        have = ", ".join(map(str, self.steps[-8:])) or "none"
        raise NoCheckpoint(f"{self.store.url} has no checkpoint {which!r}; its newest steps are: {have}")

    def key_of(self, which: int | str) -> str | None:
        """Return the key of the manifest of a step, sound or broken, or of a tag; None if there is none."""
        with contextlib.suppress(HoldfastError):
            number = isinstance(which, int) or which.isdigit()
            step = int(which) if number else self._step_of(str(which))
            return self._entries[step].key if step in self._entries else None
        return None

    def _step_of(self, name: str) -> int:
        tag = find_tag(self.store, name)
        if tag is not None and self._has(tag):
            return tag.step
        have = ", ".join(sorted(self.tags())) or "none"
        raise NoCheckpoint(f"{self.store.url} has no tag {name!r}; its tags are: {have}")

    # ---- acts of the owner ----------------------------------------------------------------------------------------

    def take(self, entry: Entry, manifest: Manifest) -> None:
        """Take a committed checkpoint in; the state of the same step before it is removed."""
        was_broken = self._broken.pop(entry.step, None) is not None
        before = None if was_broken else self._entries.get(entry.step)
        self._entries[entry.step] = entry
        self._known.add(entry.key, summarize(manifest))
        self._known.settled &= not was_broken  # it stays, and what it may need
        self._opened = (entry, manifest)
        if before is not None and before != entry:
            self._load()
            remove(self.store, [before], self._known, self.free)

    def drop(self, steps: Sequence[int]) -> int:
        """Delete checkpoints, sound or broken, and the data that only they need; return the bytes freed."""
        self._load()
        return remove(self.store, [self._leave(step) for step in steps], self._known, self.free)

    def _leave(self, step: int) -> Entry:
        self._broken.pop(step, None)
        entry = self._entries.pop(step)
        self._records.pop(entry.key, None)
        return entry

    def set_aside(
        self,
        steps: Sequence[int],
        *,
        now: float,
        grace_seconds: int = TRASH_SECONDS,
        why: Mapping[int, Sequence[str]] = MappingProxyType({}),
        tags: Mapping[str, Tag] = MappingProxyType({}),
    ) -> dict[int, str]:
        """Put checkpoints, sound or broken, into the trash; return their attempts (BROKEN for a broken one)."""
        self._load()
        attempts = {s: BROKEN if s in self._broken else self.summary(s).attempt for s in steps}
        leaving = [
            Leaving(
                self._leave(step), attempt, tuple(why.get(step, ())),
                tuple(sorted(n for n, tag in tags.items() if tag.attempt == attempt and not tag.automatic)),
            )
            for step, attempt in attempts.items()
        ]  # fmt: skip
        retire(self.store, leaving, now=now, grace_seconds=grace_seconds)
        for one in leaving:
            summary = self._known.discard(one.entry.key)
            if summary is not None:
                self._known.add(trash_key(one.entry.step, one.attempt, grace_seconds), summary)
        return attempts

    def empty_trash(self, keys: Sequence[str]) -> int:
        """Take checkpoints out of the trash for good, by their keys there; return the bytes freed."""
        self._load()
        return expire(self.store, keys, self._known, self.free)

    def only_of(self, steps: Sequence[int]) -> int:
        """Return the bytes of the data that of all sound listed checkpoints only these need."""
        self._load()
        sizes: dict[str, int] = {}
        kept: set[str] = set()
        for step in self._sound():
            needed = self.summary(step).sizes()
            if step in steps:
                sizes |= needed
            else:
                kept |= needed.keys()
        return sum(size for key, size in sizes.items() if key not in kept)

    def index(self, lease: Lease, *, closing: bool = False) -> None:
        """Store the index anew when it is far behind. It is a cache: that it cannot be stored is no failure."""
        if not self._loaded:
            return
        said = self._known.by_key
        behind, many = self._index.behind(said), len(said)
        due = max(BEHIND_AT_CLOSE, many // 1024) if closing else max(BEHIND, many // 128)
        if behind >= due and max(many, behind) >= INDEX_FROM:
            with contextlib.suppress(StoreError, LeaseLost):  # the next commit will say so
                self._index.rewrite(said, lease)


class _Manifests(Mapping[int, tuple[Entry, Manifest]]):
    """The checkpoints of a history by step; each manifest is read when it is taken out."""

    def __init__(self, history: History) -> None:
        self._history = history

    def __getitem__(self, step: int) -> tuple[Entry, Manifest]:
        history = self._history
        entry = history._entries[step]
        if step in history._broken:
            raise history._broken[step][1]
        return entry, history._open(entry)

    def __contains__(self, step: object) -> bool:
        return step in self._history.steps

    def __iter__(self) -> Iterator[int]:
        return iter(self._history.steps)

    def __len__(self) -> int:
        return len(self._history.steps)
