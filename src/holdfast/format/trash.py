"""Trash documents: a manifest that was taken off the list, with when and why, sealed as a whole.

The manifest lies inside byte for byte, its own seal included, so bringing it back is creating the very object that was
there. Before there were such documents the trash held plain manifests, which are read as well.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.core.errors import InvalidFormat
from holdfast.format.documents import Moment
from holdfast.format.manifest import FORMAT_VERSION, Manifest, check_version, decode_manifest
from holdfast.format.sealed import seal, unseal

__all__ = ["TrashDoc", "decode_trash", "encode_trash"]


class TrashDoc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest in the trash: the `key` it was listed under ("" where that is unknown), when it was `deleted` and why,
    how long it stays, the `tags` that pointed to it, and its bytes without the last newline."""

    format: int
    key: str
    deleted: Moment
    grace_seconds: Annotated[float, msgspec.Meta(ge=0, lt=1e12)]  # twelve digits, as in its key
    reasons: list[str]
    tags: list[str]
    manifest: msgspec.Raw

    @property
    def manifest_bytes(self) -> bytes:
        """The manifest as it was stored."""
        return bytes(self.manifest) + b"\n"


class _Probe(msgspec.Struct):
    deleted: float | None = None


def encode_trash(
    manifest: bytes, key: str, *, deleted: float, grace_seconds: float, reasons: list[str], tags: list[str]
) -> bytes:
    """Return the document that keeps a manifest, given as it is stored. It must be sealed: a broken one has no place
    in a document."""
    inner = msgspec.Raw(manifest.removesuffix(b"\n"))
    doc = TrashDoc(FORMAT_VERSION, key, deleted, grace_seconds, reasons, tags, inner)
    return seal(msgspec.json.encode(doc))


def decode_trash(raw: bytes, name: str) -> tuple[Manifest, TrashDoc]:
    """Return the manifest that a trash object keeps, and the document; one that says nothing for a plain manifest.

    Raises:
        IntegrityError: the object, or the manifest in it, does not verify.
        UnsupportedVersion: a newer holdfast wrote it.
    """
    body = unseal(raw, name)
    try:
        plain = msgspec.json.decode(body, type=_Probe).deleted is None
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: is not a trash document: {e}") from e
    if plain:  # its version is the manifest's
        doc = TrashDoc(FORMAT_VERSION, "", 0.0, 0.0, [], [], msgspec.Raw(raw.removesuffix(b"\n")))
        return decode_manifest(doc.manifest_bytes, name), doc
    check_version(body, name)
    try:
        doc = msgspec.json.decode(body, type=TrashDoc)
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: is not a trash document: {e}") from e
    return decode_manifest(doc.manifest_bytes, name), doc
