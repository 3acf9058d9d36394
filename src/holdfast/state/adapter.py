"""What an adapter is: the code that knows one family of live objects, and how it is found by type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from holdfast.state.tensors import HostTensor, TensorSource

if TYPE_CHECKING:
    from holdfast.state.capturing import Capturing
    from holdfast.state.materialize import Materializer
    from holdfast.state.restoring import Build, Restoring

__all__ = ["NO_KINDS", "Adapter", "Dispatch", "Engine", "Kinds"]

Kinds = Mapping[str, "Callable[[Materializer, object], object]"]
NO_KINDS: Kinds = MappingProxyType({})


class Adapter(Protocol):
    """Capture and re-place the live objects of some classes.

    `kinds` rebuilds the `Typed` values that the adapter writes. A `divisible` object can be restored in
    part, by path; the others are restored whole or not at all.
    """

    divisible: bool
    kinds: Kinds

    def claims(self, cls: type) -> bool:
        """Return whether objects of exactly this class are this adapter's."""
        ...

    def capture(self, value: object, path: str, into: Capturing) -> object:
        """Return the detached storable form of `value`; change nothing."""
        ...

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        """Check `node` against `live`, register what is to be done, and return what yields the result."""
        ...


class Engine(Protocol):
    """Move tensor bytes for one framework."""

    def owns(self, value: object) -> bool:
        """Return whether `value` is a tensor of this framework."""
        ...

    def copy_out(self, sources: Sequence[TensorSource], destinations: Sequence[memoryview]) -> None:
        """Copy each source's elements to its destination, in C order."""
        ...

    def copy_in(self, pairs: Sequence[tuple[object, HostTensor]]) -> None:
        """Copy stored elements into live tensors of the same shape, converting element types that differ."""
        ...

    def make(self, host: HostTensor, kind: str) -> object:
        """Return a new tensor with the stored elements, element type and layout."""
        ...

    def like(self, reference: Callable[[], object], value: object) -> object:
        """Return `value` with its tensors on the devices of those at the same places of `reference()`.

        `reference` is called only if this framework uses a device other than the CPU.
        """
        ...


class Dispatch:
    """Find the adapter of a class, the engine of a tensor, the builder of a typed value."""

    def __init__(self, adapters: Sequence[Adapter], engines: Mapping[str, Engine]) -> None:
        self.adapters = tuple(adapters)
        self.engines = dict(engines)
        self.kinds: dict[str, Callable[[Materializer, object], object]] = {}
        for adapter in self.adapters:
            self.kinds.update(adapter.kinds)
        self._found: dict[type, Adapter | None] = {}

    def find(self, cls: type) -> Adapter | None:
        """Return the adapter for objects of exactly `cls`, or None."""
        try:
            return self._found[cls]
        except KeyError:
            adapter = next((a for a in self.adapters if a.claims(cls)), None)
            self._found[cls] = adapter
            return adapter

    def engine_of(self, value: object) -> Engine:
        """Return the engine that moves the bytes of `value`."""
        for engine in self.engines.values():
            if engine.owns(value):
                return engine
        raise TypeError(f"{type(value).__name__} is a tensor of no known framework")
