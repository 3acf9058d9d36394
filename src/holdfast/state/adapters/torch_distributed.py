"""What is spread over processes: DTensors (of FSDP2, HSDP, tensor parallelism), and replicas (of DDP).

The only module that knows torch.distributed. It calls no collective. Nothing is imported that the program has not
imported itself: without torch.distributed.tensor there is no DTensor.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn

from holdfast.state.adapters.torch_names import objects_in
from holdfast.state.tensors import HeldBox, group_of

__all__ = [
    "broadcast",
    "default_store",
    "group",
    "held_boxes",
    "is_spread",
    "local_of",
    "looked_at",
    "replicated",
    "settle",
    "why_not_spread",
    "wrapped_like",
]

_TENSOR = "torch.distributed.tensor"
_FSDP = "torch.distributed.fsdp"
_DDP = "torch.nn.parallel.distributed"

_HOW = (attrgetter("requires_grad"), attrgetter("_spec.placements"), attrgetter("_spec.tensor_meta"))
_LOCAL = attrgetter("_local_tensor")
_PLAIN = (torch.Tensor, nn.Parameter)

Stretches = list[
    tuple[int, int]
]  # first and end of what is held of one dimension, in the order in which it is held

# Of a box: where it begins in the whole, its shape, and the (dimension, first, size) that it is cut by.
Held = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int, int], ...]]


def _named(module: str, name: str) -> Any:
    """Return what the program has imported under a name, else None."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


def _distributed() -> Any:
    """Return torch.distributed if a default group is there, else None."""
    found = sys.modules.get("torch.distributed")
    return found if found is not None and found.is_available() and found.is_initialized() else None


def group() -> tuple[int, int] | None:
    """Return (rank, number of ranks) of the default group; None where there is none."""
    distributed = _distributed()
    return None if distributed is None else (int(distributed.get_rank()), int(distributed.get_world_size()))


def default_store() -> object | None:
    """Return the key-value store through which the default group was made; None where there is none."""
    distributed = _distributed()
    if distributed is None:
        return None
    found = _named("torch.distributed.distributed_c10d", "_get_default_store")
    return None if found is None else cast("object", found())


def broadcast(memory: memoryview) -> None:
    """Fill `memory` on every rank of the default group with what it holds on the first; a collective."""
    if not len(memory):
        return
    distributed = cast("Any", _distributed())
    host = torch.frombuffer(memory, dtype=torch.uint8)
    device = _named("torch.distributed.distributed_c10d", "_get_pg_default_device")()
    there = host if device.type == "cpu" else host.to(device)
    distributed.broadcast(there, src=0)
    if there is not host:
        host.copy_(there)


def is_spread(t: torch.Tensor) -> bool:
    """Return whether a tensor is spread over processes."""
    if type(t) is torch.Tensor or type(t) is nn.Parameter:
        return False
    cls = _named(_TENSOR, "DTensor")
    return cls is not None and isinstance(t, cls)


def looked_at(values: Sequence[torch.Tensor]) -> tuple[list[list[object]], Sequence[torch.Tensor]]:
    """Return, for some tensors of which some are spread, columns of how they are, and of each the tensor that lies in
    this process's memory: what is held, where it is spread."""
    cls = _named(_TENSOR, "DTensor")
    if cls is None:
        return [], values
    spread = [t for t in values if isinstance(t, cls)]
    columns: list[list[object]] = [list(map(get, spread)) for get in _HOW] if spread else []
    held = list(map(_LOCAL, spread))
    if not set(map(type, held)).issubset(_PLAIN):  # of a collective that is under way
        held = list(map(local_of, spread))
    if len(spread) == len(values):
        return columns, held
    rest = iter(held)
    return columns, [next(rest) if isinstance(t, cls) else t for t in values] if spread else values


def why_not_spread(t: torch.Tensor) -> str | None:
    """Return why what is held here of a spread tensor cannot be stored or written in place, or None if it can."""
    for placement in cast("Any", t).placements:
        if placement.is_partial():
            return "a DTensor with a partial placement is a sum that is not made yet; redistribute it first"
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            return f"a DTensor with the placement {placement} is not known; redistribute it first"
    return None


def local_of(t: torch.Tensor) -> torch.Tensor:
    """Return an alias of what this process holds of a spread tensor."""
    local: Any = cast("Any", t)._local_tensor.detach()
    wait = getattr(local, "wait", None)
    return cast("torch.Tensor", local if wait is None else wait())


def held_boxes(t: torch.Tensor) -> tuple[list[HeldBox], str]:
    """Return the boxes that this process holds of a spread tensor, and its group.

    torch's own lists know the first offset of a strided shard only, and take what lies apart for one stretch; here
    each dimension is followed through the placements.
    """
    d = cast("Any", t)
    local = local_of(t)
    mesh, here = d.device_mesh, d.device_mesh.get_coordinate()
    group, replica, replicas, held = _held(
        mesh, here and tuple(here), d.placements, tuple(map(int, d.shape)), tuple(local.shape)
    )
    if held is None:
        return [], group
    if len(held) == 1 and held[0][1] == local.shape:
        return [HeldBox(held[0][0], held[0][1], local, replica, replicas)], group
    cut = [(o, s, functools.reduce(lambda part, c: part.narrow(*c), cuts, local)) for o, s, cuts in held]
    return [HeldBox(o, s, v, replica, replicas) for o, s, v in cut], group


@functools.lru_cache(maxsize=4096)
def _held(
    mesh: Any,
    here: tuple[int, ...] | None,
    placements: tuple[Any, ...],
    shape: tuple[int, ...],
    local: tuple[int, ...],
) -> tuple[str, int, int, list[Held] | None]:
    """Return the group, number of the replica, how many there are, and what boxes of a tensor of this shape are held;
    tensors that are spread alike, most often very many, are looked at once. `here` is the place of this process in the
    mesh: meshes are equal wherever one stands in them, and a process that makes its group anew may be another rank."""
    group = group_of(mesh.mesh.flatten().tolist())
    if here is None:
        return group, 0, 1, None
    replica, replicas = 0, 1
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            replica = replica * mesh.size(dim) + here[dim]
            replicas *= mesh.size(dim)
    if 0 in local:  # where it would begin is of no meaning, and may lie outside
        return group, replica, replicas, [((0,) * len(shape), local, ())]
    held = [
        _held_of_dimension(placements, mesh, here, dim, size, local[dim]) for dim, size in enumerate(shape)
    ]
    return group, replica, replicas, list(_boxes(local, held))


def _boxes(local: tuple[int, ...], held: Sequence[Stretches]) -> Iterator[Held]:
    """Yield of each box where it begins, its shape, and how it is cut from what is held."""
    for stretches in itertools.product(*map(_with_places, held)):
        cuts = tuple(
            (dim, at, end - first)
            for dim, (first, end, at) in enumerate(stretches)
            if end - first != local[dim]
        )
        yield tuple(s[0] for s in stretches), tuple(s[1] - s[0] for s in stretches), cuts


def _with_places(stretches: Stretches) -> Iterator[tuple[int, int, int]]:
    at = 0
    for first, end in stretches:
        yield first, end, at
        at += end - first


def _held_of_dimension(
    placements: Sequence[Any], mesh: Any, here: Sequence[int], dim: int, size: int, expected: int
) -> Stretches:
    """Return what of a dimension this process holds; `expected` is how much that is."""
    cuts = [
        (getattr(p, "split_factor", 1), mesh.size(m), here[m])
        for m, p in enumerate(placements)
        if not p.is_replicate() and p.dim == dim
    ]
    # `fully_shard` on top of tensor parallelism cuts by the later mesh dimensions first, and says so with a strided
    # shard whose factor is their size. Where sizes do not divide evenly, only this order is what it has really done.
    later = math.prod(n for _, n, _ in cuts[1:])
    if cuts and cuts[0][0] == later > 1 and all(factor == 1 for factor, _, _ in cuts[1:]):
        nested = _cut([(0, size)], [(1, n, i) for _, n, i in (*cuts[1:], cuts[0])])
        if sum(end - first for first, end in nested) == expected:
            return nested
    return _cut([(0, size)], cuts)


def _cut(held: Stretches, cuts: Iterable[tuple[int, int, int]]) -> Stretches:
    """Return what is left of some stretches after each cut: in `factor` pieces, each in `n`, of which `i` is kept."""
    for factor, n, i in cuts:
        kept: Stretches = []
        for piece in _chunks(held, factor):
            chunks = _chunks(piece, n)
            kept += chunks[i] if i < len(chunks) else []
        held = _joined(kept)
    return held


def _chunks(held: Stretches, n: int) -> list[Stretches]:
    """Cut stretches into at most `n` equally long ones, but for the last, as torch.chunk does."""
    total = sum(end - first for first, end in held)
    step = -(-total // n)
    return [_slice(held, at, min(at + step, total)) for at in range(0, total, step)] if total else []


def _slice(held: Stretches, start: int, stop: int) -> Stretches:
    found: Stretches = []
    for first, end, at in _with_places(held):
        begin, finish = max(start, at), min(stop, at + end - first)
        if begin < finish:
            found.append((first + begin - at, first + finish - at))
    return found


def _joined(held: Stretches) -> Stretches:
    joined: Stretches = []
    for first, end in held:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined


def wrapped_like(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is spread as `like` is, of which this process holds `local`."""
    d = cast("Any", like)
    whole: torch.Tensor = _named(_TENSOR, "DTensor").from_local(
        local, d.device_mesh, d.placements, run_check=False, shape=d.shape, stride=d.stride()
    )
    return whole


def settle(state: Mapping[str, object]) -> None:
    """Have the parameters of `fully_shard` be the sharded ones, as they are outside of forward and backward."""
    cls = _named(_FSDP, "FSDPModule")
    if cls is None:
        return
    for module in _modules_in(state):
        if isinstance(module, cls):
            cast("Any", module).reshard()


def replicated(state: Mapping[str, object]) -> dict[int, tuple[int, ...]]:
    """Return, by id, the parameters that DDP keeps the same on several ranks, and these ranks."""
    cls = _named(_DDP, "DistributedDataParallel")
    found: dict[int, tuple[int, ...]] = {}
    if cls is None:
        return found
    for module in _modules_in(state):
        if isinstance(module, cls):
            ranks = _ranks_of(cast("Any", module).process_group)
            ignored = getattr(module, "parameters_to_ignore", ())
            inner = cast("Any", module).module
            found.update((id(p), ranks) for n, p in inner.named_parameters() if n not in ignored)
    return found


def _modules_in(state: Mapping[str, object]) -> Iterator[nn.Module]:
    for _, root in objects_in(state):
        if isinstance(root, nn.Module):
            yield from root.modules()


def _ranks_of(process_group: object) -> tuple[int, ...]:
    return tuple(cast("Any", sys.modules["torch.distributed"]).get_process_group_ranks(process_group))
