"""From bytes in host memory to jax arrays: on the devices, and in the layout, of those that they take the place of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from holdfast.state.adapters.numpy import to_array
from holdfast.state.tensors import HostTensor

__all__ = ["WEAK", "Bounds", "Home", "Index", "bounds", "new_array", "spread"]

WEAK = "jax.Array:weak"  # the kind of what has jax's weak type, as Python numbers in a computation do
Array = NDArray[Any]
Index = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]  # first and end in each dimension


@dataclass(frozen=True, slots=True)
class Home:
    """What a restored array is to be like: all of a live one but its elements, so that the live one can go.

    `sharding` None: uncommitted, on jax's default device.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: Sharding | None
    weak: bool

    @classmethod
    def of(cls, like: jax.Array | jax.ShapeDtypeStruct) -> Home:
        """Return the home of a live array, or of a description of one."""
        weak = bool(getattr(like, "weak_type", False))
        committed = not isinstance(like, jax.Array) or bool(getattr(like, "committed", True))
        return cls(tuple(like.shape), np.dtype(like.dtype), like.sharding if committed else None, weak)


def bounds(index: Index, shape: tuple[int, ...]) -> Bounds:
    """Return where a device's part lies, which jax says in slices."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def new_array(host: HostTensor, home: Home, *, weak: bool = False) -> jax.Array:
    """Return a new array with the stored elements where `home` says, in its element type."""
    stored = to_array(host)
    return spread(lambda index: stored[index], home, weak=weak)


def spread(part: Callable[[Index], Array], home: Home, *, weak: bool = False) -> jax.Array:
    """Return a new array of which `part` gives the elements at an index; it is asked for those that this process's
    devices hold, and once for a part that several of them hold.

    The elements are copied also where the device is the host: what jax makes around memory of others is not donated.
    """
    dtype = home.dtype
    with _all_widths(dtype):
        if home.sharding is None:
            whole = part(tuple(slice(None) for _ in home.shape)).astype(dtype, copy=False)
            made = cast("jax.Array", jax.device_put(whole, may_alias=False))
        else:
            made = _on_devices(part, home, home.sharding)
        return _weakly_typed(made) if weak else made


def _on_devices(part: Callable[[Index], Array], home: Home, sharding: Sharding) -> jax.Array:
    wanted = sharding.addressable_devices_indices_map(home.shape)
    parts: dict[Bounds, Array] = {}
    for index in wanted.values():
        where = bounds(cast("Index", index), home.shape)
        if where not in parts:
            parts[where] = part(cast("Index", index)).astype(home.dtype, copy=False)
    kind = sharding.memory_kind
    values = [parts[bounds(cast("Index", index), home.shape)] for index in wanted.values()]
    places = [SingleDeviceSharding(device, memory_kind=kind) for device in wanted]
    pieces = cast("Sequence[jax.Array]", jax.device_put(values, places, may_alias=False))
    return jax.make_array_from_single_device_arrays(home.shape, sharding, pieces, dtype=home.dtype)


@contextlib.contextmanager
def _all_widths(dtype: np.dtype[Any]) -> Iterator[None]:
    """Have jax take 64 bits as they are, also where the program has not asked for it: bits are never cut off."""
    if dtype.name in ("int64", "uint64", "float64", "complex128"):
        with jax.enable_x64(True):
            yield
    else:
        yield


def _weakly_typed(x: jax.Array) -> jax.Array:
    # The one way jax has to say so; lax.convert_element_type gives what is not weakly typed.
    made = lax.convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=True, sharding=None)
    return cast("jax.Array", made)
