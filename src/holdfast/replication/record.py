"""`mirrors.json`: where the copies of a run are, so that a look from outside, a repair and a restore find them.

It lies at the primary alone and holds no secret. Who does not know it loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.core.errors import NotFound, PolicyError
from holdfast.core.units import parse_bytes
from holdfast.format.documents import Count, decode_document
from holdfast.format.manifest import FORMAT_VERSION, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.policies.parse import parse_rule
from holdfast.replication.mirror import Mirror
from holdfast.stores import Store

__all__ = ["MIRRORS", "RememberedMirror", "read_mirrors", "remember_mirrors", "remembered"]

MIRRORS = "mirrors.json"
MOST = 100


class RememberedMirror(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A mirror as the primary remembers it. `keep` is its rule as text, "" for none; `told` is False for a rule that
    text cannot hold, such as a function."""

    url: str
    keep: str = ""
    told: bool = True
    compress: bool = False
    bandwidth: Count = 0
    verify: bool = False

    def mirror(self) -> Mirror:
        """Return the mirror to open. Raises PolicyError when the rule is not understood."""
        return Mirror(
            self.url,
            parse_rule(self.keep) if self.keep else None,
            self.compress,
            self.bandwidth or None,
            self.verify,
        )


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    run: str
    mirrors: Annotated[list[RememberedMirror], msgspec.Meta(max_length=MOST)]


def remembered(mirror: Mirror, store: Store) -> RememberedMirror:
    """Return a mirror as it is remembered."""
    keep, told = "" if mirror.keep is None else repr(mirror.keep), True
    try:
        told = not keep or repr(parse_rule(keep)) == keep
    except PolicyError:
        told = False
    bandwidth = 0 if mirror.bandwidth is None else parse_bytes(mirror.bandwidth)
    return RememberedMirror(store.url, keep if told else "", told, mirror.compress, bandwidth, mirror.verify)


def read_mirrors(store: Store, run: str) -> list[RememberedMirror]:
    """Return the mirrors that a run remembers; none where it never had one.

    Raises:
        IntegrityError, UnsupportedVersion: the document does not verify, or a newer holdfast wrote it.
    """
    try:
        raw = read_document(store, MIRRORS)
    except NotFound:
        return []
    body = unseal(raw, MIRRORS)
    check_version(body, f"{store.url}/{MIRRORS}")
    document = decode_document(body, _Document, f"{store.url}/{MIRRORS}", "a list of mirrors")
    return document.mirrors if document.run == run else []


def remember_mirrors(store: Store, run: str, mirrors: Sequence[RememberedMirror]) -> None:
    """Store the mirrors of a run, unless they are stored so already."""
    raw = seal(msgspec.json.encode(_Document(FORMAT_VERSION, run, list(mirrors))))
    try:
        if store.read(MIRRORS) == raw:
            return
    except NotFound:
        if not mirrors:
            return
    store.replace(MIRRORS, raw)
