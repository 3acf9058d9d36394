"""What a checkpoint of several ranks is to one of them, or to a single process.

Each part of the state is stored under its name as rank 0 had it, with the data files of all ranks that hold shares of
its tensors. What another rank has for itself, and its values where they differ, is a part of its own called
"~<rank>/<part>".
"""

from __future__ import annotations

import re

import msgspec

from holdfast.format.manifest import Manifest, Part

__all__ = ["own_part", "split_own", "view_of"]

RNG = "rng"
_OWN = re.compile(r"~(\d+)/(.+)")


def own_part(rank: int, part: str) -> str:
    """Return the name under which a part is stored as `rank` alone has it."""
    return part if rank == 0 else f"~{rank}/{part}"


def split_own(name: str) -> tuple[int, str]:
    """Return (rank, part) of the name of a stored part; rank 0 for the parts of the state themselves."""
    found = _OWN.fullmatch(name)
    return (int(found[1]), found[2]) if found else (0, name)


def view_of(manifest: Manifest, rank: int = 0, world: int = 1) -> tuple[Manifest, list[str]]:
    """Return a checkpoint as one rank of so many sees it, and notes on what is not as it was saved.

    At the size it was saved at, every rank finds what was its own. At another, all take what rank 0 had for itself, but
    for random generators: rank i takes those of rank i, and one that is new derives its own from those of rank 0.
    """
    if manifest.world_size == 1 and world == 1:
        return manifest, []
    parts = {name: part for name, part in manifest.parts.items() if not split_own(name)[0]}
    notes: list[str] = []
    then = manifest.world_size
    if then == world:
        view = {name: _seen(manifest, rank, name, part) for name, part in parts.items()}
    else:
        view = dict(parts)
        notes.append(
            f"saved by {then} ranks and restored by {world}: what a rank had for itself alone is taken from rank 0"
        )
        if RNG in parts:
            view[RNG] = _seen(manifest, rank if rank < then else 0, RNG, parts[RNG])
            if rank >= then:
                notes.append(f"random generators: there was no rank {rank}; derived from those of rank 0")
    return msgspec.structs.replace(manifest, parts=view), notes


def _seen(manifest: Manifest, rank: int, name: str, part: Part) -> Part:
    own = manifest.parts.get(own_part(rank, name))
    if rank == 0 or own is None:
        return part
    # What a rank has for itself comes first: its name may stand in rank 0's file too.
    return Part(own.tree, part.kind, [*own.files, *part.files], own.aliases)
