"""Copies of the run log: a segment grows at its source, and its copy grows behind it.

No line of the log needs another, so damage costs a copy no more than the damaged lines: a copy holds every line that
verified at its source when it was copied, and never loses one that it has.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from holdfast.catalog.keys import LOG
from holdfast.core.errors import IntegrityError, NotFound
from holdfast.format.events import Started, decode_events
from holdfast.stores import Store

__all__ = ["copy_log", "find_homes", "merge_lines", "sound_lines"]

logger = logging.getLogger("holdfast")

PROBE_BYTES = 4096  # of the end of a copy, compared with its source before it grows


def copy_log(source: Store, target: Store, *, thorough: bool = False) -> tuple[int, int]:
    """Make the target's segments hold every sound line of the source's; return (segments changed, bytes written).

    A copy that is as long as its source is taken to be equal, unless this is to be `thorough`.
    """
    there = {o.key: o.size for o in target.list(LOG)}
    written: list[int] = []
    for found in source.list(LOG):
        size = there.get(found.key, 0)
        if found.size != size or thorough:
            try:
                written.append(_copy_segment(source, target, found.key, (size, found.size), thorough))
            except NotFound:  # gone at its source meanwhile
                continue
    return sum(1 for n in written if n), sum(written)


def _copy_segment(source: Store, target: Store, key: str, sizes: tuple[int, int], thorough: bool) -> int:
    """Bring a segment's copy up to its source; `sizes` are those of copy and source. Return the bytes written."""
    if 0 < sizes[0] < sizes[1] and not thorough and target.appendable:
        new = _what_follows(source, target, key, sizes)
        if new is not None:
            if new:
                target.append(key, new)
            return len(new)
    ours = source.read(key)
    theirs = target.read(key) if sizes[0] else b""
    merged = merge_lines(ours, theirs, f"{source.url}/{key}")
    if merged == theirs[: theirs.rfind(b"\n") + 1]:
        return 0
    target.replace(key, merged)
    return len(merged)


def _what_follows(source: Store, target: Store, key: str, sizes: tuple[int, int]) -> bytes | None:
    """Return the whole lines that a segment has beyond its copy; None where the copy's end is not the source's."""
    start = max(0, sizes[0] - PROBE_BYTES)
    theirs = target.read(key, start, sizes[0])
    ours = source.read(key, start, sizes[1])
    ours = ours[: max(len(theirs), ours.rfind(b"\n") + 1)]
    line = theirs.rfind(b"\n") + 1  # where the first line begins that the copy has not, or not whole
    if not ours.startswith(theirs) or (line == 0 and start > 0):
        return None
    try:
        decode_events(ours[line:], key)
    except IntegrityError:
        return None
    return ours[len(theirs) :]


def merge_lines(ours: bytes, theirs: bytes, name: str = "") -> bytes:
    """Return the sound lines of two copies of a segment, each once, in their order; of what stands between two lines
    that both have, what one has lost comes from the other. A damaged line of `theirs` goes where `ours` has lines in
    its place, and stays where nothing is known of it. `name` is that of `ours`, to report what is left out of it."""
    first = sound_lines(ours, name)
    second = [line + b"\n" for line in theirs.split(b"\n")[:-1]]
    merged: list[bytes] = []
    gap: list[bytes] = []
    left = Counter(first)
    mine = 0
    for line in second:
        if not left[line]:
            gap.append(line)
            continue
        before = mine
        while first[mine] != line:  # what only the first has comes before
            left[first[mine]] -= 1
            mine += 1
        merged += _fill(gap, first[before:mine])
        merged.append(line)
        left[line] -= 1
        mine, gap = mine + 1, []
    return b"".join([*merged, *_fill(gap, first[mine:])])


def _fill(gap: list[bytes], lines: list[bytes]) -> list[bytes]:
    """Return what stands in a gap of one copy, given what the other has there."""
    return [*(line for line in gap if sound_lines(line)), *lines] if lines else gap


def find_homes(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return, of segments that lie under one another's keys, those that it is certain of, by the key they belong to."""
    homes: dict[str, bytes] = {}
    nobodys: list[bytes] = []
    for raw in found.values():
        held = {e.generation for e in decode_events(b"".join(sound_lines(raw)), "") if isinstance(e, Started)}
        keys = [key for key in found if any(key.startswith(f"{LOG}/g{n:012d}-") for n in held)]
        if len(keys) == 1:
            homes[keys[0]] = raw
        elif not held:
            nobodys.append(raw)
    free = [key for key in found if key not in homes]
    if len(nobodys) == len(free) == 1:
        homes[free[0]] = nobodys[0]
    return homes


def sound_lines(raw: bytes, name: str = "") -> list[bytes]:
    """Return the lines of a segment that verify, each with its newline."""
    found: list[bytes] = []
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            decode_events(line + b"\n", name, number)
        except IntegrityError as e:
            if name:
                logger.warning("a line of the run log is not copied: %s", e)
            continue
        found.append(line + b"\n")
    return found
