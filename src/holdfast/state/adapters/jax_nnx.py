"""Flax NNX: modules, optimizers, random streams and metrics, as nested dictionaries of what their Variables hold.

The objects stay who they are: new values go into their Variables, as nnx.update does it. What is not a Variable or an
array, such as a size or a function, is the program's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from holdfast.core.names import join_path
from holdfast.state.adapter import NO_KINDS, Kinds, Outline
from holdfast.state.capturing import Capturing
from holdfast.state.restoring import Build, Kept, Restoring, Stage

__all__ = ["NnxModules", "NnxObjects", "NnxOptimizers", "States", "Variables"]

Path = tuple[object, ...]


class NnxObjects:
    """Streams of random keys, metrics, and whatever else of NNX holds Variables. Shared Variables are stored once."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, nnx.Pytree)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        into.note(path, "captured", type(value).__name__, "its Variables, by name")
        node: dict[object, object] = {}
        for at, leaf in _flat(value):
            inner = node
            for step in at[:-1]:
                inner = cast("dict[object, object]", inner.setdefault(step, {}))
            inner[at[-1]] = into.value(_held(leaf), _joined(path, at))
        return node

    def outline(self, value: object) -> Outline | None:
        flat = _flat(value)
        return Outline([_held(leaf) for _, leaf in flat], facts=[at for at, _ in flat])

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        flat = _flat(live)
        builds: list[Build] = []
        taken: set[Path] = set()
        for at, leaf in flat:
            below = _joined(path, at)
            found = _at(node, at)
            if found is _NOTHING:
                ctx.missing(below, f"a {type(leaf).__name__}")
                builds.append(Kept(_held(leaf)))
            else:
                taken.add(tuple(map(str, at)))
                builds.append(ctx.plan(_held(leaf), found, below))
        for at in _places(node, taken, ()):
            ctx.unexpected(_joined(path, at), f"a value that this {type(live).__name__} has no Variable for")

        def commit(values: object) -> None:
            news = zip(flat, cast("list[object]", values), strict=True)
            pairs: Any = [(at, _with(leaf, value)) for (at, leaf), value in news]
            nnx.update(live, nnx.from_flat_state(pairs))

        ctx.act(Stage.VALUES, lambda m: [b(m) for b in builds], commit)
        return Kept(live)


class NnxModules(NnxObjects):
    """Modules."""

    def claims(self, cls: type) -> bool:
        return issubclass(cls, nnx.Module) and not issubclass(cls, nnx.Optimizer)


class NnxOptimizers(NnxObjects):
    """Optimizers; the state of optax is a nested dictionary too, by field and by position."""

    def claims(self, cls: type) -> bool:
        return issubclass(cls, nnx.Optimizer)


class Variables:
    """A Variable by itself: what it holds, put back into it."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, nnx.Variable)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        return into.value(_held(value), path)

    def outline(self, value: object) -> Outline | None:
        return Outline([_held(value)])

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        variable = cast("nnx.Variable[Any]", live)
        build = ctx.plan(_held(live), node, path)
        ctx.act(Stage.VALUES, build, variable.set_raw_value)
        return Kept(live)


class States:
    """`nnx.State`, as nnx.state and nnx.split give it: a dictionary of Variables, restored in place."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, nnx.State)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        return {k: into.value(v, join_path(path, k)) for k, v in _items(value).items()}

    def outline(self, value: object) -> Outline | None:
        items = _items(value)
        return Outline(list(items.values()), list(items))

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        items = _items(live)
        builds: dict[object, Build] = {}
        for key, child in items.items():
            below = join_path(path, key)
            found = _at(node, (key,))
            if found is _NOTHING:
                ctx.missing(below, f"a {type(child).__name__}")
            else:
                builds[key] = ctx.plan(child, found, below)
        known = {str(key) for key in items}
        for key in node if isinstance(node, dict) else ():
            if str(key) not in known:
                ctx.unexpected(join_path(path, key), "a value that the live State has no place for")

        def commit(values: object) -> None:
            for key, value in cast("dict[object, object]", values).items():
                if items[key] is not value:
                    cast("Any", live)[key] = value

        ctx.act(Stage.VALUES, lambda m: {k: b(m) for k, b in builds.items()}, commit)
        return Kept(live)


class _Nothing:
    pass


_NOTHING = _Nothing()


def _flat(value: object) -> list[tuple[Path, object]]:
    """Return the Variables and arrays of an object with their places, each Variable once, in a fixed order."""
    return list(cast("Any", nnx.to_flat_state(nnx.state(value))))


def _held(leaf: object) -> object:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _with(leaf: object, value: object) -> object:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _items(value: object) -> Mapping[object, object]:
    return cast("Mapping[object, object]", cast("Any", value).raw_mapping)


def _joined(path: str, at: Path) -> str:
    for step in at:
        path = join_path(path, step)
    return path


def _at(node: object, at: Path) -> object:
    """Return what is stored at a place; a number may have become text on its way through another program."""
    for step in at:
        if not isinstance(node, dict):
            return _NOTHING
        node = node.get(step, node.get(str(step), _NOTHING))
    return node


def _places(node: object, taken: set[Path], at: Path) -> list[Path]:
    """Return the places of stored values that no Variable has taken."""
    if tuple(map(str, at)) in taken:
        return []
    if isinstance(node, dict):
        return [place for key, value in node.items() for place in _places(value, taken, (*at, key))]
    return [at] if at else []
