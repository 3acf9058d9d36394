"""The run log as all copies of a run tell it together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from holdfast.catalog.keys import LOG
from holdfast.catalog.runlog import check_segment
from holdfast.core.errors import IntegrityError, NotFound
from holdfast.format.events import Event, Untagged, decode_events
from holdfast.replication.segments import find_homes, merge_lines, sound_lines
from holdfast.stores import Store

__all__ = ["MergedSegment", "events_of", "merge_log", "untagged"]


@dataclass(frozen=True, slots=True)
class MergedSegment:
    """A segment of the log: what a run's own store has of it (None: nothing), and the lines of all places together.

    `was` says what is wrong with its own, `still` what the others could not help; `origin` where lines came from.
    """

    key: str
    own: bytes | None
    lines: bytes
    was: str
    still: str
    origin: str

    @property
    def changed(self) -> bool:
        """Whether there is more to it than the run's own store has."""
        own = self.own or b""
        return self.own is None or self.lines != own[: own.rfind(b"\n") + 1]


def merge_log(target: Store, sources: Sequence[Store]) -> list[MergedSegment]:
    """Return every segment that some place has, in the order of the log."""
    own = {o.key: target.read(o.key) for o in target.list(LOG)}
    swapped = {key: raw for key, raw in own.items() if _is_swapped(raw, key)}
    homes = find_homes(swapped)
    found: list[MergedSegment] = []
    for key in sorted({*own, *(o.key for source in sources for o in source.list(LOG))}):
        copies = [
            (s, raw) for s in sources if (raw := _read(s, key)) is not None and not _is_swapped(raw, key)
        ]
        lines = homes.get(key, b"") if key in swapped else own.get(key, b"")
        for _, raw in copies:
            lines = merge_lines(raw, lines)
        origin = ", ".join(s.url for s, _ in copies) or f"{target.url}, where it lay under another key"
        was = _wrong_with(own[key], key) if key in own else f"{key}: is gone"
        still = _wrong_with(lines, key)
        if key in swapped and not lines:  # nobody knows what belongs here: it stays
            lines, still = own[key], was
        found.append(MergedSegment(key, own.get(key), lines, was, still, origin))
    return found


def events_of(segments: Iterable[MergedSegment]) -> list[Event]:
    """Return the events of a merged log, without what verifies nowhere."""
    return [e for s in segments for e in decode_events(b"".join(sound_lines(s.lines)), s.key)]


def untagged(events: Iterable[Event]) -> dict[str, float]:
    """Return when each tag was last removed on purpose."""
    found: dict[str, float] = {}
    for event in events:
        if isinstance(event, Untagged):
            found[event.tag] = max(event.time, found.get(event.tag, 0.0))
    return found


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFound:
        return None


def _is_swapped(raw: bytes, key: str) -> bool:
    """Return whether what is sound of a segment is another segment's."""
    try:
        check_segment(b"".join(sound_lines(raw)), key)
    except IntegrityError:
        return True
    return False


def _wrong_with(raw: bytes, key: str) -> str:
    try:
        check_segment(raw, key)
    except IntegrityError as e:
        return str(e)
    return ""
