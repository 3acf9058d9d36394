"""Devices that copy by themselves (CUDA, ROCm): what they are told goes on while Python does something else.

A copy between a device and pinned host memory is ordered among what the device does, in the stream it was told in. So
it holds nobody: what the device is told afterwards in that stream comes after it, what is told in another stream can be
made to, and whoever wants the bytes waits for a mark behind them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch

from holdfast.core.memory import Pinning

__all__ = ["Devices", "Marked", "Pair", "pinned", "pinning", "read_from", "slab_on", "write_to"]

logger = logging.getLogger("holdfast")

Pair = tuple[torch.Tensor, torch.Tensor]

PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices of the process
HALF_BYTES = 16 << 20  # of a ring
ALIGNMENT = 64


class Mark(Protocol):
    """A point in what a device was told in one stream."""

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """What a device is told, one thing after the other."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


class Devices(Protocol):
    """What there is to say to devices; `Cuda` says it to real ones."""

    def used(self) -> bool:
        """Return whether this process uses any."""
        ...

    def has(self, t: torch.Tensor, /) -> bool:
        """Return whether the elements of a tensor lie on such a device."""
        ...

    def capturing(self) -> bool:
        """Return whether what is told now is not done but noted down, to be done again and again."""
        ...

    def current(self, device: torch.device) -> Stream:
        """Return the stream in which a device is told something here and now."""
        ...

    def beside(self, device: torch.device) -> Stream:
        """Return a stream of ours."""
        ...

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Tell in this stream what is told in the context."""
        ...

    def mark(self, stream: Any) -> Mark:
        """Return a mark behind all that was told in a stream."""
        ...

    def pinned(self, size: int) -> torch.Tensor:
        """Return so many bytes of new host memory that devices copy to and from by themselves."""
        ...

    def pin(self, address: int, size: int) -> bool:
        """Make that of memory which is there already; return whether it worked."""
        ...

    def unpin(self, address: int) -> None:
        """Take that back."""
        ...


class Cuda:
    """Devices of CUDA, and of ROCm, which torch calls by the same names."""

    def __init__(self) -> None:
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    has = staticmethod(attrgetter("is_cuda"))  # asked of every tensor

    def used(self) -> bool:
        return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    def capturing(self) -> bool:
        return self.used() and torch.cuda.is_current_stream_capturing()

    def current(self, device: torch.device) -> Stream:
        return torch.cuda.current_stream(device)

    def beside(self, device: torch.device) -> Stream:
        if device not in self._beside:
            self._beside[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._beside[device]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def mark(self, stream: Any) -> Mark:
        # Who waits for it sleeps: it would take a core from training to look again and again.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def pin(self, address: int, size: int) -> bool:
        try:
            return int(_runtime().cudaHostRegister(address, size, PORTABLE)) == 0
        except RuntimeError as e:
            logger.debug("host memory is not pinned: %s", e)
            return False

    def unpin(self, address: int) -> None:
        with contextlib.suppress(RuntimeError):  # at the end of a process the device may be gone before
            _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


DEVICES: Devices = Cuda()

_pinned: dict[int, int] = {}  # size of what `pinning` pinned, by address


class Marked:
    """A copy between devices and the host that may still be going on, and what it needs meanwhile."""

    def __init__(self, marks: Mapping[torch.device, Mark], needs: object = None) -> None:
        self._marks = marks
        self._needs = needs

    def fence(self) -> None:
        """Have the devices do first the copy, then what they are told from now on in their current streams."""
        for device, mark in self._marks.items():
            DEVICES.current(device).wait_event(mark)

    def wait(self) -> None:
        """Return when the copy is complete."""
        for mark in self._marks.values():
            mark.synchronize()
        self._needs = None


def pinning(values: Iterable[object]) -> Pinning | None:
    """Return what pins memory, or None if none of these tensors is on a device that cares."""
    if not DEVICES.used() or not any(isinstance(v, torch.Tensor) and DEVICES.has(v) for v in values):
        return None
    return _pin


def _pin(address: int, size: int) -> Callable[[], None] | None:
    devices = DEVICES
    if not devices.pin(address, size):
        logger.warning(
            "host memory for snapshots could not be pinned (is `ulimit -l` too low?): copies from devices hold the "
            "loop longer"
        )
        return None
    _pinned[address] = size

    def unpin() -> None:
        if _pinned.pop(address, None) is not None:
            devices.unpin(address)

    return unpin


def pinned(t: torch.Tensor) -> bool:
    """Return whether a host tensor lies in memory that was pinned here."""
    if not _pinned:
        return False
    at, size = t.data_ptr(), t.nbytes
    return any(start <= at and at + size <= start + length for start, length in _pinned.items())


def read_from(pairs: Sequence[Pair], *, beside: bool = False) -> Marked:
    """Begin to copy from devices: each second tensor into the first, which lies in pinned memory.

    Where that is told in the stream that is current now, all that is told there afterwards comes after it. `beside`: in
    a stream of its own, after all that was told before; see `Marked.fence`.
    """
    marks: dict[torch.device, Mark] = {}
    for device, (targets, sources) in _by_device(pairs, 1).items():
        with _stream(device, beside=beside) as stream, torch.no_grad():
            # Else torch conjugates or negates on the host, at once, what has not come yet.
            plain = [s.resolve_conj().resolve_neg() for s in sources]
            torch._foreach_copy_(targets, plain, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
            marks[device] = DEVICES.mark(stream)
    return Marked(marks, pairs)


def slab_on(flats: Sequence[torch.Tensor], slab: torch.Tensor) -> Marked | None:
    """Copy flat tensors of one device into one piece of host memory: put together there, and moved in one go."""
    device, asynchronous = flats[0].device, pinned(slab)
    with _stream(device) as stream, torch.no_grad():
        together = torch.empty(slab.shape, dtype=slab.dtype, device=device)
        torch.cat(list(flats), out=together)
        slab.copy_(together, non_blocking=asynchronous)
        return Marked({device: DEVICES.mark(stream)}) if asynchronous else None


def write_to(pairs: Sequence[Pair]) -> None:
    """Copy to devices: each second tensor, of the host, into the first. Returns when it is done."""
    for device, (targets, sources) in _by_device(pairs, 0).items():
        with _stream(device) as stream, torch.no_grad():
            through = _Ring(stream)
            for target, source in zip(targets, sources, strict=True):
                alike = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
                asynchronous = pinned(source)
                if not alike or asynchronous:
                    target.copy_(source, non_blocking=asynchronous)
                elif source.numel():
                    through.put(target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8))
            DEVICES.mark(stream).synchronize()


class _Ring:
    """Two halves of pinned memory: while one is copied to a device the other is filled."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._halves: list[torch.Tensor] = []
        self._marks: list[Mark | None] = [None, None]
        self._half = self._filled = 0

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes of the host to a device; they may still be on their way at the end, and `source` may not."""
        for at in range(0, len(source), HALF_BYTES):
            some = source[at : at + HALF_BYTES]
            place = self._room(len(some))
            place.copy_(some)
            target[at : at + len(some)].copy_(place, non_blocking=True)

    def _room(self, size: int) -> torch.Tensor:
        if not self._halves:
            self._halves = [DEVICES.pinned(HALF_BYTES) for _ in self._marks]
        if self._filled + size > HALF_BYTES:
            self._marks[self._half] = DEVICES.mark(self._stream)
            self._half, self._filled = 1 - self._half, 0
            before = self._marks[self._half]
            if before is not None:
                before.synchronize()
        start = self._filled
        self._filled = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return self._halves[self._half][start : start + size]


@contextlib.contextmanager
def _stream(device: torch.device, *, beside: bool = False) -> Iterator[Stream]:
    current = DEVICES.current(device)
    stream = DEVICES.beside(device) if beside else current
    if beside:
        stream.wait_stream(current)
    with DEVICES.on(stream):
        yield stream


def _by_device(
    pairs: Iterable[Pair], side: int
) -> dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    found: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for pair in pairs:
        targets, sources = found.setdefault(pair[side].device, ([], []))
        targets.append(pair[0])
        sources.append(pair[1])
    return found
