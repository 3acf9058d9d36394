"""The run log: append-only segments, one series per writer, read back as one list of events."""

from __future__ import annotations

import itertools
import logging
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.catalog.keys import LOG, log_key
from holdfast.core.errors import IntegrityError, InvalidFormat
from holdfast.format.events import (
    Damaged,
    Event,
    Observed,
    Removed,
    Resumed,
    Saved,
    Started,
    Verdicted,
    Verified,
    decode_events,
    encode_event,
)
from holdfast.format.manifest import floats_from_doc
from holdfast.format.sealed import LINE_DIGEST_CHARS
from holdfast.stores import ObjectInfo, Store
from holdfast.stores.base import MAX_WHOLE_BYTES

__all__ = ["Facts", "LogReader", "LogWriter", "check_segment", "timeline", "write_segment"]


logger = logging.getLogger("holdfast")

SEGMENT_BYTES = 256 << 10


class LogWriter:
    """Collects events and makes them durable on `flush`. Each writer has a series of segments of its own.

    Where a store cannot append, a segment grows by being replaced, up to a bound, so that a long run's log stays a few
    objects. Only one that nobody is about to write grows: what is taken while another is under way gets a new one.
    """

    def __init__(self, store: Store, writer: str) -> None:
        self._store = store
        self._writer = writer
        self._pending: list[bytes] = []
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._numbers = itertools.count(1)
        self._key = log_key(writer, 0)
        self._held = b""  # by the present segment, where it grows by being replaced
        self._under_way: dict[str, int] = {}  # segments that were taken: how much of each was durable before

    def record(self, event: Event) -> None:
        """Add an event; it is durable after the next `flush`."""
        line = encode_event(event)
        with self._lock:
            self._pending.append(line)

    def take(self) -> tuple[str, bytes]:
        """Return (segment, bytes) for someone else to write what is not durable yet: lines for its end where the store
        can append, else all that it is to hold. Tell what became of it: `wrote` or `give_back`."""
        with self._lock:
            lines, self._pending = b"".join(self._pending), []
            if not lines or self._store.appendable:
                return self._key, lines
            if not self._held or self._key in self._under_way or len(self._held) >= SEGMENT_BYTES:
                self._begin_segment()
            self._under_way[self._key] = len(self._held)
            return self._key, self._held + lines

    def wrote(self, key: str, data: bytes) -> None:
        """Note that what was taken is durable."""
        with self._lock:
            self._under_way.pop(key, None)
            if data and key == self._key:
                self._held = data

    def give_back(self, key: str, data: bytes) -> None:
        """Take lines back whose write failed. Their segment is never touched again: the next one gets them."""
        with self._lock:
            lines = data[self._under_way.pop(key, 0) :]
            if lines:
                self._pending = [lines, *self._pending]
            self._begin_segment()

    def _begin_segment(self) -> None:
        self._key, self._held = log_key(self._writer, next(self._numbers)), b""

    def flush(self) -> None:
        """Make every recorded event durable."""
        with self._flushing:
            key, lines = self.take()
            try:
                write_segment(self._store, key, lines)
            except BaseException:
                self.give_back(key, lines)
                raise
            self.wrote(key, lines)


def write_segment(store: Store, key: str, lines: bytes) -> None:
    """Make lines of the log durable, at the end of a segment where the store can append."""
    if lines:
        (store.append if store.appendable else store.replace)(key, lines)


def check_segment(raw: bytes, key: str) -> None:
    """Raise IntegrityError when a line of a segment does not verify, or the whole is another segment."""
    events = decode_events(raw, key)
    holder = _HOLDER.fullmatch(key)
    expected = int(holder[1]) if holder else None
    found = {e.generation for e in events if isinstance(e, Started)}
    if found - {expected} or (holder and not int(holder[2]) and events and not found):
        said = f"that of generation {min(found)}" if found else "none of the holder's"
        raise InvalidFormat(f"{key}: holds another segment of the log, {said}; files were swapped")


@dataclass(slots=True)
class Facts:
    """What the log says of checkpoints: metrics attached after a commit and when it was last found whole, or not, by
    attempt; and the attempt that training last went on from."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    found: dict[str, tuple[float, bool]] = field(default_factory=dict)
    resumed: str | None = None

    @property
    def verified(self) -> set[str]:
        """The attempts of which every byte was right when it was last read."""
        return {attempt for attempt, (_, whole) in self.found.items() if whole}

    def add(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, Observed) and event.attempt is not None:
            self.metrics.setdefault(event.attempt, {}).update(floats_from_doc(event.metrics))
        elif isinstance(event, (Verified, Damaged)):
            self._find(event.attempt, event.time, whole=isinstance(event, Verified))
        elif isinstance(event, Resumed):
            self.resumed = event.attempt

    def _find(self, attempt: str, time: float, *, whole: bool) -> None:
        """Take in what was found; who writes without the lease has segments in no particular order, so times count."""
        before = self.found.get(attempt, (time, True))
        if before[0] < time or (before[0] == time and before[1]):
            self.found[attempt] = (time, whole)

    def join(self, later: Facts) -> None:
        """Take in what a later segment says."""
        for attempt, metrics in later.metrics.items():
            self.metrics.setdefault(attempt, {}).update(metrics)
        for attempt, (time, whole) in later.found.items():
            self._find(attempt, time, whole=whole)
        self.resumed = self.resumed if later.resumed is None else later.resumed


_HOLDER = re.compile(rf"{LOG}/g(\d{{12}})-(\d{{6}})\.jsonl")

# Lines that say nothing of a checkpoint, as `encode_event` writes them: nearly all of a long log. They are told by how
# they begin, and what the loop observed by its attempt, in front of the digest. Lines written in another way are read.
_OF_THE_LOOP = (b'{"event":"saved",', b'{"event":"started",', b'{"event":"verdict",', b'{"event":"removed",')
_OF_TURNS = (b'{"event":"started",', b'{"event":"resumed",', b'{"event":"removed",')
_NO_ATTEMPT = b',"attempt":null,"digest":"'
_NO_ATTEMPT_AT = -len(_NO_ATTEMPT) - LINE_DIGEST_CHARS - len('"}')


def _tells_of_checkpoints(line: bytes) -> bool:
    return not line.startswith(_NO_ATTEMPT, _NO_ATTEMPT_AT) and not line.startswith(_OF_THE_LOOP)


def _tells_of_turns(line: bytes) -> bool:
    return line.startswith(_OF_TURNS)


class LogReader:
    """Reads a run's log; what it has read already it does not read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._segments: dict[str, tuple[int, list[Event]]] = {}
        self._told: dict[str, tuple[int, Facts]] = {}
        self._turned: dict[str, tuple[int, list[Started | Resumed | Removed]]] = {}

    def events(self) -> list[Event]:
        """Return every event of the run, writer by writer in the order they took the run up."""
        found: list[Event] = []
        for info in self._store.list(LOG):
            size, events = self._segments.get(info.key, (0, []))
            whole = self._whole_lines(info, size)
            if whole:
                events = events + self._decode_sound(info.key, size, whole)
                self._segments[info.key] = (size + len(whole), events)
            found += events
        return found

    def facts(self) -> Facts:
        """Return what the log says of checkpoints. Lines about the loop alone are passed over unread."""
        found = Facts()
        for info in self._store.list(LOG):
            size, facts = self._told.get(info.key, (0, Facts()))
            whole = self._whole_lines(info, size)
            if whole:
                for event in self._decode_sound(info.key, size, whole, _tells_of_checkpoints):
                    facts.add(event)
                self._told[info.key] = (size + len(whole), facts)
            found.join(facts)
        return found

    def turns(self) -> list[Started | Resumed | Removed]:
        """Return who took the run up, where training went on from, and which checkpoints went, in the log's order.
        Other lines are passed over unread."""
        found: list[Started | Resumed | Removed] = []
        for info in self._store.list(LOG):
            size, turns = self._turned.get(info.key, (0, []))
            whole = self._whole_lines(info, size)
            if whole:
                events = self._decode_sound(info.key, size, whole, _tells_of_turns)
                turns = turns + [e for e in events if isinstance(e, (Started, Resumed, Removed))]
                self._turned[info.key] = (size + len(whole), turns)
            found += turns
        return found

    def _decode_sound(
        self, key: str, start: int, whole: bytes, tells: Callable[[bytes], bool] | None = None
    ) -> list[Event]:
        """Return the events of the whole lines that a segment has from `start` on, of those that are to be read. One
        that does not verify is reported and left out, as no line needs another."""
        lines = whole.split(b"\n")[:-1]
        try:
            told = whole if tells is None else b"".join(line + b"\n" for line in lines if tells(line))
            return decode_events(told, key)
        except IntegrityError:
            pass
        found: list[Event] = []
        before = self._store.read(key, 0, start).count(b"\n") if start else 0
        for number, line in enumerate(lines, before + 1):
            try:
                if tells is None or tells(line):
                    found += decode_events(line + b"\n", key, number)
            except IntegrityError as e:
                logger.warning("a line of the run log is left out: %s/%s", self._store.url, e)
        return found

    def _whole_lines(self, info: ObjectInfo, start: int) -> bytes:
        """Return the whole lines that a segment has from `start` on."""
        if info.size <= start:
            return b""
        if info.size - start > MAX_WHOLE_BYTES:
            logger.warning("%s is left out: it has %d bytes, which no segment has", info.key, info.size)
            return b""
        raw = self._store.read(info.key, start, info.size)
        return raw[: raw.rfind(b"\n") + 1]


def timeline(events: list[Event]) -> list[Event]:
    """Return the events that belong to the run as it stands: a resume cuts what was seen after its checkpoint.

    That may be of the same step: an epoch ends behind its last one. Where the log does not say when the checkpoint was
    saved, later steps are cut. Observations made after a commit (they name an attempt) are kept: they speak of a
    checkpoint, not of the loop.
    """
    kept: list[Event] = []
    saved: dict[str, tuple[float, ...]] = {}
    last_clock = None
    for event in events:
        if isinstance(event, Saved):
            saved[event.attempt] = event.clock
        if isinstance(event, Resumed):
            end = saved.get(event.attempt, (event.step, math.inf))
            kept = [e for e in kept if not _is_after(e, end)]
            last_clock = None
        if isinstance(event, Observed) and event.attempt is None:
            if last_clock is not None and event.clock <= last_clock:
                continue  # flushed twice: the first flush failed after its bytes were written
            last_clock = event.clock
        kept.append(event)
    return kept


def _is_after(event: Event, end: tuple[float, ...]) -> bool:
    if isinstance(event, Observed):
        return event.attempt is None and event.clock > end
    return isinstance(event, Verdicted) and event.step > end[0]
