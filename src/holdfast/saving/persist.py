"""Persist: an image's bytes become data files, and a manifest that lists them. Committing is the caller's act."""

from __future__ import annotations

import secrets

from holdfast.catalog.keys import data_prefix
from holdfast.core.names import file_stems
from holdfast.format.manifest import Part
from holdfast.saving.ahead import Ahead
from holdfast.saving.image import Image
from holdfast.saving.known import KnownTensors
from holdfast.stores import Store

__all__ = ["KnownTensors", "new_attempt", "persist_parts"]


def new_attempt() -> str:
    """Return a random id that keeps this attempt's data apart from every other's."""
    return secrets.token_hex(4)


def persist_parts(
    store: Store,
    step: int,
    attempt: str,
    image: Image,
    known: KnownTensors,
    *,
    self_contained: bool = False,
    wave: int = 0,
    mark: str = "",
    derive: bool = False,
) -> tuple[dict[str, Part], KnownTensors, int]:
    """Write what is new of an image; return the manifest's parts, what is known afterwards, and the bytes written.

    The image may still be on its way: what is there is written while the rest is waited for. When this returns every
    byte is durable. `self_contained`: refer to no older file, write everything. `wave` tells the files of the waves of
    one checkpoint apart, and `mark`, which ends their names, those of several ranks. `derive`: leave out what follows
    from another tensor of the image.

    Raises:
        StoreError: a file could not be written; and whatever `image.wait` raises. None of the files stays then.
    """
    prefix = data_prefix(step, attempt)
    mark += f"-wave{wave:05d}" if wave else ""
    keys = {name: f"{prefix}/{stem}{mark}.safetensors" for name, stem in file_stems(image.parts).items()}
    with Ahead(image, keys, KnownTensors() if self_contained else known, derive=derive) as ahead:
        store.write_streams(ahead.streams())
    parts: dict[str, Part] = {}
    now_known = KnownTensors()
    written = 0
    for plan in ahead.planned:
        needed = plan.needed
        files = [f for f in known.files.get(plan.name, []) if f.key in needed]
        if plan.entry is not None:
            files.insert(0, plan.entry)  # the first listed file that has a name has the last word
            written += plan.entry.size
        derived = {f"{plan.name}/{name}": d for name, d in plan.derived.items()}
        parts[plan.name] = Part(plan.part.tree, plan.part.kind, files, plan.part.aliases, derived)
        now_known.parts[plan.name] = plan.known
        now_known.files[plan.name] = files
    return {name: parts[name] for name in image.parts}, now_known, written
