"""Codecs that users register for their own classes: a class becomes a storable value and comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from holdfast.core.errors import StateError

__all__ = ["Codec", "codec_for", "codec_named", "codecs_in_use", "register_codec"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Codec:
    """How objects of exactly `cls` are stored under `name`."""

    cls: type
    name: str
    encode: Callable[[object], object]
    decode: Callable[[object], object]


_by_class: dict[type, Codec] = {}
_by_name: dict[str, Codec] = {}


def register_codec(
    cls: type[T], name: str, *, encode: Callable[[T], object], decode: Callable[[object], T]
) -> None:
    """Store objects of exactly `cls` as what `encode` returns, and rebuild them with `decode`.

    `name` is written to the checkpoint and must stay the same for as long as checkpoints are to be read;
    `encode` must return a storable value (plain values, containers, tensors, arrays) and may share nothing
    that the program changes later. Registering the same class and name again replaces the codec.

    Raises:
        StateError: the name belongs to another class, or is not 1 to 128 printable characters.
    """
    if not name or len(name) > 128 or not name.isprintable():
        raise StateError(f"codec name {name[:80]!r}: expected 1 to 128 printable characters")
    taken = _by_name.get(name)
    if taken is not None and _full_name(taken.cls) != _full_name(cls):
        raise StateError(
            f"codec name {name!r} already stands for {_full_name(taken.cls)}; "
            f"register {_full_name(cls)} under another name"
        )
    if taken is not None:
        _by_class.pop(taken.cls, None)
    codec = Codec(cls, name, encode, decode)  # type: ignore[arg-type]
    _by_class[cls] = codec
    _by_name[name] = codec


def codec_for(cls: type) -> Codec | None:
    """Return the codec registered for exactly `cls`."""
    return _by_class.get(cls)


def codecs_in_use() -> dict[type, Codec]:
    """Return every registered codec, by class."""
    return dict(_by_class)


def codec_named(name: str) -> Codec | None:
    """Return the codec that is registered under `name`."""
    return _by_name.get(name)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
