"""What users ask of a service and what it answers: msgpack documents, each one frame.

An object of up to INLINE_BYTES travels in its request. A larger one is announced by `Begin` and comes as data
frames, the head's frames last, and ends with `End`. What a service has to tell meanwhile it tells at once, and drops
what still comes up to `End`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from holdfast.core import errors
from holdfast.core.errors import HoldfastError, StoreError
from holdfast.stores.base import ObjectInfo
from holdfast.stores.peers.wire import Garbled

__all__ = [
    "INLINE_BYTES",
    "KEY_CHARS",
    "PAGE_KEYS",
    "Accept",
    "Answer",
    "Ballot",
    "Begin",
    "Delete",
    "End",
    "Failed",
    "Fine",
    "Info",
    "List",
    "Listed",
    "Members",
    "Mode",
    "OfRings",
    "Peek",
    "Prepare",
    "Put",
    "Read",
    "Registered",
    "Registers",
    "Request",
    "Room",
    "Sized",
    "Value",
    "Vote",
    "decode_answer",
    "decode_request",
    "encode",
]

INLINE_BYTES = 256 << 10
KEY_CHARS = 2048
PAGE_KEYS = 400  # of a listing or a removal: what fits into a frame whatever the keys are
MESSAGE_CHARS = 500

Mode: TypeAlias = Literal["create", "replace", "append"]
_Size = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Key = Annotated[str, msgspec.Meta(max_length=KEY_CHARS)]
_Token = Annotated[bytes, msgspec.Meta(max_length=16)]
_ERRORS = {
    name: getattr(errors, name)
    for name in ("AlreadyExists", "InvalidFormat", "NotFound", "OutOfSpace", "StoreError", "Truncated")
}


class _Document(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    pass


class Put(_Document, frozen=True):
    """Store this object. The token tells one request that is sent twice from two."""

    key: _Key
    mode: Mode
    token: _Token
    data: Annotated[bytes, msgspec.Meta(max_length=INLINE_BYTES)]


class Begin(_Document, frozen=True):
    """Store an object that follows: `head` bytes that come last, and a body, of so many bytes where that is known."""

    key: _Key
    mode: Mode
    token: _Token
    head: _Size
    body: _Size | None
    exact: bool


class End(_Document, frozen=True):
    """That was all of it. Without `whole` it is to be forgotten."""

    whole: bool = True


class Read(_Document, frozen=True):
    """Send the bytes of an object from `start` to `end`, or to its end: their number, then data frames."""

    key: _Key
    start: _Size
    end: _Size | None


class Info(_Document, frozen=True):
    """Say how an object stands."""

    key: _Key


class List(_Document, frozen=True):
    """Say which objects lie below a prefix behind a key: at most PAGE_KEYS at a time."""

    prefix: _Key
    after: _Key


class Delete(_Document, frozen=True):
    """Remove objects."""

    keys: Annotated[list[_Key], msgspec.Meta(max_length=PAGE_KEYS)]


class Room(_Document, frozen=True):
    """Say how many more bytes fit."""


# ---- rings: several services that decide together -------------------------------------------------------------------


class Ballot(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Which of two proposals is the later one."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    token: _Token = b""


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a register holds: an object's bytes or where they are, and who wrote it; `dead` for none."""

    writer: _Token = b""
    dead: bool = True
    size: _Size = 0
    time: float = 0.0
    data: Annotated[bytes, msgspec.Meta(max_length=INLINE_BYTES)] = b""
    bulk: Annotated[str, msgspec.Meta(max_length=64)] = ""
    hosts: Annotated[list[int], msgspec.Meta(max_length=64)] = []


class Members(_Document, frozen=True):
    """Say which instances make up the ring at a prefix; or, with `form`, let it be these, in the place of those of
    `over`. It is the answer too."""

    prefix: _Key
    form: Annotated[list[bytes], msgspec.Meta(max_length=64)] = []
    over: _Token = b""


class Prepare(_Document, frozen=True):
    """Promise to accept no older proposal for a key, and say what was accepted last."""

    prefix: _Key
    ring: _Token
    key: _Key
    ballot: Ballot


class Accept(_Document, frozen=True):
    """Accept a value, unless a later proposal was promised to."""

    prefix: _Key
    ring: _Token
    key: _Key
    ballot: Ballot
    value: Value


class Peek(_Document, frozen=True):
    """Say what was accepted last for a key."""

    prefix: _Key
    ring: _Token
    key: _Key


class Registers(_Document, frozen=True):
    """Say what was accepted last for the keys below another, without the values: PAGE_KEYS at a time."""

    prefix: _Key
    ring: _Token
    below: _Key
    after: _Key


class Vote(_Document, frozen=True):
    """Whether it was granted, what was promised and accepted last, and the time here."""

    granted: bool
    promised: Ballot
    accepted: Ballot
    value: Value
    time: float


class Registered(_Document, frozen=True):
    """Registers: key, ballot that was accepted, whether it is dead, size, time."""

    found: list[tuple[_Key, Ballot, bool, _Size, float]]
    more: bool


class Fine(_Document, frozen=True):
    """It is done; or go on."""


class Sized(_Document, frozen=True):
    """A number of bytes."""

    size: _Size


class Listed(_Document, frozen=True):
    """Objects as (key, size, time); `more` when others follow."""

    objects: list[tuple[_Key, _Size, float]]
    more: bool = False

    def infos(self) -> list[ObjectInfo]:
        """Return them as a store does."""
        return [ObjectInfo(*one) for one in self.objects]


class Failed(_Document, frozen=True):
    """It cannot be done."""

    error: str
    message: str

    @classmethod
    def of(cls, error: HoldfastError) -> Failed:
        """Return what tells the other side of an error."""
        name = type(error).__name__
        return cls(name if name in _ERRORS else StoreError.__name__, str(error)[:MESSAGE_CHARS])

    def rebuilt(self, place: str) -> HoldfastError:
        """Return the error, said of a place."""
        said = "".join(c if c.isprintable() else "�" for c in self.message[:MESSAGE_CHARS])
        found: HoldfastError = _ERRORS.get(self.error, StoreError)(f"{place}: {said}")
        return found


OfRings: TypeAlias = Members | Prepare | Accept | Peek | Registers
Request: TypeAlias = Put | Begin | End | Read | Info | List | Delete | Room | OfRings
Answer: TypeAlias = Fine | Sized | Listed | Failed | Members | Vote | Registered
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode


def decode_request(raw: bytes) -> Request:
    """Return what a user asks. Raises Garbled."""
    try:
        return _REQUESTS.decode(raw)
    except (msgspec.DecodeError, RecursionError) as e:
        raise Garbled(f"a request that is none: {e}") from None


def decode_answer(raw: bytes) -> Answer:
    """Return what a service answers. Raises Garbled."""
    try:
        return _ANSWERS.decode(raw)
    except (msgspec.DecodeError, RecursionError) as e:
        raise Garbled(f"an answer that is none: {e}") from None
