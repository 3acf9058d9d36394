"""A device without hardware: tensors of the host that are said to lie on it, and streams that are as late as they may.

What is told in a stream of its own runs when somebody waits for a mark behind it, not before: until then it reads
nothing and writes nothing. In the stream that is current, what is told to the device is done at once, but what it
copies arrives on the host, or is read from it, as late. So a wait that is missing shows as wrong bytes, each time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from patience import TIMEOUT

PATIENCE_SECONDS = 0.2  # of other threads: so long they leave it to the training thread to wait for a mark

_aten = torch.ops.aten


class ModelStream:
    def __init__(self, may_be_hurried: threading.Event) -> None:
        self.may_be_hurried = may_be_hurried
        self.told: list[Callable[[], object]] = []
        self.done = 0
        self.follows = False  # what is told now comes after what the device was told elsewhere
        self._lock = threading.RLock()

    def tell(self, act: Callable[[], object]) -> None:
        with self._lock:
            self.told.append(act)

    def run(self, end: int) -> None:
        with self._lock, torch.no_grad(), _disable_current_modes():
            while self.done < end:
                self.told[self.done]()
                self.told[self.done] = _nothing
                self.done += 1

    def wait_stream(self, stream: ModelStream) -> None:
        """What the device was told in the current stream it has done, but that must have been asked for."""
        self.follows = True

    def wait_event(self, event: ModelMark) -> None:
        event.stream.run(event.end)


def _nothing() -> None:
    pass


class ModelMark:
    def __init__(self, stream: ModelStream) -> None:
        self.stream, self.end = stream, len(stream.told)

    def synchronize(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            pause = threading.Event()
            for _ in range(50):
                if self.stream.done >= self.end:
                    return
                pause.wait(PATIENCE_SECONDS / 50)
            assert self.stream.may_be_hurried.wait(TIMEOUT)
        self.stream.run(self.end)


class ModelDevices:
    """In the place of `torch_devices.DEVICES`."""

    def __init__(self) -> None:
        self.own: set[int] = set()
        self.memory: dict[int, int] = {}  # that was pinned
        self.may_be_hurried = threading.Event()  # by other threads than the training thread
        self.may_be_hurried.set()
        self.main, self.side = ModelStream(self.may_be_hurried), ModelStream(self.may_be_hurried)
        self.captures = False
        self.pins = True
        self._kept: list[torch.Tensor] = []

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Say that these lie on the device."""
        self._kept += tensors
        self.own |= {t.untyped_storage().data_ptr() for t in tensors}

    @property
    def late(self) -> int:
        """How much of what was told is not done yet."""
        return sum(len(s.told) - s.done for s in (self.main, self.side))

    def used(self) -> bool:
        return True

    def has(self, t: torch.Tensor, /) -> bool:
        return t.untyped_storage().data_ptr() in self.own

    def capturing(self) -> bool:
        return self.captures

    def current(self, device: torch.device) -> ModelStream:
        return self.main

    def beside(self, device: torch.device) -> ModelStream:
        return self.side

    @contextlib.contextmanager
    def on(self, stream: ModelStream) -> Iterator[None]:
        with _Telling(self, stream):
            yield
        stream.follows = False

    def mark(self, stream: ModelStream) -> ModelMark:
        return ModelMark(stream)

    def pinned(self, size: int) -> torch.Tensor:
        made = torch.zeros(size, dtype=torch.uint8)
        self.memory[made.data_ptr()] = size
        self._kept.append(made)
        return made

    def pin(self, address: int, size: int) -> bool:
        if self.pins:
            self.memory[address] = size
        return self.pins

    def unpin(self, address: int) -> None:
        del self.memory[address]

    def is_pinned(self, t: torch.Tensor) -> bool:
        return any(start <= t.data_ptr() < start + size for start, size in self.memory.items())


class _Telling(TorchDispatchMode):
    def __init__(self, devices: ModelDevices, stream: ModelStream) -> None:
        super().__init__()
        self._devices, self._stream = devices, stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._foreach_copy_.default:
            for target, source in zip(args[0], args[1], strict=True):
                self._copy(target, source)
            return None
        if func is _aten.copy_.default:
            self._copy(args[0], args[1])
            return args[0]
        if func is _aten.cat.out and self._stream is self._devices.side:
            self._stream.tell(lambda: func(*args, **kwargs))
            return kwargs["out"]
        return func(*args, **kwargs)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        devices, stream = self._devices, self._stream
        if stream is devices.side or devices.has(target):  # late as a whole
            assert stream is devices.main or stream.follows, "this may be read before it was written"
            stream.tell(lambda: target.copy_(source))
        elif devices.is_pinned(target) and not devices.is_pinned(source) and not self._fills_ring(target):
            value = source.clone()
            stream.tell(lambda: target.copy_(value))
        else:
            target.copy_(source)

    def _fills_ring(self, target: torch.Tensor) -> bool:
        return any(
            t.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() for t in self._devices._kept
        )
