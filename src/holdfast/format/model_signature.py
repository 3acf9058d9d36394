"""A signature of exported files that OpenSSF model signing verifies (`model_signing verify key`).

It is a Sigstore bundle around a DSSE envelope around an in-toto statement that lists each file with its SHA-256. The
package itself pulls in the whole Sigstore client, which signing with a key of one's own has no use for.
Source: https://github.com/sigstore/model-transparency, version 1.1.1
(`_signing/signing.py`, `_signing/sign_ec_key.py`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

import msgspec

from holdfast.core.errors import PolicyError
from holdfast.format.signing import SigningKey

__all__ = ["ONE_FILE", "sign_files"]

ONE_FILE = "."  # the name of the file when what is signed is a file and no directory

_PAYLOAD = b"application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def sign_files(name: str, digests: Mapping[str, bytes], key: SigningKey) -> bytes:
    """Return the bundle that signs files, given the SHA-256 of each by its path, as the model called `name`.

    Raises:
        PolicyError: the key is none that model signing knows.
    """
    if key.public.algorithm != "ecdsa-p256-sha256":
        raise PolicyError(
            f"an export is signed with a P-256 key, for model signing knows no {key.public.algorithm}; "
            "make one with `holdfast keygen --type p256`"
        )
    payload = msgspec.json.encode(_statement(name, digests))
    signed = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD, len(payload), payload)
    hint = hashlib.sha256(key.public.pem().encode()).hexdigest()
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _base64(payload),
            "payloadType": _PAYLOAD.decode(),
            "signatures": [{"sig": _base64(key.sign(signed)), "keyid": ""}],
        },
    }
    return msgspec.json.encode(bundle)


def _statement(name: str, digests: Mapping[str, bytes]) -> dict[str, object]:
    paths = sorted(digests)
    root = hashlib.sha256(b"".join(digests[path] for path in paths)).hexdigest()
    return {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digests[path].hex()} for path in paths
            ],
        },
    }


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
