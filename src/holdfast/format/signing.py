"""Keys: sign bytes, and check signatures, with Ed25519 or with ECDSA on the curve P-256.

Ed25519 signs manifests. P-256 can do so too; it is there because OpenSSF model signing, which exports are signed for,
knows no Ed25519. The arithmetic is that of the `cryptography` package, which is loaded when a key is first made.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import TYPE_CHECKING, Literal, cast, get_args

from holdfast.core.errors import MissingDependency, PolicyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["ALGORITHMS", "Algorithm", "PublicKey", "SigningKey", "public_key_of"]

Algorithm = Literal["ed25519", "ecdsa-p256-sha256"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
MAX_KEY_BYTES = 1 << 16
_RAW_BYTES = 32
_ID_CHARS = 32


class PublicKey:
    """A public key: who may have signed. `id` is the beginning of the SHA-256 (hex) of its SubjectPublicKeyInfo."""

    def __init__(self, key: Ed25519PublicKey | EllipticCurvePublicKey, algorithm: Algorithm) -> None:
        self._key = key
        self.algorithm: Algorithm = algorithm
        self.id = hashlib.sha256(self.der()).hexdigest()[:_ID_CHARS]

    def __repr__(self) -> str:
        return f"<PublicKey {self.algorithm} {self.id}>"

    def der(self) -> bytes:
        """Return the key as a SubjectPublicKeyInfo."""
        s = _backend().serialization
        return self._key.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo)

    def pem(self) -> str:
        """Return the key as PEM text."""
        s = _backend().serialization
        return self._key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()

    def text(self) -> str:
        """Return the key in its shortest form that `public_key_of` reads: base64 of 32 bytes, or PEM."""
        if self.algorithm != "ed25519":
            return self.pem()
        s = _backend().serialization
        return base64.b64encode(self._key.public_bytes(s.Encoding.Raw, s.PublicFormat.Raw)).decode()

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Return whether `signature` is one of `message` by this key's owner."""
        b = _backend()
        try:
            if self.algorithm == "ed25519":
                cast("Ed25519PublicKey", self._key).verify(signature, message)
            else:
                key = cast("EllipticCurvePublicKey", self._key)
                key.verify(signature, message, b.ec.ECDSA(b.hashes.SHA256()))
        except b.InvalidSignature:
            return False
        return True


class SigningKey:
    """A private key. It shows itself by its public id alone, and is never written but by `pem` and `der`."""

    def __init__(self, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = _public(key.public_key())

    def __repr__(self) -> str:
        return f"<SigningKey {self.public.algorithm} {self.public.id}>"

    def __reduce__(self) -> str:
        raise TypeError("a signing key is not pickled: it would be in the open")

    @classmethod
    def generate(cls, algorithm: Algorithm = "ed25519") -> SigningKey:
        """Return a new key."""
        b = _backend()
        if algorithm == "ed25519":
            return cls(b.ed25519.Ed25519PrivateKey.generate())
        return cls(b.ec.generate_private_key(b.ec.SECP256R1()))

    @classmethod
    def of_pem(cls, raw: bytes, name: str, passphrase: str | None = None) -> SigningKey:
        """Return the key in PEM text (PKCS 8); `name` is what messages call it.

        Raises:
            PolicyError: it is no key that we can sign with, or the passphrase is missing or wrong.
        """
        b = _backend()
        secret = passphrase.encode() if passphrase is not None else None
        try:
            key = b.serialization.load_pem_private_key(raw, secret)
        except TypeError:
            what = (
                "is encrypted; give its passphrase"
                if secret is None
                else "is not encrypted; give no passphrase"
            )
            raise PolicyError(f"{name}: {what}") from None
        except (ValueError, b.UnsupportedAlgorithm):  # the cause could tell of the key
            hint = "wrong passphrase, or no private key" if secret is not None else "no private key"
            raise PolicyError(f"{name}: {hint} in PEM form; `holdfast keygen` makes one") from None
        _public(key.public_key(), name)
        return cls(cast("Ed25519PrivateKey | EllipticCurvePrivateKey", key))

    @classmethod
    def of_der(cls, raw: bytes) -> SigningKey:
        """Return the key that `der` gave."""
        key = _backend().serialization.load_der_private_key(raw, None)
        return cls(cast("Ed25519PrivateKey | EllipticCurvePrivateKey", key))

    def pem(self, passphrase: str | None = None) -> bytes:
        """Return the key as PEM text (PKCS 8), encrypted when there is a passphrase."""
        s = _backend().serialization
        how = s.BestAvailableEncryption(passphrase.encode()) if passphrase else s.NoEncryption()
        return self._key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, how)

    def der(self) -> bytes:
        """Return the key unencrypted, to hand it to the writer process."""
        s = _backend().serialization
        return self._key.private_bytes(s.Encoding.DER, s.PrivateFormat.PKCS8, s.NoEncryption())

    def sign(self, message: bytes) -> bytes:
        """Return a signature of `message`."""
        b = _backend()
        if self.public.algorithm == "ed25519":
            return cast("Ed25519PrivateKey", self._key).sign(message)
        key = cast("EllipticCurvePrivateKey", self._key)
        return key.sign(message, b.ec.ECDSA(b.hashes.SHA256()))


def public_key_of(text: str, name: str) -> PublicKey:
    """Return the public key in `text`: PEM, or base64 of the 32 bytes of an Ed25519 key. `name` is for messages.

    Raises:
        PolicyError: it is neither.
    """
    b = _backend()
    try:
        if "-----BEGIN" in text:
            return _public(b.serialization.load_pem_public_key(text.strip().encode()), name)
        raw = base64.b64decode(text.strip(), validate=True)
        if len(raw) == _RAW_BYTES:
            return _public(b.ed25519.Ed25519PublicKey.from_public_bytes(raw), name)
    except (
        ValueError,
        binascii.Error,
        b.UnsupportedAlgorithm,
    ):  # a private key in its place is not to be shown
        pass
    raise PolicyError(f"{name}: is no public key; expected PEM, or base64 of the 32 bytes of an Ed25519 key")


def _public(key: object, name: str = "key") -> PublicKey:
    b = _backend()
    if isinstance(key, b.ed25519.Ed25519PublicKey):
        return PublicKey(cast("Ed25519PublicKey", key), "ed25519")
    if isinstance(key, b.ec.EllipticCurvePublicKey):
        curved = cast("EllipticCurvePublicKey", key)
        if isinstance(curved.curve, b.ec.SECP256R1):
            return PublicKey(curved, "ecdsa-p256-sha256")
    raise PolicyError(f"{name}: is a key of another kind; expected Ed25519, or ECDSA on P-256")


class _Backend:
    """What we use of `cryptography`."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519

        self.InvalidSignature, self.UnsupportedAlgorithm = InvalidSignature, UnsupportedAlgorithm
        self.hashes, self.serialization = hashes, serialization
        self.ec, self.ed25519 = ec, ed25519


_loaded: list[_Backend] = []


def _backend() -> _Backend:
    if not _loaded:
        try:
            _loaded.append(_Backend())
        except ImportError as e:
            raise MissingDependency("signatures need cryptography; run: pip install 'holdfast[sign]'") from e
    return _loaded[0]
