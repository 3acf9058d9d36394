"""Small JSON documents as their writer cannot have us misread them: bounded, and each key once.

Programs differ in which of two equal keys they take, so a document with such keys means two things, and is refused.
What a number may be is said in its type: whoever names an object, a date or a process after it need not ask again.
"""

from __future__ import annotations

import json
from typing import Annotated, TypeVar

import msgspec

from holdfast.core.errors import InvalidFormat

__all__ = ["Attempt", "Count", "Moment", "Name", "StepNumber", "decode_document", "refuse_twins"]

Value = TypeVar("Value")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
StepNumber = Annotated[int, msgspec.Meta(ge=0, lt=10**12)]
Moment = Annotated[float, msgspec.Meta(ge=-6e10, le=2.5e11)]  # seconds since the Unix epoch that have a date
Name = Annotated[str, msgspec.Meta(max_length=1024)]
Attempt = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z]{1,64}\Z")]  # it becomes part of a key


def decode_document(body: bytes, type: type[Value], name: str, what: str) -> Value:
    """Return what a JSON document says; `name` is its key and `what` it is, for the message.

    Raises:
        InvalidFormat: it is outside the grammar, or a key occurs twice.
    """
    try:
        value = msgspec.json.decode(body, type=type)
        if msgspec.json.encode(value) != body:  # then it may hold a key twice; it need not
            json.loads(body, object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError, OverflowError) as e:
        raise InvalidFormat(f"{name}: is not {what}: {e}") from e
    return value


def refuse_twins(members: list[tuple[str, object]]) -> None:
    """Refuse a key that occurs twice, as the hook of `json.loads`."""
    if len({key for key, _ in members}) != len(members):
        raise ValueError("a key occurs twice")
