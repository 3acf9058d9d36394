"""Stand-ins for values whose class is not at hand: what `load` gives back without the user's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EnumMember", "Record"]


@dataclass(frozen=True, slots=True)
class Record:
    """The named fields of an object of class `type` (its full name); the class itself was not looked up."""

    type: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> object:
        return self.fields[name]

    def __hash__(self) -> int:
        return hash((self.type, tuple(self.fields)))


@dataclass(frozen=True, slots=True)
class EnumMember:
    """A member of the enumeration `type` (its full name), by `member` name and, where plain, `value`."""

    type: str
    member: str
    value: object = None

    def __hash__(self) -> int:
        return hash((self.type, self.member))
