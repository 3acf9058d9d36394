"""What a user says of a mirror, and the store that comes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from holdfast.core.clock import TimeSource
from holdfast.core.errors import PolicyError
from holdfast.core.units import parse_bytes, parse_seconds
from holdfast.format.packed import Pack
from holdfast.policies import Rule, require_retention
from holdfast.policies.retention import Demote
from holdfast.stores import Store, open_store, real_place
from holdfast.stores.wrappers import Throttled

__all__ = ["Mirror", "MirrorLike", "mirrors_of"]


@dataclass(frozen=True, slots=True)
class Mirror:
    """A further store that holds copies of a run's checkpoints.

    Args:
        url: where: a directory or a URL that no other run uses.
        keep: what it keeps, by a rule of its own; by default what the primary lists. The newest checkpoint, the newest
            verified one, the one that training went on from and tagged ones are there whatever the rule says.
        compress: whether data files are packed on the way.
        bandwidth: bytes per second that copying may take, as a number or like "20MB".
        verify: whether each copy is read back from the mirror, every byte of it, before its manifest is written.
        interval: how long to leave it alone after it was brought up to date, in seconds or like "10m": for a slow
            place behind a fast one. `wait()` with `ack=` and the end of training do not wait for that.

    Raises:
        PolicyError: the rule cannot say what to keep, or demotes: a copy is the primary's checkpoint, byte for byte.
    """

    url: str | os.PathLike[str] | Store
    keep: Rule | None = None
    compress: bool = False
    bandwidth: int | str | None = None
    verify: bool = False
    interval: str | float = 0

    def __post_init__(self) -> None:
        if self.keep is not None:
            for node in require_retention(self.keep).nodes():
                if isinstance(node, Demote):
                    raise PolicyError(
                        f"a mirror cannot {node!r}: its copies are the primary's checkpoints, byte for byte; "
                        "demote them in the primary's keep="
                    )
        if self.bandwidth is not None and parse_bytes(self.bandwidth) == 0:
            raise PolicyError(f"bandwidth={self.bandwidth!r} must be more than 0 bytes per second")
        parse_seconds(self.interval)

    @property
    def pack(self) -> Pack | None:
        """How data files are packed on the way."""
        return Pack() if self.compress else None

    def open(self, time: TimeSource) -> Store:
        """Return the mirror's store, which moves no more bytes than it may."""
        store = open_store(self.url)
        return store if self.bandwidth is None else Throttled(store, parse_bytes(self.bandwidth), time=time)


MirrorLike: TypeAlias = str | os.PathLike[str] | Store | Mirror


def mirrors_of(primary: Store, given: Sequence[MirrorLike], time: TimeSource) -> list[tuple[Mirror, Store]]:
    """Return the mirrors of a primary with their stores, opened.

    Raises:
        PolicyError: a place is given twice.
    """
    found: list[tuple[Mirror, Store]] = []
    places = {real_place(primary.url)}
    for one in given:
        mirror = one if isinstance(one, Mirror) else Mirror(one)
        store = mirror.open(time)
        place = real_place(store.url)
        if place in places:
            raise PolicyError(f"{store.url} is named twice: a run and its mirrors need a place each")
        places.add(place)
        found.append((mirror, store))
    return found
