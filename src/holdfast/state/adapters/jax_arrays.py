"""jax arrays: what they are to holdfast, and how their bytes move. They never change: a restored one is a new one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

from holdfast.core.errors import UnsupportedValue
from holdfast.format.values import TensorLeaf
from holdfast.state.adapter import NO_KINDS, Joined, Kinds
from holdfast.state.adapters.jax_distributed import held_boxes, local_parts, wanted_boxes
from holdfast.state.adapters.jax_placing import WEAK, Bounds, Home, Index, bounds, new_array, spread
from holdfast.state.adapters.numpy import NumpyEngine, canonical, numpy_dtype, to_array
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Kept, Restoring
from holdfast.state.tensors import HostTensor, TensorSpec

__all__ = ["ENGINE", "Abstract", "Arrays", "JaxEngine", "Tracers", "is_key_class"]

PLAIN_KIND = "jax.Array"
_GONE = (
    "this array was given away (donated to a jitted function, or deleted): the state still holds an old one; put the "
    "new one into the dictionary that the Checkpointer was given, before the step ends"
)


def is_key_class(cls: type) -> bool:
    """Return whether objects of a class are arrays of typed random keys."""
    return issubclass(cls, jax.Array) and cls.__name__ == "PRNGKeyArray"


def array_spec(x: jax.Array, path: str) -> TensorSpec:
    """Return the spec of a live array.

    Raises:
        UnsupportedValue: its elements are not there, or of a type that is not stored; names the remedy.
    """
    if x.is_deleted():
        raise UnsupportedValue(f"{path}: {_GONE}")
    name = canonical(np.dtype(x.dtype))
    if name is None:
        raise UnsupportedValue(
            f"{path}: a jax array of {x.dtype} cannot be stored; convert it first, such as to int8 or float8_e4m3fn"
        )
    return TensorSpec(path, name, tuple(x.shape))


class JaxEngine:
    """Move bytes of jax arrays, from each device that holds a part that no other one before it holds."""

    _host = NumpyEngine()

    def owns(self, value: object) -> bool:
        return isinstance(value, jax.Array)

    def fingerprint(self, values: Sequence[object]) -> Iterator[Sequence[object]]:
        # Where the elements lie is of no matter: arrays are not tied, and every step makes new ones.
        yield list(map(type, values))
        yield list(map(attrgetter("shape"), values))
        yield list(map(attrgetter("dtype"), values))
        yield list(map(attrgetter("weak_type"), values))
        yield [None if x.is_fully_addressable else x.sharding for x in cast("Sequence[jax.Array]", values)]

    def aliases(self, values: Sequence[object]) -> Sequence[object]:
        arrays = cast("Sequence[jax.Array]", values)
        if any(x.is_deleted() for x in arrays):
            raise UnsupportedValue(_GONE)
        return arrays

    def keeps(self, alias: object, spec: TensorSpec) -> bool:
        return False  # each step's arrays are others

    def joins(self, alias: object, spec: TensorSpec, *, lasting: bool) -> Hashable:
        return None

    def join(self, aliases: Sequence[object], memory: memoryview) -> Joined:
        raise TypeError("jax arrays are moved one by one")

    def targets(self, specs: Sequence[TensorSpec], destinations: Sequence[memoryview]) -> list[object]:
        return self._host.targets(specs, destinations)

    def addresses(self, values: Sequence[object]) -> list[int] | None:
        # What is copied later must be held until then, and what is held is not donated: the step would have to take
        # new memory for all of the state. docs/design/0024-jax.md has the figures.
        return None

    def pinning(self, values: Sequence[object]) -> None:
        return None

    def copy_beside(self, values: Sequence[object], targets: Sequence[object]) -> None:
        return None

    def versions(self, values: Sequence[object]) -> list[int]:
        return [0] * len(values)

    def copy_out(self, values: Sequence[object], targets: Sequence[object]) -> None:
        parts = [local_parts(cast("jax.Array", value)) for value in values]
        for of_one in parts:
            for part in of_one:
                part.data.copy_to_host_async()  # from all devices at once; nothing where the device is the host
        for of_one, target in zip(parts, targets, strict=True):
            corner = [
                min(sides) for sides in zip(*([first for first, _ in p.box] for p in of_one), strict=True)
            ]
            for part in of_one:
                place = tuple(slice(a - c, b - c) for (a, b), c in zip(part.box, corner, strict=True))
                # durability: no view outlives this loop, so a step that is given the array may write into its memory.
                np.copyto(cast("Any", target)[(*place, ...)], np.asarray(part.data))

    def copy_in(self, pairs: Sequence[tuple[object, HostTensor]]) -> None:
        raise TypeError("jax arrays cannot be changed; new ones take their place")

    def make(self, host: HostTensor, kind: str) -> object:
        home = Home(host.spec.shape, numpy_dtype(host.spec.dtype), None, weak=False)
        return new_array(host, home, weak=kind == WEAK)

    def like(self, reference: Callable[[], object], value: object) -> object:
        return value


class Arrays:
    """Arrays of numbers, on any devices of this process."""

    divisible = False
    kinds: Kinds = NO_KINDS

    def __init__(self) -> None:
        self.engine = ENGINE

    def claims(self, cls: type) -> bool:
        return issubclass(cls, jax.Array) and not is_key_class(cls) and not issubclass(cls, Tracer)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        x = cast("jax.Array", value)
        kind = WEAK if getattr(x, "weak_type", False) else PLAIN_KIND
        spec = array_spec(x, path)
        if x.is_fully_addressable:
            return into.tensor(x, spec, kind=kind, memory=None, live=(self.engine, x))
        boxes, group = held_boxes(x)
        return into.spread(
            path, spec.dtype, spec.shape, boxes, group=group, kind=kind, memory=None, live=(self.engine, x)
        )

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        return plan_array(Home.of(cast("jax.Array", live)), live, node, path, ctx=ctx)


def plan_array(home: Home, live: object, node: object, path: str, *, ctx: Restoring) -> Build:
    """Plan a new array with stored elements in the place of `live`, where `home` says."""
    if not isinstance(node, TensorLeaf):
        return ctx.fresh(node, path)
    stored = ctx.spec(node)
    if stored is None:
        ctx.need(node, path)  # which says that it is not there
        return Kept(live)
    dtype = canonical(home.dtype)
    live_is = f"{dtype or home.dtype}[{', '.join(map(str, home.shape))}]"
    if stored.shape != home.shape or dtype is None:
        return ctx.unfit(live, node, path, live_is=live_is, empty=0 in home.shape)
    if stored.dtype != dtype:
        if not ctx.relaxed("cast", path):
            return ctx.unfit(live, node, path, live_is=live_is, empty=0 in home.shape, castable=True)
        ctx.report.cast.append((path, f"{stored.dtype} to {dtype}"))
    ctx.report.restored.append((path, ""))
    weak = node.kind == WEAK if node.kind.startswith("jax.") else home.weak
    if home.sharding is not None and not home.sharding.is_fully_addressable:
        return _plan_parts(home, home.sharding, node, path, weak=weak, ctx=ctx)
    ctx.need(node, path)
    name = ctx.stored_name(node)
    return lambda m: new_array(m.tensors[name], home, weak=weak)


def _plan_parts(
    home: Home, sharding: Sharding, node: TensorLeaf, path: str, *, weak: bool, ctx: Restoring
) -> Build:
    """Plan an array of which other processes hold the rest: no more is read than the devices here hold."""
    keys: dict[Bounds, str] = {}
    for box in wanted_boxes(sharding, home.shape):
        offsets, shape = tuple(a for a, _ in box), tuple(b - a for a, b in box)
        keys[box] = ctx.need_part(node, (offsets, home.shape), shape, path)

    def build(m: Materializer) -> object:
        def part(index: Index) -> Any:
            return to_array(m.tensors[keys[bounds(index, home.shape)]])

        return spread(part, home, weak=weak)

    return build


class Abstract:
    """Descriptions of arrays (`jax.ShapeDtypeStruct`): nothing to save, but a place for what is restored, with the
    sharding that they name, without the memory of a live array."""

    divisible = False
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, jax.ShapeDtypeStruct)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        raise UnsupportedValue(f"{path}: a ShapeDtypeStruct describes an array and holds none; save arrays")

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        return plan_array(Home.of(cast("jax.ShapeDtypeStruct", live)), live, node, path, ctx=ctx)


class Tracers:
    """Values inside of a transformation: they stand for arrays that do not exist yet."""

    divisible = False
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, Tracer)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        raise UnsupportedValue(f"{path}: a traced value has no elements; save outside of jit, grad and vmap")

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        ctx.problems.append(
            f"{path}: a traced value cannot be restored; restore outside of jit, grad and vmap"
        )
        return Kept(live)


ENGINE = JaxEngine()
