"""Signatures of a manifest: who vouches for which exact bytes, as a sealed document beside it.

A manifest holds the digest of every header, and a header those of every block: the digest of a manifest's bytes is that
of the whole checkpoint. What is signed is a statement (run, step, attempt, digest, time, key), wrapped so that a
signature made for anything else can never pass for one of ours.
Source of the wrapping: DSSE, https://github.com/secure-systems-lab/dsse/blob/master/protocol.md (PAE).
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec
from blake3 import blake3

from holdfast.core.errors import InvalidFormat
from holdfast.format.documents import Count
from holdfast.format.manifest import FORMAT_VERSION, Manifest, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.format.signing import PublicKey, SigningKey

__all__ = [
    "MAX_SIGNATURES_BYTES",
    "Signature",
    "Statement",
    "decode_signatures",
    "encode_signatures",
    "sign_manifest",
]

MAX_SIGNATURES_BYTES = 1 << 18
MAX_SIGNATURES = 64
KIND = b"application/vnd.holdfast.manifest-signature.v1+json"

_Text = Annotated[str, msgspec.Meta(max_length=128)]


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a signer says: this manifest (BLAKE3 in hex of its exact bytes, and their number) is checkpoint `step`,
    `attempt` of `run`. `time` is the signer's word, in seconds since the Unix epoch."""

    run: _Text
    step: Count
    attempt: _Text
    manifest: _Text
    size: Count
    time: Count
    algorithm: _Text
    key: _Text

    def preimage(self) -> bytes:
        """Return the bytes that are signed: kind and statement, each with its length before it."""
        body = msgspec.json.encode(self)
        return b"DSSEv1 %d %s %d %s" % (len(KIND), KIND, len(body), body)


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statement and its signature in base64."""

    statement: Statement
    signature: Annotated[str, msgspec.Meta(max_length=512)]

    def is_by(self, key: PublicKey) -> bool:
        """Return whether the owner of `key` signed the statement."""
        if (self.statement.key, self.statement.algorithm) != (key.id, key.algorithm):
            return False
        try:
            raw = base64.b64decode(self.signature, validate=True)
        except (ValueError, binascii.Error):
            return False
        return key.has_signed(self.statement.preimage(), raw)

    def is_about(self, manifest: Manifest, raw: bytes) -> bool:
        """Return whether the statement speaks of this manifest, whose stored bytes are `raw`."""
        return self.statement == _statement(manifest, raw, self.statement)


def _statement(manifest: Manifest, raw: bytes, of: Statement) -> Statement:
    return Statement(
        run=manifest.run,
        step=manifest.step,
        attempt=manifest.attempt,
        manifest=blake3(raw).hexdigest(),
        size=len(raw),
        time=of.time,
        algorithm=of.algorithm,
        key=of.key,
    )


def sign_manifest(manifest: Manifest, raw: bytes, key: SigningKey, now: float) -> Signature:
    """Return the signature of a manifest whose stored bytes are `raw`."""
    blank = Statement("", 0, "", "", 0, int(now), key.public.algorithm, key.public.id)
    statement = _statement(manifest, raw, blank)
    return Signature(statement, base64.b64encode(key.sign(statement.preimage())).decode())


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    signatures: Annotated[list[Signature], msgspec.Meta(max_length=MAX_SIGNATURES)]


def encode_signatures(signatures: list[Signature]) -> bytes:
    """Return the sealed bytes of a document of signatures; the newest are kept when there are too many."""
    return seal(msgspec.json.encode(_Document(FORMAT_VERSION, signatures[-MAX_SIGNATURES:])))


def decode_signatures(raw: bytes, name: str) -> list[Signature]:
    """Return the signatures in `raw`, none of them checked; `name` is the document's key for the messages.

    Raises:
        IntegrityError: it is cut off, changed, or outside the grammar.
        UnsupportedVersion: a newer holdfast wrote it.
    """
    if len(raw) > MAX_SIGNATURES_BYTES:
        raise InvalidFormat(f"{name}: has {len(raw)} bytes, which no document of signatures has")
    body = unseal(raw, name)
    check_version(body, name)
    try:
        document = msgspec.json.decode(body, type=_Document)
        if msgspec.json.encode(document) != body:
            raise ValueError("a key occurs twice, or it is not written as we write it")
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: is not a document of signatures: {e}") from e
    return document.signatures
