"""Key files and trust files: private keys of their owner alone, public ones in PEM, and who may sign what in TOML."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import stat
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from holdfast.catalog.trust import NOBODY, Trust, TrustedKey, Verifying
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import PolicyError
from holdfast.format.signing import MAX_KEY_BYTES, PublicKey, SigningKey, public_key_of

__all__ = [
    "PASSPHRASE_VARIABLE",
    "KeySource",
    "Signing",
    "TrustSource",
    "make_trust",
    "read_signing_key",
    "signing_of",
    "write_key_pair",
]

logger = logging.getLogger("holdfast")

PASSPHRASE_VARIABLE = "HOLDFAST_SIGNING_PASSPHRASE"
MAX_TRUST_BYTES = 1 << 20
_FROM_VARIABLE = "env:"
_RAW_CHARS = 44  # base64 of 32 bytes

KeySource = str | os.PathLike[str]
TrustSource = KeySource | Sequence[KeySource]


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `[[keys]]` table of a trust file. `public` is a key, or the path of one beside the file."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    public: Annotated[str, msgspec.Meta(max_length=4096)]
    runs: Annotated[list[str], msgspec.Meta(max_length=1000)]
    until: object = None  # a date or a time of TOML


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[list[_Key], msgspec.Meta(max_length=10_000)]


@dataclass(frozen=True, slots=True)
class Signing:
    """What a run signs its commits with, and whom it believes."""

    key: SigningKey | None
    trust: Trust


def signing_of(
    sign: KeySource | None, verify: Verifying | None, trusted: TrustSource | None, time: TimeSource
) -> Signing:
    """Return what `sign=`, `verify=` and `trusted=` ask for. Raises as `read_signing_key` and `make_trust` do."""
    key = read_signing_key(sign) if sign is not None else None
    return Signing(key, make_trust(verify, trusted, own=key, time=time))


def read_signing_key(source: KeySource, ask: Callable[[str], str] | None = None) -> SigningKey:
    """Return the private key in a PEM file, or with "env:NAME" in that environment variable.

    The passphrase of an encrypted one is that of the variable HOLDFAST_SIGNING_PASSPHRASE; without it, `ask` is called
    with the key's name.

    Raises:
        PolicyError: there is no such key, or it cannot be read.
    """
    name = os.fspath(source)
    if name.startswith(_FROM_VARIABLE):
        variable = name.removeprefix(_FROM_VARIABLE)
        text = os.environ.get(variable)
        if text is None:
            raise PolicyError(f"the environment variable {variable!r} holds no signing key: it is not set")
        raw = text.encode()
    else:
        raw = _read_file(name, MAX_KEY_BYTES)
        with contextlib.suppress(OSError):
            if stat.S_IMODE(os.stat(name).st_mode) & 0o077:
                logger.warning("%s: a private key that others may read; run: chmod 600 %s", name, name)
    secret = None
    if b"ENCRYPTED" in raw:
        secret = os.environ.get(PASSPHRASE_VARIABLE)
        if secret is None and ask is not None:
            secret = ask(name)
    return SigningKey.of_pem(raw, name, secret)


def write_key_pair(path: KeySource, key: SigningKey, passphrase: str | None = None) -> str:
    """Write a private key, for its owner alone, and its public half beside it; return the path of that one.

    Raises:
        PolicyError: one of the files is there already: nothing was written, for a key that is lost is lost.
    """
    private = os.fspath(path)
    public = f"{private.removesuffix('.pem')}.pub"
    for present in (private, public):
        if os.path.lexists(present):
            raise PolicyError(f"{present} exists already; choose another name: a key is never overwritten")
    _write_new(private, key.pem(passphrase), 0o600)
    _write_new(public, key.public.pem().encode(), 0o644)
    return public


def make_trust(
    verify: Verifying | None,
    trusted: TrustSource | None,
    *,
    own: SigningKey | None = None,
    time: TimeSource | None = None,
) -> Trust:
    """Return the trust that `verify=` and `trusted=` ask for: by default "require" where someone is trusted.

    `trusted` names public keys (PEM text, base64, or a file) and trust files (`.toml`); with `own` alone, the key that
    this process signs with is the one that is trusted.

    Raises:
        PolicyError: signatures are to be verified and nobody is trusted, `verify` is not known, or a key or a trust
            file makes no sense.
    """
    if verify not in (None, "require", "warn", "off"):
        raise PolicyError(f'verify={verify!r} is not known; expected "require", "warn" or "off"')
    if verify == "off" or (verify is None and trusted is None):
        return NOBODY
    keys: list[TrustedKey] = []
    for one in () if trusted is None else [trusted] if isinstance(trusted, (str, os.PathLike)) else trusted:
        keys += _trusted(os.fspath(one))
    if trusted is None and own is not None:
        keys.append(TrustedKey(own.public, "this run's own key"))
    if not keys:
        raise PolicyError(
            f"verify={verify or 'require'!r} and nobody is trusted: give trusted= a public key or a trust file"
        )
    return Trust(verify or "require", tuple(keys), time or SystemTime())


def _trusted(source: str) -> list[TrustedKey]:
    if source.endswith(".toml"):
        return _read_trust_file(source)
    key = _public_key(source, Path())
    return [TrustedKey(key, f"key {key.id}")]


def _public_key(source: str, beside: Path) -> PublicKey:
    if "-----BEGIN" in source or (len(source) == _RAW_CHARS and source.endswith("=")):
        return public_key_of(source, "a public key")
    path = str(beside / source)
    return public_key_of(_text(_read_file(path, MAX_KEY_BYTES), path), path)


def _read_trust_file(path: str) -> list[TrustedKey]:
    text = _text(_read_file(path, MAX_TRUST_BYTES), path)
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (ValueError, RecursionError) as e:
        raise PolicyError(f"{path}: is not a trust file: {e}") from e
    beside = Path(path).parent
    return [
        TrustedKey(_public_key(k.public, beside), k.name, tuple(k.runs), _moment(k.until, path))
        for k in file.keys
    ]


def _moment(until: object, path: str) -> float | None:
    """Return a date of a trust file in seconds since the Unix epoch; a day, and a time without a zone, is in UTC."""
    if until is None:
        return None
    if not isinstance(until, datetime.date):
        raise PolicyError(f"{path}: until = {until!r:.40} is no date; write it as 2027-01-31, without quotes")
    if not isinstance(until, datetime.datetime):
        until = datetime.datetime.combine(until, datetime.time())
    return (until if until.tzinfo else until.replace(tzinfo=datetime.UTC)).timestamp()


def _text(raw: bytes, path: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: is not text") from None


def _read_file(path: str, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as e:
        raise PolicyError(f"{path}: cannot be read: {e.strerror}") from e
    if len(raw) > limit:
        raise PolicyError(f"{path}: has more than {limit} bytes; it is no key and no trust file")
    return raw


def _write_new(path: str, raw: bytes, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask says
            file.write(raw)
            file.flush()
            os.fsync(fd)  # durability: a key that is lost is lost
    except OSError as e:
        raise PolicyError(f"{path}: cannot be written: {e.strerror}") from e
