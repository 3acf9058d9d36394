"""What listings, policies and deletion ask of a manifest, without its trees: one small summary each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from holdfast.catalog.keys import CHECKPOINTS, TRASH, parse_manifest_key, parse_trash_key, plain_key
from holdfast.catalog.readers import Readers, find_readers
from holdfast.core.errors import HoldfastError
from holdfast.core.records import CheckpointRecord
from holdfast.format.manifest import ClockDoc, Manifest, clock_from_doc, decode_manifest, floats_from_doc
from holdfast.format.trash import decode_trash
from holdfast.stores import Store

__all__ = ["Summaries", "Summary", "read_summary", "summarize"]


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A manifest without its trees. `files` is the JSON of its data files' sizes by key, kept as it is until asked for.

    The other members are those of the manifest; `stored_bytes` is the sum of the sizes.
    """

    step: int
    attempt: str
    generation: int
    time: float
    clock: ClockDoc
    files: msgspec.Raw
    stored_bytes: int
    metrics: dict[str, float | str] = {}
    reasons: list[str] = []
    parent: str | None = None
    new_bytes: int = 0
    exact: bool = True
    demoted: bool = False

    def sizes(self) -> dict[str, int]:
        """Return the size of each data file that the checkpoint needs, by key."""
        return _SIZES.decode(self.files)

    def record(self) -> CheckpointRecord:
        """Return the checkpoint as policies see it, but for what tags and the log say of it."""
        return CheckpointRecord(
            step=self.step,
            attempt=self.attempt,
            time=self.time,
            clock=clock_from_doc(self.clock),
            metrics=floats_from_doc(self.metrics),
            reasons=tuple(self.reasons),
            stored_bytes=self.stored_bytes,
            new_bytes=self.new_bytes,
            demoted=self.demoted,
        )


_SIZES = msgspec.json.Decoder(dict[str, int])


def summarize(manifest: Manifest) -> Summary:
    """Return the summary of a manifest."""
    sizes = manifest.file_sizes
    return Summary(
        step=manifest.step,
        attempt=manifest.attempt,
        generation=manifest.generation,
        time=manifest.time,
        clock=manifest.clock,
        files=msgspec.Raw(msgspec.json.encode(sizes)),
        stored_bytes=sum(sizes.values()),
        metrics=manifest.metrics,
        reasons=manifest.reasons,
        parent=manifest.parent,
        new_bytes=manifest.new_bytes,
        exact=manifest.exact,
        demoted=manifest.demoted,
    )


def read_summary(store: Store, key: str) -> Summary:
    """Return what the manifest at a key says, listed or in the trash. Raises NotFound, IntegrityError."""
    raw = store.read(key)
    return summarize(decode_manifest(raw, key) if parse_trash_key(key) is None else decode_trash(raw, key)[0])


class Summaries:
    """The manifests of a run that are known, listed or in the trash, by key; and with them which data is needed.

    What is needed is counted as manifests come and go, so a question costs what it asks for and not the history.
    """

    def __init__(self, known: Mapping[str, Summary] = MappingProxyType({})) -> None:
        self.by_key: dict[str, Summary] = dict(known)
        self.settled = True  # what was deleted last left no data behind that nothing needs
        self.readers = Readers()  # as of the last look
        self._needs: Counter[str] | None = None  # made when first asked for

    def add(self, key: str, summary: Summary) -> None:
        """Take a manifest in, in the place of what was known of its key."""
        self.discard(key)
        self.by_key[key] = summary
        if self._needs is not None:
            self._needs.update(summary.sizes().keys())

    def discard(self, key: str) -> Summary | None:
        """Forget a manifest: it is no longer there."""
        gone = self.by_key.pop(key, None)
        if gone is not None and self._needs is not None:
            self._needs.subtract(gone.sizes().keys())
        return gone

    def needs(self, data_key: str) -> bool:
        """Return whether any known manifest, or a reader, needs a data file, packed or not."""
        if self._needs is None:
            self._needs = Counter(key for summary in self.by_key.values() for key in summary.sizes())
        return self._needs[plain_key(data_key)] > 0 or plain_key(data_key) in self.readers.files

    def complete(self, store: Store) -> bool:
        """Go by what the store lists now, older states of a step and the trash included: forget what is gone, read what
        is new, and look who reads. Return False when one cannot be read, so that what it needs is unknown."""
        listed = [key for key in store.names(CHECKPOINTS) if parse_manifest_key(key) is not None]
        listed += [key for key in store.names(TRASH) if parse_trash_key(key) is not None]
        for key in self.by_key.keys() - set(listed):
            self.discard(key)
        try:
            for key in [key for key in listed if key not in self.by_key]:
                self.add(key, read_summary(store, key))
            self.readers = find_readers(store)
        except HoldfastError:
            return False
        return not self.readers.unknown
