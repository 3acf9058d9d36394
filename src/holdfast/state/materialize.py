"""Build new values from a stored tree and tensor bytes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Mapping
from typing import Literal, cast

from holdfast.core.errors import HoldfastError, InvalidFormat, StateError
from holdfast.format.values import TensorLeaf, Typed
from holdfast.state.adapter import Dispatch
from holdfast.state.codecs import codec_named
from holdfast.state.records import Record
from holdfast.state.tensors import HostTensor

__all__ = ["Framework", "Materializer"]

Framework = Literal["numpy", "jax", "as stored"]


class Materializer:
    """Turn stored nodes into values; a tensor that occurs twice becomes one object, so ties survive.

    `framework` "numpy" makes arrays of all tensors, "jax" jax arrays of all but numpy's. `resolve` finds the class of a
    dataclass, named tuple or enum by its full name; None makes `Record` and `EnumMember` of them.
    """

    def __init__(
        self,
        tensors: Mapping[str, HostTensor],
        dispatch: Dispatch,
        *,
        framework: Framework = "as stored",
        resolve: Callable[[str], type | None] | None = None,
    ) -> None:
        self.tensors = tensors
        self.framework = framework
        self.resolve: Callable[[str], type | None] = resolve or (lambda name: None)
        self._dispatch = dispatch
        self._made: dict[tuple[str, str], object] = {}

    def value(self, node: object) -> object:
        """Return a new value for `node`."""
        cls = type(node)
        if cls is TensorLeaf:
            return self.tensor(cast("TensorLeaf", node))
        if cls is Typed:
            return self._typed(cast("Typed", node))
        build = _CONTAINERS.get(cls)
        return node if build is None else build(self, node)

    def mapping(self, node: object) -> dict[Hashable, object]:
        """Return the new values of a node that is a dict."""
        items = cast("Mapping[object, object]", node).items()
        return {self.value(k): self.value(v) for k, v in items}

    def items(self, node: object) -> list[object]:
        """Return the new values of a node that is a list, tuple, deque or set."""
        return [self.value(v) for v in cast("list[object]", node)]

    def tensor(self, leaf: TensorLeaf) -> object:
        """Return the tensor of `leaf`, the same object for the same leaf."""
        made = self._made.get((leaf.name, leaf.kind))
        if made is None:
            host = self.tensors.get(leaf.name)
            if host is None:
                raise StateError(f"{leaf.name}: its bytes were not read; expected a tensor of this name")
            family = leaf.kind.partition(".")[0]
            if self.framework != "as stored" and family != "numpy":
                family = self.framework
            engine = self._dispatch.engines.get(family, self._dispatch.engines["numpy"])
            kind = leaf.kind if leaf.kind.startswith(family) else f"{family}.ndarray"
            made = self._made[(leaf.name, leaf.kind)] = engine.make(host, kind)
        return made

    def _typed(self, node: Typed) -> object:
        if node.kind.startswith("codec:"):
            codec = codec_named(node.kind[6:])
            if codec is not None:
                return codec.decode(self.value(node.value))
            return Record(node.kind, {"value": self.value(node.value)})
        if self.framework != "as stored" and node.kind.startswith(_OTHERS[self.framework]):
            inner = self.value(node.value)
            if node.kind == "torch.Size" and isinstance(inner, list):
                return tuple(inner)
            return Record(node.kind, inner if isinstance(inner, dict) else {"value": inner})
        build = self._dispatch.kinds.get(node.kind)
        if build is None:
            return Record(node.kind, {"value": self.value(node.value)})
        try:
            return build(self, node.value)
        except HoldfastError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as e:
            raise InvalidFormat(f"a stored {node.kind} is malformed: {e}") from e


# Whose typed values are only described when all is to be of one framework.
_OTHERS: Mapping[str, tuple[str, ...]] = {"numpy": ("torch.", "jax."), "jax": ("torch.",)}


def _deque(m: Materializer, node: object) -> object:
    return collections.deque(m.items(node), cast("collections.deque[object]", node).maxlen)


def _slice(m: Materializer, node: object) -> object:
    s = cast("slice", node)
    return slice(m.value(s.start), m.value(s.stop), m.value(s.step))


_CONTAINERS: dict[type, Callable[[Materializer, object], object]] = {
    list: lambda m, n: m.items(n),
    dict: lambda m, n: m.mapping(n),
    tuple: lambda m, n: tuple(m.items(n)),
    set: lambda m, n: set(m.items(n)),
    frozenset: lambda m, n: frozenset(m.items(n)),
    collections.OrderedDict: lambda m, n: collections.OrderedDict(m.mapping(n)),
    collections.Counter: lambda m, n: collections.Counter(cast("dict[Hashable, int]", m.mapping(n))),
    collections.deque: _deque,
    bytearray: lambda m, n: bytearray(cast("bytearray", n)),
    slice: _slice,
}
