"""How a checkpoint of several ranks is laid out in the manifest.

Each part of the state is stored under its name as rank 0 had it, with the data files of all ranks that hold shares of
its tensors. What another rank has for itself is a part of its own called "~<rank>": its tensors, under their full
names, and as JSON in tensors of bytes below "~/" the values of those parts that differ from rank 0's.
"""

from __future__ import annotations

import re

import msgspec

from holdfast.format.manifest import Part

__all__ = [
    "ELSEWHERE",
    "MARK",
    "RANK",
    "RANK_APART",
    "OwnValues",
    "is_ranks",
    "own_part",
    "rank_mark",
    "rank_of",
    "values_name",
]

MARK = "~"
RANK = "rank"  # the kind of a rank's own part
RANK_APART = "rank apart"  # the same, of a rank that had other tensors than rank 0
ELSEWHERE = "elsewhere"  # the kind of a part that rank 0 does not have
_OWN = re.compile(r"~([1-9]\d*)")


class OwnValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One part as one rank has it: encoded values, kind and ties. `apart`: other tensors than rank 0's, by name."""

    tree: msgspec.Raw
    kind: str = ""
    aliases: dict[str, str] = {}
    apart: bool = False


def own_part(rank: int) -> str:
    """Return the name of the part that holds what `rank`, which is not the first, has for itself."""
    return f"{MARK}{rank}"


def rank_of(part: str) -> int:
    """Return the rank that a part belongs to; 0 for the parts of the state themselves."""
    found = _OWN.fullmatch(part)
    return int(found[1]) if found else 0


def rank_mark(rank: int, world: int) -> str:
    """Return what the names of the data files end with that one of several ranks has written."""
    return f"-{rank:05d}-of-{world:05d}"


def is_ranks(part: Part) -> bool:
    """Return whether a part is what one rank had for itself."""
    return part.kind in (RANK, RANK_APART)


def values_name(part: str) -> str:
    """Return the name, in a rank's own part, of the tensor that holds its values of `part`."""
    return f"{MARK}/{part}"
