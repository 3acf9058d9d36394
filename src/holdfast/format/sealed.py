"""Sealed JSON: an object whose last member is the BLAKE3 digest of every byte before it.

One changed, missing or added byte anywhere in the file is an IntegrityError. Manifests, tags, leases and run.json are
one sealed object and a newline; run-log segments are one sealed object a line, with a shorter digest.
"""

from __future__ import annotations

from blake3 import blake3

from holdfast.core.errors import DigestMismatch, InvalidFormat, Truncated

__all__ = ["LINE_DIGEST_CHARS", "seal", "unseal"]

DIGEST_CHARS = 64
LINE_DIGEST_CHARS = 16
_MEMBER = b',"digest":"'
_END = b'"}\n'


def seal(body: bytes, chars: int = DIGEST_CHARS) -> bytes:
    """Return the JSON object `body` with its digest as the last member and a final newline."""
    if not (body.startswith(b"{") and body.endswith(b"}") and len(body) > 2):
        raise ValueError("only a JSON object with at least one member can be sealed")
    head = body[:-1]
    return head + _MEMBER + blake3(head).hexdigest(chars // 2).encode() + _END


def unseal(sealed: bytes, name: str, chars: int = DIGEST_CHARS) -> bytes:
    """Return the JSON object inside `sealed`, verified; `name` is the object's key for the messages.

    Raises:
        Truncated: the seal is not at the end.
        DigestMismatch: the digest differs.
        InvalidFormat: it does not start as a JSON object.
    """
    tail = len(_MEMBER) + chars + len(_END)
    head, seal_bytes = sealed[:-tail], sealed[-tail:]
    if not head or not seal_bytes.startswith(_MEMBER) or not seal_bytes.endswith(_END):
        raise Truncated(
            f"{name}: does not end in a digest; {len(sealed)} bytes were read, so it is cut off or not ours"
        )
    if blake3(head).hexdigest(chars // 2).encode() != seal_bytes[len(_MEMBER) : -len(_END)]:
        raise DigestMismatch(
            f"{name}: its bytes do not match the digest at its end, so at least one byte changed"
        )
    if not head.startswith(b"{"):
        raise InvalidFormat(f"{name}: does not start as a JSON object")
    return head + b"}"
