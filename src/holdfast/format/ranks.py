"""How a checkpoint of several ranks is laid out in the manifest.

Each part of the state is stored under its name as rank 0 had it, with the data files of all ranks that hold shares of
its tensors. What another rank has for itself is a part of its own called "~<rank>": its tensors, under their full
names, and as JSON in tensors of bytes below "~/" the values of those parts that differ from rank 0's.
"""

from __future__ import annotations

import re

import msgspec

from holdfast.core.errors import InvalidFormat
from holdfast.core.names import check_path
from holdfast.format.manifest import Manifest, Part

__all__ = [
    "ELSEWHERE",
    "MARK",
    "RANK",
    "RANK_APART",
    "OwnValues",
    "check_ranks",
    "decode_own",
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
_OWN = re.compile(r"~([1-9][0-9]*)")
_NOTHING = b"null"


class OwnValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One part as one rank has it: encoded values, kind and ties. `apart`: other tensors than rank 0's, by name.

    `gone` are full names of tensors, of any part, that older files of the rank hold and that are its own no more."""

    tree: msgspec.Raw
    kind: str = ""
    aliases: dict[str, str] = {}
    apart: bool = False
    gone: list[str] = []


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


def check_ranks(manifest: Manifest) -> None:
    """Raise InvalidFormat where the parts of a manifest are not those of as many ranks as it speaks of."""
    world = manifest.world_size
    if world < 1:
        raise InvalidFormat(f"step {manifest.step}: says that {world} ranks have written it")
    for name, part in manifest.parts.items():
        rank, own = rank_of(name), is_ranks(part)
        if own and not 0 < rank < world:
            raise InvalidFormat(
                f"step {manifest.step}: part {name[:80]!r} is of the kind {part.kind!r}, and no rank of {world} is "
                "called so"
            )
        if rank and world > 1 and not own:
            raise InvalidFormat(
                f"step {manifest.step}: part {name[:80]!r} has the name of a rank's own and is of the kind "
                f"{part.kind[:80]!r}"
            )
        if part.kind == ELSEWHERE and world == 1:
            raise InvalidFormat(f"step {manifest.step}: part {name[:80]!r} is of a rank beside the only one")
        if (own or part.kind == ELSEWHERE) and (bytes(part.tree) != _NOTHING or part.aliases):
            raise InvalidFormat(
                f"step {manifest.step}: part {name[:80]!r}, of the kind {part.kind!r}, must have neither tree nor ties"
            )


def decode_own(raw: bytes, name: str) -> tuple[str, OwnValues]:
    """Return for which part the tensor of bytes called `name` holds a rank's values, and these.

    Raises:
        InvalidFormat: it holds something else.
    """
    part = check_path(name[len(MARK) + 1 :])
    try:
        found = msgspec.json.decode(raw, type=OwnValues)
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name[:80]!r} does not hold values of a part: {e}") from e
    if part.startswith(MARK) or msgspec.json.encode(found) != raw:
        raise InvalidFormat(f"{name[:80]!r} does not hold values of a part in their one form")
    return part, found


def values_name(part: str) -> str:
    """Return the name, in a rank's own part, of the tensor that holds its values of `part`."""
    return f"{MARK}/{part}"
