"""torch tensors: what they are to holdfast, and how their bytes move."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import attrgetter
from typing import cast

import torch

from holdfast.core.errors import UnsupportedValue
from holdfast.core.memory import Pinning
from holdfast.format.values import TensorLeaf
from holdfast.state.adapters import torch_devices
from holdfast.state.adapters.torch_devices import Marked, Pair
from holdfast.state.adapters.torch_distributed import (
    held_boxes,
    is_spread,
    local_of,
    looked_at,
    why_not_spread,
)
from holdfast.state.adapters.torch_placing import (
    NAMES,
    TORCH_DTYPES,
    copy_all,
    copy_in,
    new_tensor,
    raw,
)
from holdfast.state.capturing import Capturing
from holdfast.state.tensors import (
    JOIN_BYTES,
    HostTensor,
    TensorSource,
    TensorSpec,
    c_strides,
)

__all__ = [
    "TorchEngine",
    "capture_tensor",
    "kind_of",
    "memory_of",
    "tensor_spec",
]

_JOINED_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
PRINTED_TOGETHER = 256
_OURS = (torch.Tensor, torch.nn.Parameter)
_LAZY = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)


def tensor_spec(t: torch.Tensor, path: str) -> TensorSpec:
    """Return the spec of a live tensor.

    Raises:
        UnsupportedValue: a tensor whose elements are not simply in one piece of memory; names the remedy.
    """
    refusal = why_not(t)
    if refusal is not None:
        raise UnsupportedValue(f"{path}: {refusal}")
    shape, stride = tuple(t.shape), t.stride()
    return TensorSpec(path, NAMES[t.dtype], shape, None if stride == c_strides(shape) else stride)


def why_not(t: torch.Tensor) -> str | None:
    """Return why this tensor cannot be stored or written in place, or None if it can."""
    cls = type(t)
    if cls not in _OURS:
        if cls in _LAZY:
            return f"a lazy {cls.__name__} has no shape yet; run one forward pass first"
        if is_spread(t):
            return why_not_spread(t)
        if cls.__name__ == "FlatParameter":
            return "FSDP's flat parameters are spread over ranks and distributed state is not supported yet"
        if hasattr(cls, "__tensor_flatten__") or not torch._C._has_storage(t):
            return f"a {cls.__name__} wraps other tensors; store those, or register a codec for it"
    if t.is_meta:
        return "a tensor on the meta device has no values; materialise it first, e.g. with module.to_empty()"
    if t.is_nested:
        return "a nested tensor cannot be stored; store its parts as a list"
    if t.layout != torch.strided:
        return f"a {t.layout} tensor cannot be stored; store its parts (indices, values) or its to_dense()"
    if t.is_quantized:
        return "a quantized tensor cannot be stored; store its int_repr() and scales"
    if t.dtype not in NAMES:
        return f"elements of type {t.dtype} cannot be stored; convert the tensor"
    return None


def memory_of(t: torch.Tensor) -> Hashable:
    """Return what two tensors share when they are the same memory seen the same way; None for empty ones."""
    if is_spread(t):
        t = local_of(t)
    if t.numel() == 0:
        return None
    kind = t.dtype
    place = None if t.is_cpu else t.device  # a device is an object that is made anew each time
    return (t.data_ptr(), t.size(), t.stride(), kind, place, kind.is_complex and t.is_conj(), t.is_neg())


def kind_of(t: torch.Tensor) -> str:
    """Return the leaf kind, which keeps whether it is a Parameter and whether it requires a gradient."""
    if type(t) is not torch.Tensor and isinstance(t, torch.nn.Parameter):
        return "torch.Parameter" if t.requires_grad else "torch.Parameter:frozen"
    return "torch.Tensor:grad" if t.requires_grad and t.is_leaf else "torch.Tensor"


def capture_tensor(t: torch.Tensor, path: str, into: Capturing, *, volatile: bool = True) -> TensorLeaf:
    """Register a live tensor and return its leaf."""
    if is_spread(t):
        return _capture_shard(t, path, into, volatile=volatile)
    spec = tensor_spec(t, path)
    alias = _alias(t)
    return into.tensor(alias, spec, kind=kind_of(t), memory=memory_of(t), volatile=volatile, live=(ENGINE, t))


def _capture_shard(t: torch.Tensor, path: str, into: Capturing, *, volatile: bool) -> TensorLeaf:
    dtype = tensor_spec(t, path).dtype
    boxes, group = held_boxes(t)
    # An empty part shares its memory with nothing, and is a tie to whoever is tied elsewhere: it is tied by its object.
    memory = memory_of(t) or ("empty", id(t))
    return into.spread(
        path, dtype, tuple(t.shape), boxes,
        group=group, kind=kind_of(t), memory=memory, volatile=volatile, live=(ENGINE, t),
    )  # fmt: skip


def _alias(t: torch.Tensor) -> torch.Tensor:
    alias = local_of(t) if is_spread(t) else t.detach()
    return alias if type(alias) is torch.Tensor else alias.as_subclass(torch.Tensor)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor in one dimension, with elements that every kernel knows and copies bit for bit."""
    known = t if t.dtype in _JOINED_AS_THEY_ARE else t.reshape(-1).view(torch.uint8)
    return known if known.dim() == 1 else known.view(-1)


def _columns(tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[object]]:
    """Yield all on which depends how a tensor is stored, less its elements."""
    with torch._C.DisableTorchFunctionSubclass():
        yield list(map(torch.Tensor.data_ptr, tensors))
        yield list(map(torch.Tensor.size, tensors))
        yield list(map(torch.Tensor.stride, tensors))
        dtypes: list[torch.dtype] = list(map(attrgetter("dtype"), tensors))
        yield dtypes
        yield list(map(torch.Tensor.is_neg, tensors))
        if any(dtype.is_complex for dtype in set(dtypes)):
            yield list(map(torch.Tensor.is_conj, tensors))
        learning = list(map(attrgetter("requires_grad"), tensors))
        yield learning
        if True in learning and set(map(type, tensors)) != {torch.nn.Parameter}:
            yield list(map(attrgetter("is_leaf"), tensors))


class _Joined:
    """Small tensors that keep their memory, moved in one go."""

    def __init__(self, flats: list[torch.Tensor], memory: memoryview) -> None:
        self._flats = flats
        self._slab = torch.frombuffer(memory, dtype=flats[0].dtype)
        self._on_device = torch_devices.DEVICES.has(flats[0])

    def copy(self, sources: Sequence[TensorSource]) -> Marked | None:
        # The flat views are of the same memory: the sources are lasting.
        if self._on_device:
            return torch_devices.slab_on(self._flats, self._slab)
        with torch.no_grad():
            torch.cat(self._flats, out=self._slab)
        return None


def _lies_as_stored(t: torch.Tensor) -> bool:
    """Return whether the bytes of a tensor in host memory are its elements in C order."""
    # Tensors of inference count no versions.
    if not t.is_cpu or torch_devices.DEVICES.has(t) or t.is_inference():
        return False
    return t.is_contiguous() and not (t.is_conj() or t.is_neg())


class TorchEngine:
    """Move bytes of torch tensors in few calls: one for all tensors of a device."""

    def owns(self, value: object) -> bool:
        return isinstance(value, torch.Tensor)

    def fingerprint(self, values: Sequence[object]) -> Iterator[Sequence[object]]:
        # Block by block: a tensor's record is fetched from memory once for all columns.
        for start in range(0, len(values), PRINTED_TOGETHER):
            block = values[start : start + PRINTED_TOGETHER]
            kinds = list(map(type, block))
            yield kinds
            tensors = cast("Sequence[torch.Tensor]", block)
            if not set(kinds).issubset(_OURS):
                how, tensors = looked_at(tensors)
                yield from how
            yield from _columns(tensors)

    def aliases(self, values: Sequence[object]) -> Sequence[object]:
        return list(map(_alias, cast("Sequence[torch.Tensor]", values)))

    def keeps(self, alias: object, spec: TensorSpec) -> bool:
        storage = cast("torch.Tensor", alias).untyped_storage()
        return spec.nbytes <= JOIN_BYTES and storage.nbytes() <= JOIN_BYTES

    def joins(self, alias: object, spec: TensorSpec, *, lasting: bool) -> Hashable:
        t = cast("torch.Tensor", alias)
        if not lasting or spec.stride is not None or not 0 < spec.nbytes <= JOIN_BYTES:
            return None
        if t.is_conj() or t.is_neg():
            return None
        if torch_devices.DEVICES.has(t):
            return spec.dtype, t.device
        return spec.dtype if t.is_cpu else None

    def join(self, aliases: Sequence[object], memory: memoryview) -> _Joined:
        return _Joined([_flat(cast("torch.Tensor", alias)) for alias in aliases], memory)

    def targets(self, specs: Sequence[TensorSpec], destinations: Sequence[memoryview]) -> list[object]:
        return [
            raw(torch.frombuffer(memory, dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape))
            if len(memory)
            else None
            for spec, memory in zip(specs, destinations, strict=True)
        ]

    def addresses(self, values: Sequence[object]) -> list[int] | None:
        tensors = cast("Sequence[torch.Tensor]", values)
        if not all(isinstance(t, torch.Tensor) and _lies_as_stored(t) for t in tensors):
            return None
        return [t.data_ptr() for t in tensors]

    def pinning(self, values: Sequence[object]) -> Pinning | None:
        return torch_devices.pinning(values)

    def versions(self, values: Sequence[object]) -> list[int]:
        return [t._version for t in cast("Sequence[torch.Tensor]", values)]

    def copy_out(self, values: Sequence[object], targets: Sequence[object]) -> Marked | None:
        return copy_all(_pairs(values, targets))

    def copy_beside(self, values: Sequence[object], targets: Sequence[object]) -> Marked | None:
        if not torch_devices.DEVICES.used():
            return None
        has = torch_devices.DEVICES.has
        pairs = _pairs(values, targets)
        if not all(has(source) and torch_devices.pinned(target) for target, source in pairs):
            return None
        if any(source.is_inference() for _, source in pairs):  # they count no versions
            return None
        return torch_devices.read_from(pairs, beside=True)

    def copy_in(self, pairs: Sequence[tuple[object, HostTensor]]) -> None:
        copy_in(cast("Sequence[tuple[torch.Tensor, HostTensor]]", pairs))

    def make(self, host: HostTensor, kind: str) -> torch.Tensor:
        return as_kind(new_tensor(host), kind)

    def like(self, reference: Callable[[], object], value: object) -> object:
        if not torch_devices.DEVICES.used():
            return value
        return _moved(value, reference())


def _pairs(values: Sequence[object], targets: Sequence[object]) -> list[Pair]:
    return [
        (cast("torch.Tensor", target), raw(cast("torch.Tensor", value)))
        for value, target in zip(values, targets, strict=True)
        if target is not None
    ]


def as_kind(t: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `t` as the Parameter, or with the requires_grad, that a leaf kind asks for."""
    if kind.startswith("torch.Parameter"):
        learns = not kind.endswith(":frozen") and (t.is_floating_point() or t.is_complex())
        return torch.nn.Parameter(t, requires_grad=learns)
    return t.requires_grad_() if kind == "torch.Tensor:grad" else t


def _moved(value: object, like: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(like.device) if isinstance(like, torch.Tensor) else value
    if isinstance(value, dict) and isinstance(like, dict):
        for key in value.keys() & like.keys():
            value[key] = _moved(value[key], like[key])
    elif isinstance(value, list) and isinstance(like, (list, tuple)):
        value[:] = [_moved(v, w) for v, w in zip(value, like, strict=False)] + value[len(like) :]
    return value


ENGINE = TorchEngine()
