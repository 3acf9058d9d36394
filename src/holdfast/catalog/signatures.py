"""Signatures beside manifests: written before a commit, removed with the last manifest of their attempt.

A signature is there before its manifest is: no crash leaves a checkpoint of a signing run without one. What a crash
leaves is a signature of nothing, which is freed like any other bytes that nothing refers to.
"""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.catalog.bounded import read_document
from holdfast.catalog.keys import signature_key
from holdfast.catalog.summary import Summaries, Summary
from holdfast.core.errors import AlreadyExists, IntegrityError, NotFound
from holdfast.format.manifest import Manifest
from holdfast.format.signature import (
    MAX_SIGNATURES_BYTES,
    Signature,
    decode_signatures,
    encode_signatures,
    sign_manifest,
)
from holdfast.format.signing import SigningKey
from holdfast.stores import ObjectInfo, Store

__all__ = [
    "add_signature",
    "check_signatures",
    "forgotten_signatures",
    "orphaned_signatures",
    "read_signatures",
]


def read_signatures(store: Store, step: int, attempt: str) -> list[Signature]:
    """Return the signatures of an attempt, none of them checked; empty when there are none.

    Raises:
        IntegrityError: their document does not verify.
    """
    try:
        return check_signatures(store, signature_key(step, attempt))
    except NotFound:
        return []


def check_signatures(store: Store, key: str) -> list[Signature]:
    """Return the signatures under a key, which form a document; that is all that is checked.

    Raises:
        NotFound: there are none.
        IntegrityError: their document does not verify.
    """
    return decode_signatures(read_document(store, key, MAX_SIGNATURES_BYTES), key)


def add_signature(store: Store, manifest: Manifest, raw: bytes, key: SigningKey, now: float) -> Signature:
    """Sign a manifest, whose stored bytes are or will be `raw`. Signatures of others stay, an older one of this key for
    the same bytes does not."""
    made = sign_manifest(manifest, raw, key, now)
    where = signature_key(manifest.step, manifest.attempt)
    try:
        store.create(where, encode_signatures([made]))
    except AlreadyExists:
        try:
            present = read_signatures(store, manifest.step, manifest.attempt)
        except IntegrityError:  # what does not verify vouches for nothing
            present = []
        mine = (made.statement.key, made.statement.manifest)
        others = [s for s in present if (s.statement.key, s.statement.manifest) != mine]
        store.replace(where, encode_signatures([*others, made]))
    return made


def forgotten_signatures(gone: Iterable[Summary], known: Summaries) -> list[str]:
    """Return the keys of signatures that went out of use with some manifests: no other manifest has their attempt."""
    left = {(s.step, s.attempt) for s in known.by_key.values()}
    return sorted({signature_key(s.step, s.attempt) for s in gone if (s.step, s.attempt) not in left})


def orphaned_signatures(listed: Iterable[ObjectInfo], known: Summaries) -> list[ObjectInfo]:
    """Return those of some signatures that are of no manifest; every manifest that was there when they were listed is
    in `known`."""
    used = {signature_key(s.step, s.attempt) for s in known.by_key.values()}
    return [o for o in listed if o.key not in used]
