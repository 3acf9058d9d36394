"""What a rank's plan has it write: tensors, of which only what they are is found out at once, and values, encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from holdfast.core.errors import StateError, UnsupportedValue
from holdfast.core.names import name_in_file
from holdfast.format.datafile import StoredTensor
from holdfast.integrations.dcp.naming import Place, paths_in, place_of
from holdfast.integrations.dcp.trees import captured, object_of
from holdfast.integrations.dcp.unchanged import Key
from holdfast.state.adapters.torch_placing import NAMES
from holdfast.state.adapters.torch_tensors import tensor_spec
from holdfast.state.registry import dispatch
from holdfast.state.tensors import TensorSource

__all__ = ["Items", "Piece", "items_of", "names_of"]


class Piece(NamedTuple):
    """A tensor to write, and what gives its bytes in C order."""

    tensor: StoredTensor
    data: Callable[[], memoryview]

    @property
    def key(self) -> Key:
        t = self.tensor
        return (t.name, t.dtype, t.shape, t.box)


@dataclass(slots=True)
class Items:
    """What a plan has to write: pieces by part, and values by key."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    tensors: int = 0


def items_of(plan: SavePlan, planner: SavePlanner) -> Items:
    """Find out what a rank writes. Values are taken at once, tensors later.

    Raises:
        UnsupportedValue: something cannot be stored without running code at load; named, and nothing was written.
    """
    found = Items()
    paths = paths_in(plan.planner_data)
    for item in plan.items:
        place = place_of(item.index.fqn, paths.get(item.index.fqn))
        if item.type == WriteItemType.BYTE_IO:
            found.values[item.index.fqn], inside = captured(object_of(planner, item), place)
            for source in inside:
                piece = _piece_of_source(source, place.part)
                found.pieces.setdefault(place.part, []).append(piece)
            continue
        found.tensors += 1
        piece_of_it = _piece(item, place, planner)
        if piece_of_it is not None:
            found.pieces.setdefault(place.part, []).append(piece_of_it)
    return found


def names_of(plan: SavePlan) -> dict[str, list[str]]:
    """Return by part the names, inside it, of the tensors that a plan has a rank write."""
    paths = paths_in(plan.planner_data)
    found: dict[str, list[str]] = {}
    for item in plan.items:
        if item.type != WriteItemType.BYTE_IO:
            place = place_of(item.index.fqn, paths.get(item.index.fqn))
            found.setdefault(place.part, []).append(name_in_file(place.part, place.tensor))
    return found


def _piece(item: WriteItem, place: Place, planner: SavePlanner) -> Piece | None:
    """Return what is to be written of a tensor item; None for an empty part of a tensor that is not empty."""
    data = item.tensor_data
    assert data is not None
    whole, shape, offsets = tuple(data.size), tuple(data.chunk.sizes), tuple(data.chunk.offsets)
    dtype = NAMES.get(data.properties.dtype)
    if dtype is None:
        raise UnsupportedValue(
            f"{item.index.fqn}: elements of type {data.properties.dtype} cannot be stored; convert the tensor"
        )
    if 0 in whole:
        shape, offsets = whole, (0,) * len(whole)
    elif 0 in shape:
        return None
    box = (offsets, whole) if shape != whole else None
    name = name_in_file(place.part, place.tensor)
    stored = StoredTensor(name, dtype, shape, None, 0, 0, box)

    def bytes_of_it() -> memoryview:
        if 0 in shape:
            return memoryview(b"")
        made = planner.resolve_data(item)
        if not isinstance(made, torch.Tensor):
            raise StateError(
                f"{item.index.fqn}: the planner planned a tensor and gave a {type(made).__name__}"
            )
        found = tensor_spec(made.detach(), item.index.fqn)
        if (found.dtype, found.shape) != (dtype, shape):
            raise StateError(
                f"{item.index.fqn}: the planner planned {dtype}{list(shape)} and gave {found.describe()}"
            )
        return _host_bytes(made)

    return Piece(stored, bytes_of_it)


def _host_bytes(t: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy where they lie so in host memory."""
    host = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return memoryview(host.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _piece_of_source(source: TensorSource, part: str) -> Piece:
    """Return what is to be written of a tensor that stands inside a value."""
    spec = source.spec
    if spec.shard is not None and spec.shape != spec.shard.box[1]:
        raise UnsupportedValue(
            f"{spec.name}: a tensor inside a value is spread over processes; keep it in a dict"
        )

    def bytes_of_it() -> memoryview:
        engine = next(e for e in dispatch().engines.values() if e.owns(source.value))
        memory = memoryview(bytearray(spec.nbytes))
        if spec.nbytes:
            engine.copy_out([source.value], engine.targets([spec], [memory]))
        return memory

    stored = StoredTensor(name_in_file(part, spec.name), spec.dtype, spec.shape, spec.stride, 0, 0)
    return Piece(stored, bytes_of_it)
