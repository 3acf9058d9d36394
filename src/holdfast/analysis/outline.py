"""The state of a checkpoint as a tree to look at: names nested by their components, alike siblings folded."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.checkpoint import Checkpoint
from holdfast.format.values import TensorLeaf, Typed, tensor_leaves
from holdfast.restoring.reader import Reader
from holdfast.state.tensors import TensorSpec

__all__ = ["Node", "outline"]

_COMPONENT = re.compile(r"[^./]*[./]|[^./]+$")


@dataclass(slots=True)
class Node:
    """A place in the state: a group with `children`, a tensor (`spec`), or a plain `value`.

    `last_name` is set when the node stands for several alike siblings, `name` to `last_name`, `repeats` of
    them; `tensors`, `elements` and `nbytes` are totals over all of them, tied names left out.
    """

    name: str
    children: list[Node] = field(default_factory=list)
    spec: TensorSpec | None = None
    tied_to: str | None = None
    value: object = None
    last_name: str | None = None
    repeats: int = 1
    tensors: int = 0
    elements: int = 0
    nbytes: int = 0

    @property
    def is_group(self) -> bool:
        return bool(self.children)


def outline(checkpoint: Checkpoint, parts: list[str]) -> list[Node]:
    """Return one node for each of the parts."""
    tree = checkpoint.reader.tree
    seen: set[str] = set()
    nodes = []
    for part in parts:
        node = _node(part, tree[part], checkpoint.reader, seen)
        _total(node)
        nodes.append(_folded(node))
    return nodes


def _node(name: str, value: object, reader: Reader, seen: set[str]) -> Node:
    if isinstance(value, TensorLeaf):
        tied_to = value.name if value.name in seen else None
        seen.add(value.name)
        return Node(name, spec=reader.spec(value.name), tied_to=tied_to)
    if isinstance(value, Typed) and tensor_leaves(value.value):
        return _node(name, value.value, reader, seen)
    if isinstance(value, dict) and value:
        return Node(name, children=_members(value, reader, seen))
    if isinstance(value, (list, tuple, collections.deque)) and any(_has_inside(v) for v in value):
        return Node(name, children=[_node(str(i), v, reader, seen) for i, v in enumerate(value)])
    return Node(name, value=value)


def _has_inside(value: object) -> bool:
    return bool(tensor_leaves(value)) or (isinstance(value, dict) and len(value) > 0)


def _members(value: Mapping[object, object], reader: Reader, seen: set[str]) -> list[Node]:
    """Return the members of a dictionary; names of tensors are nested by their components."""
    root = Node("")
    groups: dict[str, Node] = {"": root}
    for key, inner in value.items():
        whole = str(key)
        parts = _COMPONENT.findall(whole) if tensor_leaves(inner) else [whole]
        parent = root
        for i in range(1, len(parts)):
            prefix = "".join(parts[:i])
            if prefix not in groups:
                groups[prefix] = Node(parts[i - 1])
                parent.children.append(groups[prefix])
            parent = groups[prefix]
        parent.children.append(_node(parts[-1] if parts else whole, inner, reader, seen))
    return [_joined(child) for child in root.children]


def _joined(node: Node) -> Node:
    """Return the node without groups that only hold one other group."""
    node.children = [_joined(child) for child in node.children]
    while len(node.children) == 1 and node.name.endswith((".", "/")):
        only = node.children[0]
        only.name = node.name + only.name
        node = only
    return node


def _total(node: Node) -> None:
    for child in node.children:
        _total(child)
        node.tensors += child.tensors
        node.elements += child.elements
        node.nbytes += child.nbytes
    if node.spec is not None and node.tied_to is None:
        node.tensors, node.elements, node.nbytes = 1, math.prod(node.spec.shape), node.spec.nbytes


def _folded(node: Node) -> Node:
    """Return the node with each stretch of numbered groups that look alike made one."""
    node.name = node.name.rstrip("./") or node.name
    node.children = [_folded(child) for child in node.children]
    kept: list[Node] = []
    shape_before: object = None
    for child in node.children:
        shape = tuple(_shape(child)) if child.is_group and child.tensors and child.name.isdigit() else None
        if shape is not None and shape == shape_before:
            _merge(kept[-1], child)
        else:
            kept.append(child)
        shape_before = shape
    node.children = kept
    return node


def _merge(into: Node, other: Node) -> None:
    into.last_name = other.name
    into.repeats += 1
    into.tensors += other.tensors
    into.elements += other.elements
    into.nbytes += other.nbytes


def _shape(node: Node) -> Iterator[object]:
    """Yield what must be equal for two groups to look alike: all but their own names and the values."""
    for child in node.children:
        yield (
            child.name,
            child.last_name,
            child.spec and (child.spec.dtype, child.spec.shape),
            child.tied_to is None,
        )
        yield from _shape(child)
        yield "end"
