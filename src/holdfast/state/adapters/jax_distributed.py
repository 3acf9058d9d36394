"""Which boxes of an array this process holds, where other processes hold the rest. Calls no collective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Sharding

from holdfast.state.adapters.jax_placing import Bounds, bounds
from holdfast.state.tensors import HeldBox, group_of

__all__ = ["Part", "group", "held_boxes", "local_parts", "wanted_boxes"]


class Part(NamedTuple):
    """What one device holds of an array: where it lies in the whole, and its elements."""

    box: Bounds
    data: jax.Array


def group() -> tuple[int, int] | None:
    """Return (index, number) of the processes; None where jax.distributed is not initialised."""
    if not jax.distributed.is_initialized():
        return None
    return jax.process_index(), jax.process_count()


def local_parts(x: jax.Array) -> list[Part]:
    """Return the boxes of an array that devices of this process hold, each once, in rising order."""
    found: dict[Bounds, Part] = {}
    for shard in x.addressable_shards:
        box = bounds(shard.index, tuple(x.shape))
        if box not in found:
            found[box] = Part(box, cast("jax.Array", shard.data))
    return [found[box] for box in sorted(found)]


def wanted_boxes(sharding: Sharding, shape: tuple[int, ...]) -> list[Bounds]:
    """Return the boxes that devices of this process are to hold, each once."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({bounds(cast("Any", index), shape) for index in indices})


def held_boxes(x: jax.Array) -> tuple[list[HeldBox], str]:
    """Return the boxes that this process holds of an array, and the group of processes that hold some of it.

    Boxes that make up a larger one are one: most often a process holds one stretch, on all of its devices.
    """
    shape = tuple(x.shape)
    holders = _holders(x.sharding, shape)
    everybody = group_of(process for processes in holders.values() for process in processes)
    mine = jax.process_index()
    parts = local_parts(x)
    replicas = {(holders[p.box].index(mine), len(holders[p.box])) for p in parts}
    around = _around([p.box for p in parts])
    if len(replicas) == 1 and _size(around) == sum(_size(p.box) for p in parts):
        return [HeldBox(*_as_offsets(around), x, *replicas.pop())], everybody
    return [
        HeldBox(*_as_offsets(p.box), p.data, holders[p.box].index(mine), len(holders[p.box])) for p in parts
    ], everybody


def _holders(sharding: Sharding, shape: tuple[int, ...]) -> Mapping[Bounds, list[int]]:
    """Return for each box the processes that hold it, in rising order."""
    found: dict[Bounds, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        found.setdefault(bounds(cast("Any", index), shape), set()).add(cast("Any", device).process_index)
    return {box: sorted(processes) for box, processes in found.items()}


def _around(boxes: list[Bounds]) -> Bounds:
    """Return the smallest box around some."""
    return tuple((min(a for a, _ in sides), max(b for _, b in sides)) for sides in zip(*boxes, strict=True))


def _size(box: Bounds) -> int:
    return math.prod(end - first for first, end in box)


def _as_offsets(box: Bounds) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(first for first, _ in box), tuple(end - first for first, end in box)
