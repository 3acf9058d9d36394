"""Put stored bytes into torch tensors, live or new, in few calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from holdfast.core.dtypes import DTYPES
from holdfast.state.adapters import torch_devices
from holdfast.state.adapters.torch_devices import Marked, Pair
from holdfast.state.tensors import HostTensor, c_strides, layout_to_recreate

__all__ = ["NAMES", "TORCH_DTYPES", "copy_all", "copy_in", "new_tensor", "overlaps", "raw"]

TORCH_DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in DTYPES if hasattr(torch, n)}
NAMES: dict[torch.dtype, str] = {t: n for n, t in TORCH_DTYPES.items()}

COPIED_TOGETHER = 256
_RAW = (torch.bool, torch.float4_e2m1fn_x2)


def copy_in(pairs: Sequence[tuple[torch.Tensor, HostTensor]]) -> None:
    """Copy stored elements into live tensors of the same shape, converting element types that differ."""
    ordered = sorted(pairs, key=_place)
    # Block by block: the record of a live tensor is fetched from memory once for all that is asked of it.
    for start in range(0, len(ordered), COPIED_TOGETHER):
        _copy_block(ordered[start : start + COPIED_TOGETHER])


def _place(pair: tuple[torch.Tensor, HostTensor]) -> tuple[int, int]:
    host = pair[1]
    return id(host.memory), host.start


def _copy_block(pairs: Sequence[tuple[torch.Tensor, HostTensor]]) -> None:
    whole: list[tuple[torch.Tensor, HostTensor]] = []
    alone: list[Pair] = []
    lazy: list[Pair] = []
    for target, host in pairs:
        kind = target.dtype
        same = TORCH_DTYPES[host.spec.dtype] is kind
        # Conjugate and negative views are not written by the batched copy.
        if target.is_neg() or (kind.is_complex and target.is_conj()):
            lazy.append((target, _elements(host)))
        elif overlaps(target):
            once = _without_broadcast(target.detach())
            stored = _elements(host)[tuple(slice(0, n) for n in once.shape)]
            alone.append((raw(once), raw(stored)) if same else (once, stored))
        elif not same:
            alone.append((target, _elements(host)))
        elif len(host.memory):
            whole.append((target, host))
    ready = [*alone, *_joined(whole)]
    inference = [pair for pair in ready if pair[0].is_inference()]
    copy_all([pair for pair in ready if not pair[0].is_inference()] if inference else ready)
    if inference:
        with torch.inference_mode():
            copy_all(inference)
    with torch.no_grad():
        for target, stored in lazy:
            target.copy_(stored)


def _joined(found: list[tuple[torch.Tensor, HostTensor]]) -> Iterator[Pair]:
    """Pair live tensors with their elements: those that lie one behind the other are made of the memory in one call."""
    run: list[torch.Tensor] = []
    first, end = None, 0
    for target, host in found:
        start = host.start
        if first is None or start != end or host.memory is not first.memory or target.dtype != run[0].dtype:
            if first is not None:
                yield from _split(first, run)
            first, run = host, []
        run.append(target)
        end = start + target.nbytes
    if first is not None:
        yield from _split(first, run)


def _split(first: HostTensor, live: list[torch.Tensor]) -> Iterator[Pair]:
    targets = [raw(t) for t in live] if live[0].dtype in _RAW else live
    sizes = [t.numel() for t in targets]
    flat = _flat(first.memory, first.start, sum(sizes), targets[0].dtype)
    if all(t.dim() == 1 for t in targets):  # half the cost of views of any shape
        return zip(targets, torch.split(flat, sizes), strict=True)
    stored = torch._utils._unflatten_dense_tensors(flat, targets)  # type: ignore[no-untyped-call]
    return zip(targets, stored, strict=True)


def new_tensor(host: HostTensor) -> torch.Tensor:
    """Return a new tensor with the stored elements and layout: around its bytes if they may be kept."""
    spec = host.spec
    layout = layout_to_recreate(spec)
    if layout is None and (host.owned or 0 in spec.shape):
        return _elements(host)
    if layout is None:  # byte by byte, which no element type hinders
        stored = _flat(host.memory, host.start, spec.nbytes, torch.uint8)
        return stored.clone().view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
    new = _empty(spec.shape, spec.dtype, layout[0])
    copy_in([(new, host)])
    return new


def _elements(host: HostTensor) -> torch.Tensor:
    """Return a CPU tensor over stored bytes, which are only read if they are read-only."""
    spec = host.spec
    size = math.prod(spec.shape)
    if size == 0:
        return _empty(spec.shape, spec.dtype, c_strides(spec.shape))
    return _flat(host.memory, host.start, size, TORCH_DTYPES[spec.dtype]).view(spec.shape)


def _flat(memory: memoryview, start: int, size: int, kind: torch.dtype) -> torch.Tensor:
    if not memory.readonly:
        return torch.frombuffer(memory, dtype=kind, count=size, offset=start)
    bytes_of_it = np.frombuffer(memory, np.uint8, size * kind.itemsize, start)
    return torch.from_numpy(np.asarray(_Shared(bytes_of_it))).view(kind)


def _empty(shape: tuple[int, ...], dtype: str, stride: tuple[int, ...]) -> torch.Tensor:
    kind = TORCH_DTYPES[dtype]
    # torch warns about every tensor that is created as complex32, and not about a view.
    carrier = torch.int32 if kind == torch.complex32 else kind
    return torch.empty_strided(shape, stride, dtype=carrier, device="cpu").view(kind)


class _Shared:
    """Read-only bytes without the flag that makes torch warn. Nobody writes them."""

    def __init__(self, array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        self.keep = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def raw(t: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same bytes whose copies are exact."""
    # A bool copy would turn any byte but 0 into 1, and packed float4 has no strided kernel everywhere.
    return t.view(torch.uint8) if t.dtype in _RAW else t


def _without_broadcast(t: torch.Tensor) -> torch.Tensor:
    """Return the part of a live tensor that holds each element in memory once."""
    for dim, (size, step) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if step == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t


def overlaps(t: torch.Tensor) -> bool:
    """Return whether elements of `t` share memory with each other, as after expand."""
    return 0 in t.stride() and any(
        step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True)
    )


def copy_all(pairs: Iterable[Pair]) -> Marked | None:
    """Copy each second tensor into the first. Returns when that is done, or, where devices copy into pinned memory by
    themselves, what tells when it is."""
    on_host: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    coming: list[Pair] = []
    going: list[Pair] = []
    other: list[Pair] = []
    devices = torch_devices.DEVICES
    for target, source in pairs:
        if devices.has(source):
            (coming if torch_devices.pinned(target) else other).append((target, source))
        elif devices.has(target):
            going.append((target, source))
        elif target.is_cpu and source.is_cpu:
            on_host[0].append(target)
            on_host[1].append(source)
        else:
            other.append((target, source))
    coming_in = torch_devices.read_from(coming) if coming else None
    if on_host[0]:
        with torch.no_grad():
            torch._foreach_copy_(*on_host)  # pyright: ignore[reportPrivateImportUsage]
    if going:
        torch_devices.write_to(going)
    if other:
        _copy_and_wait(other)
    return coming_in


def _copy_and_wait(pairs: Sequence[Pair]) -> None:
    """Copy to, from and between devices of any kind."""
    by_device: dict[tuple[torch.device, torch.device], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in pairs:
        targets, sources = by_device.setdefault((target.device, source.device), ([], []))
        targets.append(target)
        sources.append(source)
    with torch.no_grad():
        for (to, of), (targets, sources) in by_device.items():
            torch._foreach_copy_(targets, sources, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
            if to.type != "cpu" or of.type != "cpu":
                torch.accelerator.synchronize(of if of.type != "cpu" else to)
