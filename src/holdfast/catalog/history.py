"""The history of a run: its checkpoints as records that policies and people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.catalog.checkpoints import Entry, entries, read_entry
from holdfast.catalog.runlog import LogReader
from holdfast.catalog.tags import Tag, read_tags
from holdfast.core.errors import HoldfastError, MissingObject, NoCheckpoint
from holdfast.core.records import CheckpointRecord
from holdfast.format.events import Event, Observed, Resumed, Verified
from holdfast.format.manifest import Manifest, clock_from_doc, floats_from_doc
from holdfast.stores import Store

__all__ = ["History"]


class History:
    """What a store holds of a run. `refresh` reads what is new; manifests never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifests: dict[int, tuple[Entry, Manifest]] = {}
        self.broken: dict[int, tuple[Entry, HoldfastError]] = {}
        self.broken_tags: list[str] = []
        self._log = LogReader(store)

    def refresh(self) -> None:
        """Bring the history up to date with the store. A manifest that does not verify is kept under `broken`."""
        found = entries(self.store)
        present: dict[int, tuple[Entry, Manifest]] = {}
        self.broken = {}
        for entry in found:
            known = self.manifests.get(entry.step)
            if known is not None and known[0] == entry:
                present[entry.step] = known
                continue
            try:
                present[entry.step] = (entry, read_entry(self.store, entry))
            except MissingObject:  # deleted while we read
                continue
            except HoldfastError as e:
                self.broken[entry.step] = (entry, e)
        self.manifests = present

    @property
    def known(self) -> dict[str, Manifest]:
        """The manifests that were read, by key."""
        return {entry.key: manifest for entry, manifest in self.manifests.values()}

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint whose manifest verifies, oldest first."""
        return sorted(self.manifests)

    def tags(self) -> dict[str, Tag]:
        """Return the tags that point to a checkpoint of this history; what does not verify goes to `broken_tags`."""
        self.broken_tags = []
        return {
            name: tag
            for name, tag in read_tags(self.store, lambda e: self.broken_tags.append(str(e))).items()
            if tag.step in self.manifests and self.manifests[tag.step][1].attempt == tag.attempt
        }

    def events(self) -> list[Event]:
        """Return every event of the run log, oldest first."""
        return self._log.events()

    def records(self, events: list[Event] | None = None) -> list[CheckpointRecord]:
        """Return every checkpoint as policies see it, in step order."""
        events = self.events() if events is None else events
        tags: dict[str, set[str]] = {}
        for name, tag in self.tags().items():
            tags.setdefault(tag.attempt, set()).add(name)
        observed = late_metrics(events)
        verified = {e.attempt for e in events if isinstance(e, Verified)}
        resumed = [e.attempt for e in events if isinstance(e, Resumed)]
        return [
            CheckpointRecord(
                step=m.step,
                attempt=m.attempt,
                time=m.time,
                clock=clock_from_doc(m.clock),
                metrics=floats_from_doc(m.metrics) | observed.get(m.attempt, {}),
                tags=frozenset(tags.get(m.attempt, ())),
                reasons=tuple(m.reasons),
                stored_bytes=m.stored_bytes,
                new_bytes=m.new_bytes,
                verified=m.attempt in verified,
                resumed_from=bool(resumed) and m.attempt == resumed[-1],
                demoted=m.demoted,
            )
            for _, m in (self.manifests[s] for s in self.steps)
        ]

    def stored_together(self, records: Sequence[CheckpointRecord]) -> int:
        """Return the bytes that some checkpoints take together; a file that several refer to counts once."""
        manifests = [self.manifests[r.step][1] for r in records if r.step in self.manifests]
        return sum({f.key: f.size for m in manifests for p in m.parts.values() for f in p.files}.values())

    def resolve(self, which: int | str) -> tuple[Entry, Manifest]:
        """Return the checkpoint of a step, "latest", or a tag.

        Raises:
            NoCheckpoint: there is none; the message lists what there is.
        """
        if isinstance(which, str) and which.isdigit():
            which = int(which)
        step = self._step_of(which)
        if step in self.manifests:
            return self.manifests[step]
        if step in self.broken:
            raise self.broken[step][1]
        have = ", ".join(map(str, self.steps[-8:])) or "none"
        raise NoCheckpoint(f"{self.store.url} has no checkpoint {which!r}; its newest steps are: {have}")

    def _step_of(self, which: int | str) -> int:
        if isinstance(which, int):
            return which
        if which == "latest":
            return self.steps[-1] if self.steps else -1
        tags = self.tags()
        if which in tags:
            return tags[which].step
        have = ", ".join(sorted(tags)) or "none"
        raise NoCheckpoint(f"{self.store.url} has no tag {which!r}; its tags are: {have}")


def late_metrics(events: list[Event]) -> Mapping[str, dict[str, float]]:
    """Return, by attempt, the metrics attached to checkpoints after their commit."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if isinstance(event, Observed) and event.attempt is not None:
            found.setdefault(event.attempt, {}).update(floats_from_doc(event.metrics))
    return found
