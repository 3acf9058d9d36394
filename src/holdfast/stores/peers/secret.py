"""The secret that services and their users share. It is never in a URL, a message or a log."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from holdfast.core.errors import PermissionDenied, PolicyError

__all__ = ["FILE_VARIABLE", "VARIABLE", "Secret", "find_secret", "write_secret"]

VARIABLE = "HOLDFAST_PEER_SECRET"
FILE_VARIABLE = "HOLDFAST_PEER_SECRET_FILE"
SHORTEST_BYTES = 16
LONGEST_BYTES = 1024
KEY_BYTES = 32
_CONTEXT = "holdfast 2026 peer memory, shared secret"


class Secret:
    """A shared secret, kept as the key that is derived from it.

    Raises:
        PolicyError: it is too short to withstand guessing.
    """

    __slots__ = ("_key",)

    def __init__(self, text: str | bytes) -> None:
        raw = (text.encode() if isinstance(text, str) else text).strip()
        if not SHORTEST_BYTES <= len(raw) <= LONGEST_BYTES:
            raise PolicyError(
                f"the secret of peers has {len(raw)} bytes; expected {SHORTEST_BYTES} to {LONGEST_BYTES}, and random "
                "ones: `holdfast peer secret FILE` makes one"
            )
        self._key = blake3(raw, derive_key_context=_CONTEXT).digest()

    def __repr__(self) -> str:
        return "Secret(…)"

    def __reduce__(self) -> str:
        raise TypeError("the secret of peers is not copied to other processes")

    def derive(self, label: str, *parts: bytes) -> bytes:
        """Return 32 bytes that only who knows the secret can make of a label and parts of fixed lengths."""
        return blake3(b"".join([label.encode(), b"\0", *parts]), key=self._key).digest()


def find_secret(environment: Mapping[str, str] | None = None) -> Secret:
    """Return the secret that the environment names: in HOLDFAST_PEER_SECRET, or in the file HOLDFAST_PEER_SECRET_FILE.

    Raises:
        PolicyError: there is none, or it is too short.
        PermissionDenied: others than its owner may read the file, or it cannot be read.
    """
    found = os.environ if environment is None else environment
    text, path = found.get(VARIABLE, ""), found.get(FILE_VARIABLE, "")
    if text:
        return Secret(text)
    if path:
        return Secret(_read(Path(path)))
    raise PolicyError(
        f"peers need a secret that all of them share: put one into {VARIABLE}, or into a file that only its owner may "
        f"read and its path into {FILE_VARIABLE}"
    )


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
                raise PermissionDenied(
                    f"{path}: the secret of peers must be in a plain file that its owner alone may read; found mode "
                    f"{stat.S_IMODE(found.st_mode):04o}; run chmod 600 on it"
                )
            return file.read(LONGEST_BYTES + 2)
    except PermissionDenied:
        raise
    except OSError as e:
        raise PermissionDenied(f"{path}: the secret of peers cannot be read: {e.strerror}") from None


def write_secret(path: Path) -> None:
    """Write a new random secret to a new file that its owner alone may read.

    Raises:
        PermissionDenied: the file is there already, or cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(os.urandom(32).hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise PermissionDenied(f"{path}: the secret of peers cannot be written: {e.strerror}") from None
