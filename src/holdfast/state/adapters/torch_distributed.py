"""What is spread over processes: DTensors (of FSDP2, HSDP and tensor parallelism) and replicas (of DDP).

The only module that knows torch.distributed. It calls no collective. Nothing is imported that the program has not
imported itself: without torch.distributed.tensor there is no DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from holdfast.state.tensors import Shard

__all__ = ["group", "is_spread", "local_of", "replicated", "settle", "why_not_spread", "wrapped_like"]

_TENSOR = "torch.distributed.tensor"
_FSDP = "torch.distributed.fsdp"
_DDP = "torch.nn.parallel.distributed"
_OFFSETS = "torch.distributed.tensor._utils"


def _named(module: str, name: str) -> Any:
    """Return what the program has imported under a name, else None."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


def group() -> tuple[int, int] | None:
    """Return (rank, number of ranks) of the default group; None where there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_rank()), int(distributed.get_world_size())


def is_spread(t: torch.Tensor) -> bool:
    """Return whether a tensor is spread over processes."""
    if type(t) is torch.Tensor or type(t) is nn.Parameter:
        return False
    cls = _named(_TENSOR, "DTensor")
    return cls is not None and isinstance(t, cls)


def why_not_spread(t: torch.Tensor) -> str | None:
    """Return why what is held here of a spread tensor cannot be stored or written in place, or None if it can."""
    d = cast("Any", t)
    for placement in d.placements:
        name = type(placement).__name__
        if placement.is_partial():
            return "a DTensor with a partial placement is a sum that is not made yet; redistribute it first"
        if name not in ("Shard", "Replicate"):
            return f"a DTensor with the placement {name} is not supported yet; redistribute it first"
    if d.device_mesh.get_coordinate() is None:
        return "a DTensor of a mesh that this rank is not part of; keep it out of this rank's state"
    return None


def local_of(t: torch.Tensor) -> tuple[torch.Tensor, Shard]:
    """Return an alias of what this process holds of a spread tensor, and what part of it that is."""
    d = cast("Any", t)
    local = d.to_local().detach()
    wait = getattr(local, "wait", None)
    if wait is not None:
        local = wait()
    mesh, placements = d.device_mesh, d.placements
    _, offsets = _named(_OFFSETS, "compute_local_shape_and_global_offset")(d.shape, mesh, placements)
    replica, replicas = 0, 1
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            replica = replica * mesh.size(dim) + mesh.get_coordinate()[dim]
            replicas *= mesh.size(dim)
    if not local.numel():  # where it would begin is of no meaning, and may lie outside
        offsets = [0] * d.dim()
    return local, Shard((tuple(map(int, offsets)), tuple(d.shape)), replica, replicas)


def wrapped_like(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is spread as `like` is, of which this process holds `local`."""
    d = cast("Any", like)
    made = type(d).from_local if hasattr(type(d), "from_local") else _named(_TENSOR, "DTensor").from_local
    shape, stride = d.shape, d.stride()
    whole: torch.Tensor = made(
        local, d.device_mesh, d.placements, run_check=False, shape=shape, stride=stride
    )
    return whole


def settle(values: Iterable[object]) -> None:
    """Have the parameters of `fully_shard` be the sharded ones, as they are outside of forward and backward."""
    cls = _named(_FSDP, "FSDPModule")
    if cls is None:
        return
    for root in values:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, cls):
                cast("Any", module).reshard()


def replicated(values: Iterable[object]) -> set[int]:
    """Return the ids of the parameters that every process has the same of, because DDP keeps them so."""
    cls = _named(_DDP, "DistributedDataParallel")
    found: set[int] = set()
    if cls is None:
        return found
    for root in values:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, cls):
                ignored = getattr(module, "parameters_to_ignore", ())
                inner = cast("Any", module).module
                found.update(id(p) for n, p in inner.named_parameters() if n not in ignored)
    return found
