"""What an adapter is: the code that knows one family of live objects, and how it is found by type."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from holdfast.core.memory import Pinning
from holdfast.state.tensors import HostTensor, TensorSource, TensorSpec

if TYPE_CHECKING:
    from holdfast.state.capturing import Capturing
    from holdfast.state.materialize import Materializer
    from holdfast.state.restoring import Build, Restoring

__all__ = [
    "NO_KINDS",
    "Adapter",
    "DeviceCopy",
    "Dispatch",
    "Engine",
    "Joined",
    "Kinds",
    "Outline",
    "Outlining",
    "TensorHolder",
]

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


@dataclass(slots=True)
class Outline:
    """What a live object holds at present, read as quickly as can be.

    `children` are the values that a capture of the object stores, in the order in which it comes to them.
    `keys` are compared one by one, as the same object or equal text; `facts` (numbers, ids, names, classes)
    with ==. Where both are as they were, a capture differs from the former one in the children at most.
    """

    children: list[object]
    keys: list[object] = field(default_factory=list)
    facts: list[object] = field(default_factory=list)


@runtime_checkable
class Outlining(Protocol):
    """An adapter whose objects can be read again without capturing them."""

    def outline(self, value: object) -> Outline | None:
        """Return the outline of `value`, or None: this one must be captured anew each time. Change nothing."""
        ...


@runtime_checkable
class TensorHolder(Protocol):
    """An adapter of tensors: each is one stored tensor at its own path."""

    engine: Engine


class DeviceCopy(Protocol):
    """A copy that a device makes by itself, and that may still be going on. It has its place among what the device is
    told: the elements are those of the moment at which it began."""

    def fence(self) -> None:
        """Have the device do it before anything that it is told from now on."""
        ...

    def wait(self) -> None:
        """Return when it is complete."""
        ...


class Joined(Protocol):
    """Neighbours of one element type that are moved in one go."""

    def copy(self, sources: Sequence[TensorSource]) -> DeviceCopy | None:
        """Copy the elements of these tensors, one after the other, into the memory this was made for; see
        `Engine.copy_out`."""
        ...


class Engine(Protocol):
    """Move tensor bytes for one framework."""

    def owns(self, value: object) -> bool:
        """Return whether `value` is a tensor of this framework."""
        ...

    def fingerprint(self, values: Sequence[object]) -> Iterator[Sequence[object]]:
        """Yield columns that are equal as long as these are tensors of the same memory, shape, layout and kind.

        The first column holds the classes: the others are only asked for where those are as they were.
        """
        ...

    def aliases(self, values: Sequence[object]) -> Sequence[object]:
        """Return for each live tensor one of the same memory that is not affected by what is done to the object."""
        ...

    def keeps(self, alias: object, spec: TensorSpec) -> bool:
        """Return whether an alias may be kept from one capture to the next: it holds no memory worth speaking of."""
        ...

    def joins(self, alias: object, spec: TensorSpec, *, lasting: bool) -> Hashable:
        """Return what a tensor has in common with those it may be moved with in one go; None: it is moved alone.

        `lasting`: every later copy is of this very alias.
        """
        ...

    def join(self, aliases: Sequence[object], memory: memoryview) -> Joined:
        """Prepare to move tensors that `joins` says belong together into `memory`, one after the other."""
        ...

    def targets(self, specs: Sequence[TensorSpec], destinations: Sequence[memoryview]) -> list[object]:
        """Return what `copy_out` writes to: the destinations as this framework sees them."""
        ...

    def addresses(self, values: Sequence[object]) -> list[int] | None:
        """Return where the elements of each lie in host memory, in C order; None if one does not lie so.

        Only asked of what changes when an optimizer steps, and of what `targets` returned.
        """
        ...

    def pinning(self, values: Sequence[object]) -> Pinning | None:
        """Return what makes host memory such as devices copy to by themselves, if any of the tensors is on such a
        device."""
        ...

    def versions(self, values: Sequence[object]) -> list[int]:
        """Return for each a number that grows with every change in place."""
        ...

    def copy_out(self, values: Sequence[object], targets: Sequence[object]) -> DeviceCopy | None:
        """Copy the elements of each tensor to its target, in C order. Returns when they are there, or what tells when
        those that devices copy by themselves are; nothing that these are told afterwards changes them."""
        ...

    def copy_beside(self, values: Sequence[object], targets: Sequence[object]) -> DeviceCopy | None:
        """Have devices copy beside what they are told from now on, and not before `DeviceCopy.fence` in its way; None,
        and nothing is done, if they cannot.

        Only asked of what changes when an optimizer steps.
        """
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
        self.holders: Set[Adapter] = {a for a in self.adapters if isinstance(a, TensorHolder)}
        self._outlining: dict[Adapter, Outlining] = {a: a for a in self.adapters if isinstance(a, Outlining)}
        self._found: dict[type, Adapter | None] = {}

    def find(self, cls: type) -> Adapter | None:
        """Return the adapter for objects of exactly `cls`, or None."""
        try:
            return self._found[cls]
        except KeyError:
            adapter = next((a for a in self.adapters if a.claims(cls)), None)
            self._found[cls] = adapter
            return adapter

    def outlining(self, adapter: Adapter | None) -> Outlining | None:
        """Return the adapter as one that can outline its objects, or None."""
        return None if adapter is None else self._outlining.get(adapter)

    def engine_of(self, value: object) -> Engine:
        """Return the engine that moves the bytes of `value`."""
        for engine in self.engines.values():
            if engine.owns(value):
                return engine
        raise TypeError(f"{type(value).__name__} is a tensor of no known framework")
