"""Which part of an array this process holds, where other processes hold the rest. Calls no collective."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax

from holdfast.state.adapters.jax_placing import Bounds, bounds

__all__ = ["Part", "group", "parts_of"]


class Part(NamedTuple):
    """A box of an array, on one device of this process. `replicas` processes hold it, of which this is number
    `replica`."""

    offsets: tuple[int, ...]
    data: jax.Array
    replica: int
    replicas: int


def group() -> tuple[int, int] | None:
    """Return (index, number) of the processes; None where jax.distributed is not initialised."""
    if not jax.distributed.is_initialized():
        return None
    return jax.process_index(), jax.process_count()


def parts_of(x: jax.Array) -> list[Part]:
    """Return the boxes of an array that this process holds, each once."""
    shape = tuple(x.shape)
    holders: dict[Bounds, set[int]] = {}
    for device, index in x.sharding.devices_indices_map(shape).items():
        holders.setdefault(bounds(index, shape), set()).add(cast("Any", device).process_index)
    mine = jax.process_index()
    found: dict[Bounds, Part] = {}
    for shard in x.addressable_shards:
        box = bounds(shard.index, shape)
        if box not in found:
            processes = sorted(holders[box])
            offsets = tuple(first for first, _ in box)
            found[box] = Part(offsets, shard.data, processes.index(mine), len(processes))
    return [found[box] for box in sorted(found)]
