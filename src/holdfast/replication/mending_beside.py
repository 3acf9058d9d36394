"""Mend what lies beside the checkpoints: `run.json`, the log, signatures, tags, and documents that only save work."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.catalog.beside import CACHES
from holdfast.catalog.keys import RUN, TAGS, signature_key
from holdfast.catalog.signatures import read_signatures
from holdfast.catalog.tags import Tag, decode_tag
from holdfast.core.errors import IntegrityError, NotFound
from holdfast.format.manifest import Manifest
from holdfast.replication.mending import Hands
from holdfast.replication.merged_log import MergedSegment
from holdfast.replication.witnesses import Witnesses
from holdfast.stores import Store

__all__ = ["mend_caches", "mend_identity", "mend_log", "mend_signatures", "mend_tags"]


def mend_identity(hands: Hands, witnesses: Witnesses) -> None:
    """Mend `run.json`."""
    if witnesses.wrong:
        missing = hands.read(hands.target, RUN) is None
        hands.place(RUN, witnesses.identity, witnesses.wrong, witnesses.origin, new=missing)


def mend_log(hands: Hands, segments: Sequence[MergedSegment]) -> None:
    """Mend the run log, line by line."""
    for segment in segments:
        if segment.changed:
            new = segment.own is None
            hands.place(segment.key, segment.lines, segment.was or "it lacks lines", segment.origin, new=new)
        if segment.still:
            hands.give_up(segment.key, segment.still, ["no other place knows what stood there"])


def mend_caches(hands: Hands) -> None:
    """Remove what only saves work and does not verify."""
    for key, check in CACHES.items():
        try:
            check(hands.target)
        except NotFound:
            continue
        except IntegrityError as e:
            hands.remove(key, str(e))


def mend_signatures(hands: Hands, sources: Sequence[Store], manifest: Manifest) -> None:
    """Mend the signatures of a checkpoint: those of a source take the place of what does not verify."""
    key = signature_key(manifest.step, manifest.attempt)
    was = ""
    try:
        if read_signatures(hands.target, manifest.step, manifest.attempt):
            return
    except IntegrityError as e:
        was = str(e)
    reasons: list[str] = []
    for source in sources:
        try:
            if read_signatures(source, manifest.step, manifest.attempt):
                hands.place(key, source.read(key), was or f"{key}: is gone", source.url, new=not was)
                return
        except (IntegrityError, NotFound) as e:
            reasons.append(f"{source.url}: {e}")
    if was:
        hands.give_up(key, was, reasons)


def mend_tags(
    hands: Hands,
    sources: Sequence[Store],
    attempts: set[str],
    untagged: dict[str, float],
    *,
    bring_back: bool,
) -> None:
    own = {o.key for o in hands.target.list(TAGS)}
    elsewhere = {o.key for source in sources for o in source.list(TAGS)} if bring_back else set()
    for key in sorted(own | elsewhere):
        was = f"{key}: is gone"
        raw = hands.read(hands.target, key)
        if raw is not None:
            try:
                decode_tag(raw, key)
                continue
            except IntegrityError as e:
                was = str(e)
        found, reasons = _find_tag(hands, sources, key)
        if found is None:
            if raw is not None:
                hands.give_up(key, was, reasons)
            continue
        tag, document, origin = found
        if raw is None and (untagged.get(tag.tag, 0.0) >= tag.time or tag.attempt not in attempts):
            continue  # removed on purpose, or it went with its checkpoint
        hands.place(key, document, was, origin, new=raw is None)


def _find_tag(
    hands: Hands, sources: Sequence[Store], key: str
) -> tuple[tuple[Tag, bytes, str] | None, list[str]]:
    """Return the newest sound tag of a key among the sources, as it is stored there; and why others have none."""
    found: list[tuple[Tag, bytes, str]] = []
    reasons: list[str] = []
    for source in sources:
        raw = hands.read(source, key)
        if raw is None:
            continue
        try:
            found.append((decode_tag(raw, key), raw, source.url))
        except IntegrityError as e:
            reasons.append(f"{source.url}: {e}")
    return max(found, key=lambda f: f[0].time, default=None), reasons
