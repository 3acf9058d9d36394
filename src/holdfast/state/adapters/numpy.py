"""numpy arrays and scalars; the element types that numpy lacks come from ml_dtypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import UnsupportedValue
from holdfast.format.values import TensorLeaf, Typed
from holdfast.state.adapter import NO_KINDS, Kinds
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Kept, Restoring
from holdfast.state.tensors import (
    JOIN_BYTES,
    HostTensor,
    TensorSource,
    TensorSpec,
    c_strides,
    layout_to_recreate,
)

__all__ = ["Arrays", "DTypes", "NumpyEngine", "Scalars", "to_array"]

Array = NDArray[Any]
_DTYPE_STR = re.compile(r"[<>=|][A-Za-z?]\d{0,9}(\[\d{0,9}[A-Za-z]{1,7}\])?")
_FOREIGN = (
    "bfloat16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "float8_e5m2fnuz",
    "float8_e4m3fnuz",
    "complex32",
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type for a canonical name; packed float4 is seen as uint8."""
    if name == "float4_e2m1fn_x2":
        return np.dtype(np.uint8)
    if name in _FOREIGN:
        foreign = getattr(ml_dtypes, name, None)  # complex32 needs ml_dtypes 0.6
        return np.dtype(foreign if foreign is not None else np.uint32)
    return np.dtype(name)


def canonical(dtype: np.dtype[Any]) -> str | None:
    """Return the canonical name of a numpy type, or None if holdfast does not store it."""
    name = dtype.name
    known = name in DTYPES and dtype.itemsize == DTYPES[name].itemsize
    return name if known and dtype.fields is None and dtype.subdtype is None else None


def array_spec(array: Array, path: str) -> TensorSpec:
    """Return the spec of an array.

    Raises:
        UnsupportedValue: an element type outside `DTYPES` (objects, strings, dates, structures, long double).
    """
    name = canonical(array.dtype)
    if name is None:
        raise UnsupportedValue(
            f"{path}: a numpy array of {array.dtype} cannot be stored; convert it to a numeric type, "
            "view its bytes as uint8, or use a list of plain values"
        )
    stride = None
    size = array.itemsize
    if not any(s < 0 or s % size for s in array.strides):
        elements = tuple(s // size for s in array.strides)
        stride = elements if elements != c_strides(array.shape) and not array.flags.c_contiguous else None
    return TensorSpec(path, name, array.shape, stride)


def memory_of(array: Array) -> Hashable:
    """Return what two arrays share when they are the same memory seen the same way; None for empty ones."""
    if array.size == 0:
        return None
    return ("numpy", array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)


class NumpyEngine:
    """Move bytes of numpy arrays."""

    def owns(self, value: object) -> bool:
        return isinstance(value, (np.ndarray, np.generic))

    def fingerprint(self, values: Sequence[object]) -> Iterator[Sequence[object]]:
        yield list(map(type, values))
        yield list(map(attrgetter("shape"), values))
        yield list(map(attrgetter("strides"), values))
        yield list(map(attrgetter("dtype"), values))
        yield [interface["data"][0] for interface in map(attrgetter("__array_interface__"), values)]

    def aliases(self, values: Sequence[object]) -> Sequence[object]:
        return [np.asarray(value).view() for value in values]

    def keeps(self, alias: object, spec: TensorSpec) -> bool:
        return False  # an array that something refers to refuses to be resized

    def joins(self, alias: object, spec: TensorSpec, *, lasting: bool) -> Hashable:
        return spec.dtype if 0 < spec.nbytes <= JOIN_BYTES else None

    def join(self, aliases: Sequence[object], memory: memoryview) -> _Joined:
        return _Joined(
            np.frombuffer(memory, np.uint8).view(cast("Array", aliases[0]).dtype.newbyteorder("="))
        )

    def targets(self, specs: Sequence[TensorSpec], destinations: Sequence[memoryview]) -> list[object]:
        return [
            np.frombuffer(memory, np.uint8, spec.nbytes).view(numpy_dtype(spec.dtype)).reshape(spec.shape)
            for spec, memory in zip(specs, destinations, strict=True)
        ]

    def addresses(self, values: Sequence[object]) -> list[int] | None:
        return None  # no optimizer tells when it is about to change them

    def pinning(self, values: Sequence[object]) -> None:
        return None

    def copy_beside(self, values: Sequence[object], targets: Sequence[object]) -> None:
        return None

    def versions(self, values: Sequence[object]) -> list[int]:
        return [0] * len(values)

    def copy_out(self, values: Sequence[object], targets: Sequence[object]) -> None:
        for value, target in zip(values, targets, strict=True):
            np.copyto(cast("Array", target), np.asarray(value))

    def copy_in(self, pairs: Sequence[tuple[object, HostTensor]]) -> None:
        for live, host in pairs:
            target = cast("Array", live)
            np.copyto(target, to_array(host).astype(target.dtype, copy=False), casting="unsafe")

    def make(self, host: HostTensor, kind: str) -> object:
        stored = to_array(host)
        if kind == "numpy.scalar":
            return stored.reshape(-1)[0] if stored.size == 1 else stored.copy()
        layout = layout_to_recreate(host.spec)
        if layout is None:
            return stored if host.owned and not host.memory.readonly else stored.copy()
        strides, extent = layout
        size = stored.itemsize
        base = np.zeros(extent, stored.dtype)
        new = np.ndarray(stored.shape, stored.dtype, base, strides=tuple(s * size for s in strides))
        np.copyto(new, stored)
        return new

    def like(self, reference: Callable[[], object], value: object) -> object:
        return value


class _Joined:
    """Small arrays of one element type, moved in one go."""

    def __init__(self, slab: Array) -> None:
        self._slab = slab

    def copy(self, sources: Sequence[TensorSource]) -> None:
        arrays = cast("list[Array]", [source.value for source in sources])
        np.concatenate(list(map(np.ndarray.ravel, arrays)), out=self._slab)


def to_array(host: HostTensor) -> Array:
    """Return the stored bytes as an array that shares them."""
    flat = np.frombuffer(host.data, np.uint8, host.spec.nbytes).view(numpy_dtype(host.spec.dtype))
    return flat.reshape(host.spec.shape)


class Arrays:
    """numpy arrays: restored in place where shape and element type are those of the live array."""

    divisible = False
    kinds: Kinds = NO_KINDS
    engine = NumpyEngine()

    def claims(self, cls: type) -> bool:
        return cls is np.ndarray or cls is np.memmap

    def capture(self, value: object, path: str, into: Capturing) -> object:
        array = cast("Array", value)
        spec = array_spec(array, path)
        alias = np.asarray(array).view()
        return into.tensor(
            alias, spec, kind="numpy.ndarray", memory=memory_of(array), live=(self.engine, array)
        )

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        array = cast("Array", live)
        if not isinstance(node, TensorLeaf):
            return ctx.fresh(node, path)
        stored = ctx.need(node, path)
        if stored is None:
            return lambda m: live
        dtype = canonical(array.dtype) or str(array.dtype)
        found = TensorSpec(path, dtype, array.shape) if dtype in DTYPES else None
        name = ctx.stored_name(node)
        if found is None or stored.shape != array.shape or not array.flags.writeable:
            return ctx.unfit(
                live, node, path, live_is=found.describe() if found else dtype, empty=array.size == 0
            )
        if stored.dtype != dtype:
            if not ctx.relaxed("cast", path):
                return ctx.unfit(
                    live, node, path, live_is=found.describe(), empty=array.size == 0, castable=True
                )
            ctx.report.cast.append((path, f"{stored.dtype} to {dtype}"))
        claim = ctx.claim(memory_of(array), name, path)
        if claim == "taken":
            return ctx.fresh(node, path)
        if claim == "new":
            ctx.copy(self.engine, array, name)
        ctx.report.restored.append((path, ""))
        return Kept(live)


class Scalars:
    """numpy scalars: immutable, so replaced."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {"numpy.scalar": _new_scalar}

    def claims(self, cls: type) -> bool:
        return issubclass(cls, np.generic)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        array = np.asarray(value)
        spec = array_spec(array, path)
        if into.in_key:
            return Typed("numpy.scalar", [spec.dtype, array.tobytes()])
        return into.tensor(array.copy(), spec, kind="numpy.scalar", memory=None)

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        return ctx.fresh(node, path)


def _new_scalar(m: Materializer, value: object) -> object:
    name, raw = cast("tuple[str, bytes]", value)
    if name not in DTYPES or len(raw) != DTYPES[name].itemsize:
        return raw
    return np.frombuffer(raw, np.uint8).view(numpy_dtype(name))[0]


class DTypes:
    """numpy element types as values."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {"numpy.dtype": _new_dtype}

    def claims(self, cls: type) -> bool:
        return issubclass(cls, np.dtype)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        dtype = cast("np.dtype[Any]", value)
        if dtype.fields is not None or dtype.subdtype is not None:
            raise UnsupportedValue(
                f"{path}: a structured numpy dtype cannot be stored; store its description as text"
            )
        into.note(path, "captured", "numpy.dtype", dtype.name)
        return Typed("numpy.dtype", dtype.name if dtype.name in _FOREIGN else dtype.str)

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        return ctx.fresh(node, path)


def _new_dtype(m: Materializer, value: object) -> object:
    name = str(value)
    if name in _FOREIGN:
        return numpy_dtype(name)
    if not _DTYPE_STR.fullmatch(name):  # numpy parses more than that, some of it as Python
        raise ValueError(f"{name[:40]!r} is not the name of an element type")
    return np.dtype(name)
