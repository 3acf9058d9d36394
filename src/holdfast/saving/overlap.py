"""Overlap: what only an optimizer changes is copied behind the next forward and backward pass.

The optimizer's step waits for what is left of host memory, and a device is told to copy before it steps. A tensor that
something else changed meanwhile is found out by its version counter, and the snapshot is given up: a torn one is an
error, never a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from holdfast.core.errors import StateError
from holdfast.core.standby import run_behind
from holdfast.saving.progress import Progress
from holdfast.state.adapter import DeviceCopy

__all__ = ["Fence", "Flight", "Overlap", "Piece", "Watched", "digest_at", "protect"]

CHUNK_BYTES = 16 << 20
GRACE_SECONDS = 0.005  # a change that had begun before the last byte was copied has counted itself by then


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor whose bytes lie at the address `source`, and belong at `target`, `offset` bytes into the image."""

    source: int
    target: int
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Flight:
    """What a device copies by itself, the first of it `offset` bytes into the image."""

    offset: int
    copy: DeviceCopy


@dataclass(slots=True)
class Watched:
    """Tensors that nothing but an optimizer may change until they are copied, where their copies are, and the digests
    that these must have, where that is checked."""

    versions: Callable[[Sequence[object]], list[int]]
    addresses: Callable[[Sequence[object]], list[int] | None]
    names: list[str] = field(default_factory=list)
    values: list[object] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # address and size of each
    expected: list[bytes] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)

    def watch(self) -> None:
        """Look at them from now on."""
        self._before = self.versions(self.values)

    def changed(self) -> list[str]:
        """Return the names of those that were changed since."""
        now = self.versions(self.values)
        return [name for name, a, b in zip(self.names, self._before, now, strict=True) if a != b]

    def differing(self) -> list[str]:
        """Return the names of those whose copies are not what is expected."""
        if not self.expected:
            return []
        found = [digest_at(*place) for place in self.copies]
        return [name for name, a, b in zip(self.names, self.expected, found, strict=True) if a != b]


class Overlap:
    """One copy behind the training thread. Keeps alive what it copies.

    `here` are tensors in host memory, which are the `pieces`; `there` those on devices, which are the `flights`. A
    flight that began in the way of what the device is told needs no watching.
    """

    def __init__(
        self,
        here: Watched,
        pieces: Sequence[Piece],
        there: Watched,
        flights: Sequence[Flight],
        progress: Progress,
    ) -> None:
        self._here, self._there = here, there
        self._pieces, self._flights = pieces, flights
        self._progress = progress
        self._torn: list[str] = []
        self._lock = threading.Lock()
        self._compared = False
        self._here_done = threading.Event()
        self.done = threading.Event()
        here.watch()
        there.watch()

    def start(self) -> None:
        """Copy from now on."""
        self._progress.advance(
            min([p.offset for p in self._pieces[:1]] + [f.offset for f in self._flights[:1]])
        )
        run_behind(self._run, "holdfast-copy")

    def fence(self) -> None:
        """Return when nothing that this thread does next, or tells devices, can change what is copied."""
        self._here_done.wait()
        for flight in self._flights:
            flight.copy.fence()
        self._compare()

    def _run(self) -> None:
        try:
            self._copy()
            self._check(lambda: self._here.changed() or self._moved())
            self._here_done.set()
            for flight in self._flights:
                self._progress.advance(flight.offset)  # all before it is there
                flight.copy.wait()
            self._check(self._land)
            self._check(lambda: self._here.differing() + self._there.differing())
            self._progress.advance(self._progress.total)
        except BaseException as e:  # noqa: BLE001 - raised by whoever waits for the image
            for flight in self._flights:  # whose memory is used again
                with contextlib.suppress(Exception):
                    flight.copy.wait()
            self._progress.fail(e)
        finally:
            self._here_done.set()
            self.done.set()
            with self._lock:
                self._compared = True
                self._here.values, self._there.values, self._flights = [], [], ()

    def _copy(self) -> None:
        first = self._flights[0].offset if self._flights else self._progress.total
        for piece, value in zip(self._pieces, self._here.values, strict=True):
            self._progress.advance(min(piece.offset, first))  # all before it is there
            for at in range(0, piece.nbytes, CHUNK_BYTES):
                if self._here.addresses([value]) != [piece.source]:
                    return  # its memory is gone: `_moved` says whose
                size = min(CHUNK_BYTES, piece.nbytes - at)
                ctypes.memmove(piece.target + at, piece.source + at, size)
        if self._pieces:
            time.sleep(GRACE_SECONDS)

    def _moved(self) -> list[str]:
        """Return the names of tensors that were given other memory, as `share_memory_()` does: no version counts it."""
        here, sources = self._here, [piece.source for piece in self._pieces]
        if here.addresses(here.values) == sources:
            return []
        there = zip(here.names, here.values, sources, strict=True)
        return [name for name, value, source in there if here.addresses([value]) != [source]]

    def _land(self) -> list[str]:
        """Everything is there: return what was changed on devices before the fence."""
        if self._there.values and not self._compared:
            time.sleep(GRACE_SECONDS)
        self._compare()
        return self._torn

    def _compare(self) -> None:
        """Once, by whoever comes first: find out what was changed on devices before its copy was safe."""
        with self._lock:
            if not self._compared:
                self._compared = True
                self._torn = self._there.changed()

    def _check(self, look: Callable[[], list[str]]) -> None:
        changed = look()
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise StateError(
                f"{', '.join(changed[:3])}{more}: changed by something else than an optimizer's step while the state "
                "was being copied, so this snapshot was given up. Call holdfast.protect() before such a change, or "
                "pass overlap=False"
            )


def digest_at(address: int, nbytes: int) -> bytes:
    """Return the digest of bytes in this process's memory."""
    return blake3(memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")).digest()


class Fence:
    """Stands before the optimizer's steps until they cannot change what is being copied."""

    def __init__(self) -> None:
        self._copying: Overlap | None = None
        self._seen = False
        self._blind = False
        _fences.add(self)

    @property
    def stands(self) -> bool:
        """Whether steps come by here: one has, and none may come without."""
        return self._seen and not self._blind

    def guard(self, copying: Overlap) -> None:
        """Let nobody through from now on until this copy is safe from him."""
        self._copying = copying

    def before_step(self, unannounced: bool) -> None:
        """An optimizer is about to step. `unannounced`: it may do so again without coming by."""
        self._seen = True
        self._blind |= unannounced
        self.hold()

    def hold(self) -> None:
        """Return when nothing done or told by this thread changes what is being copied."""
        copying = self._copying
        if copying is not None:
            copying.fence()
            if copying.done.is_set():
                self._copying = None

    def forget(self) -> None:
        """Stand before no step any more until the next copy."""
        self._copying = None

    def wait(self) -> None:
        """Return when no copy is under way."""
        copying = self._copying
        if copying is not None:
            copying.done.wait()
            self._copying = None


_fences: weakref.WeakSet[Fence] = weakref.WeakSet()


def _forget_copies() -> None:
    """A fork leaves the thread that copies behind; what changes in the child is not what it copies."""
    for fence in list(_fences):
        fence.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_copies)


def protect() -> None:
    """Wait until no snapshot is being copied: call this before anything but an optimizer changes parameters in place,
    and before a CUDA graph is captured.

    Between two optimizer steps a save may still be copying what the optimizer updates. Code that writes there itself
    (clipping weights outside of the step, re-initialising a layer, an optimizer of your own making) calls this first.
    """
    for fence in list(_fences):
        fence.wait()
