"""Values: how what is not a tensor is stored without pickle, and how the trees of a checkpoint are put together."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from holdfast.core.errors import StateError, UnsupportedValue
from holdfast.format.manifest import Part
from holdfast.format.values import TensorLeaf, Typed, encode_value
from holdfast.integrations.dcp.naming import Path, Place, note_of, paths_in, place_of
from holdfast.state.capturing import Capturing
from holdfast.state.place import materialize
from holdfast.state.registry import dispatch
from holdfast.state.restoring import typed_nodes
from holdfast.state.tensors import HostTensor, TensorSource

__all__ = ["Trees", "captured", "object_of", "rebuilt"]

_NEED_A_CLASS = ("dataclass", "namedtuple", "enum")
_BYTES_IO = "io.BytesIO"


def object_of(planner: SavePlanner, item: WriteItem) -> object:
    """Return the object that an item without a tensor stands for.

    DCP would hand it over pickled. The default planner gives the object itself; what another planner makes of it is
    read with `weights_only=True`, which runs no code.

    Raises:
        UnsupportedValue: it takes code to read.
    """
    if isinstance(planner, DefaultSavePlanner) and _resolves_as_default(type(planner)):
        return planner.lookup_object(item.index)
    made = planner.resolve_data(item)
    if not isinstance(made, io.BytesIO):
        return made
    made.seek(0)
    try:
        return torch.load(made, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UnsupportedValue(
            f"{item.index.fqn}: what {type(planner).__qualname__} makes of it cannot be read without running code "
            f"({e}); keep its parts as plain values"
        ) from e


def _resolves_as_default(kind: type[DefaultSavePlanner]) -> bool:
    default = DefaultSavePlanner
    return kind.resolve_data is default.resolve_data and kind.transform_object is default.transform_object


def captured(value: object, place: Place) -> tuple[bytes, list[TensorSource]]:
    """Return the encoded form of a value that stands at a place, and the tensors in it.

    Raises:
        UnsupportedValue: it cannot be stored without running code at load; the message names its path.
    """
    found = Capturing(dispatch(), {}, set(), gradients=False)
    tree: object
    if isinstance(value, io.BytesIO):
        tree = Typed(_BYTES_IO, value.getvalue())
    else:
        tree = found.value(value, place.position)
    for node in typed_nodes(tree):
        if node.kind in _NEED_A_CLASS:
            raise UnsupportedValue(
                f"{place.position}: holds a {node.kind}, which takes its class to come back, and a state dict loads "
                "without code; keep its fields in a dict"
            )
    return msgspec.json.encode(encode_value(tree, place.position)), found.tensors


def rebuilt(node: object, tensors: Mapping[str, HostTensor]) -> object:
    """Return the value that a stored node stands for."""
    if isinstance(node, Typed) and node.kind == _BYTES_IO and isinstance(node.value, bytes):
        return io.BytesIO(node.value)
    return materialize(node, tensors, as_="torch")


@dataclass(slots=True)
class Trees:
    """The value trees of a checkpoint by part, and the note that tells entries from nodes."""

    encoded: dict[str, msgspec.Raw] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    note: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Metadata, values: Mapping[str, bytes]) -> Trees:
        """Put the trees together from DCP's metadata and the encoded values by key.

        Raises:
            StateError: a value is missing, or two entries would stand in one place.
        """
        paths = paths_in(metadata.planner_data)
        holder: dict[object, object] = {}
        entries: dict[str, tuple[str, Path]] = {}
        for fqn, stored in metadata.state_dict_metadata.items():
            place = place_of(fqn, paths.get(fqn))
            if place.position in entries:
                raise StateError(
                    f"{fqn} and {entries[place.position][0]}: both would be called {place.position!r} in the "
                    "checkpoint; rename one"
                )
            node: object
            if isinstance(stored, TensorStorageMetadata):
                node = TensorLeaf(place.tensor, "torch.Tensor")
            elif fqn in values:
                node = msgspec.Raw(values[fqn])
            else:
                raise StateError(f"{fqn}: DCP's plan has this value, and no rank wrote it")
            _insert(holder, (place.part, *place.below), node, fqn)
            entries[place.position] = (fqn, place.path)
        made = cls()
        for part, tree in holder.items():
            name = str(part)
            made.encoded[name] = msgspec.Raw(msgspec.json.encode(encode_value(tree, name)))
            made.kinds[name] = _kind(tree)
        decoded = {part: Part(tree).values(part) for part, tree in made.encoded.items()}
        made.note = note_of(decoded, entries)
        return made


def _insert(holder: dict[object, object], path: Path, node: object, fqn: str) -> None:
    """Put a node where a path leads; a number is a position in a list."""
    inside: object = holder
    for key, after in zip(path, (*path[1:], None), strict=True):
        last = after is None
        made: object = node if last else ([] if type(after) is int else {})
        if isinstance(inside, list) and type(key) is int:
            inside.extend([None] * (key + 1 - len(inside)))
            if inside[key] is None or last:
                inside[key] = made
            inside = inside[key]
        elif isinstance(inside, dict) and type(key) is str and not (last and key in inside):
            inside = inside.setdefault(key, made)
        else:
            raise StateError(f"{fqn}: another entry stands where its path {path} leads; rename one")


def _kind(tree: object) -> str:
    """Return what kind of object the tree of a part is the state of, as far as its form tells."""
    if isinstance(tree, dict) and tree:
        if all(isinstance(v, TensorLeaf) for v in tree.values()):
            return "module"
        if tree.keys() <= {"state", "param_groups"}:
            return "optimizer"
    return "values"
