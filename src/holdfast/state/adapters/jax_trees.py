"""Nodes of jax's trees other than the built-in containers: flax.struct and other registered classes, FrozenDict.

Of such an object the children are state, by the names jax gives them; what is static in it belongs to the program,
and is neither stored nor changed. It is rebuilt as jax itself rebuilds it, never by code from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from jax import tree_util

from holdfast.core.errors import UnsupportedValue
from holdfast.core.names import join_path
from holdfast.format.values import Typed
from holdfast.state.adapter import NO_KINDS, Kinds, Outline
from holdfast.state.adapters.records import class_name
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Kept, Restoring

__all__ = ["Nodes"]

_BUILT_IN = (dict, list, tuple, type(None))


class Nodes:
    """Objects that are registered with jax as nodes of a tree: taken apart and put together by what was registered."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return not issubclass(cls, _BUILT_IN) and tree_util.default_registry.is_node(cls)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        children, _ = _opened(value)
        into.note(path, "captured", type(value).__name__, "its static fields are the program's")
        fields = {name: into.value(child, join_path(path, name)) for name, child in children.items()}
        if isinstance(value, Mapping):
            return fields
        return Typed("dataclass", {"type": class_name(type(value)), "fields": fields})

    def outline(self, value: object) -> Outline | None:
        children, _ = _opened(value)
        return Outline(list(children.values()), list(children), [type(value)])

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        children, closed = _opened(live)
        stored = _named(node)
        if stored is None:
            ctx.mismatch(path, f"a {class_name(type(live))}", "a value without names")
            return Kept(live)
        stored_type, fields = stored
        if stored_type not in ("", class_name(type(live))):
            ctx.report.notes.append(f"{path}: is a {class_name(type(live))}, was stored as {stored_type}")
        builds: list[Build] = []
        for name, child in children.items():
            below = join_path(path, name)
            if name in fields:
                builds.append(ctx.plan(child, fields[name], below))
            else:
                ctx.missing(below, f"a part of {class_name(type(live))}")
                builds.append(Kept(child))
        for name in fields.keys() - children.keys():
            ctx.unexpected(join_path(path, name), f"a part that {class_name(type(live))} does not have")
        old = list(children.values())

        def build(m: Materializer) -> object:
            items = [b(m) for b in builds]
            return live if all(a is b for a, b in zip(items, old, strict=True)) else closed(items)

        return build


def _opened(value: object) -> tuple[dict[str, object], Callable[[list[object]], object]]:
    """Return the children of a node by name, and what makes such a node of others in their order."""
    pairs, definition = tree_util.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)
    children: dict[str, object] = {}
    for (key,), child in pairs:
        name = _name(key)
        if name in children:
            raise UnsupportedValue(
                f"a {class_name(type(value))} has two children called {name!r}; rename one"
            )
        children[name] = child
    return children, lambda items: tree_util.tree_unflatten(definition, items)


def _name(key: object) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _named(node: object) -> tuple[str, Mapping[str, object]] | None:
    """Return the stored type ("": none) and the stored parts by name, of whatever has parts with names."""
    if isinstance(node, Typed) and node.kind in ("dataclass", "namedtuple") and isinstance(node.value, dict):
        fields = node.value.get("fields")
        return (str(node.value.get("type")), fields) if isinstance(fields, dict) else None
    if isinstance(node, dict):
        return "", {str(k): v for k, v in cast("dict[object, object]", node).items()}
    return None
