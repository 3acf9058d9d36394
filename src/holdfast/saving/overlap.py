"""Overlap: what only an optimizer changes is copied behind the next forward and backward pass.

The optimizer's step waits for what is left. A tensor that something else changed meanwhile is found out by its version
counter, and the snapshot is given up: a torn one is an error, never a file.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blake3 import blake3

from holdfast.core.errors import StateError
from holdfast.core.standby import run_behind
from holdfast.saving.progress import Progress

__all__ = ["Fence", "Overlap", "Piece", "protect"]

CHUNK_BYTES = 16 << 20
GRACE_SECONDS = 0.005  # a change that had begun before the last byte was copied has counted itself by then


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor whose bytes lie at the address `source`, and belong at `target`, `offset` bytes into the image."""

    name: str
    source: int
    target: int
    nbytes: int
    offset: int


class Overlap:
    """One copy behind the training thread. Holds on to `values`, whose memory the pieces are."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        values: Sequence[object],
        versions: Callable[[Sequence[object]], list[int]],
        progress: Progress,
        *,
        check: bool = False,
    ) -> None:
        self._pieces = pieces
        self._values = values
        self._versions = versions
        self._before = versions(values)
        self._progress = progress
        self._expected = [_digest(p.source, p.nbytes) for p in pieces] if check else []
        self.done = threading.Event()

    def start(self) -> None:
        """Copy from now on."""
        self._progress.advance(self._pieces[0].offset)
        run_behind(self._run, "holdfast-copy")

    def _run(self) -> None:
        try:
            self._copy()
            time.sleep(GRACE_SECONDS)
            self._check()
            self._progress.advance(self._progress.total)
        except BaseException as e:  # noqa: BLE001 - raised by whoever waits for the image
            self._progress.fail(e)
        finally:
            self.done.set()
            self._values = ()

    def _copy(self) -> None:
        for piece in self._pieces:
            self._progress.advance(piece.offset)  # all before it is there
            for at in range(0, piece.nbytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, piece.nbytes - at)
                ctypes.memmove(piece.target + at, piece.source + at, size)

    def _check(self) -> None:
        after = self._versions(self._values)
        changed = [
            p.name for p, then, now in zip(self._pieces, self._before, after, strict=True) if then != now
        ]
        if not changed and self._expected:
            changed = [
                p.name
                for p, digest in zip(self._pieces, self._expected, strict=True)
                if _digest(p.target, p.nbytes) != digest
            ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise StateError(
                f"{', '.join(changed[:3])}{more}: changed by something else than an optimizer's step while the state "
                "was being copied, so this snapshot was given up. Call holdfast.protect() before such a change, or "
                "pass overlap=False"
            )


def _digest(address: int, nbytes: int) -> bytes:
    return blake3(memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")).digest()


class Fence:
    """Stands before the optimizer's steps until the copy that is under way is complete."""

    def __init__(self) -> None:
        self._copying: Overlap | None = None
        _fences.add(self)

    def guard(self, copying: Overlap) -> None:
        """Let nobody through from now on until this copy is complete."""
        self._copying = copying

    def wait(self) -> None:
        """Return when no copy is under way."""
        copying = self._copying
        if copying is not None:
            copying.done.wait()
            self._copying = None


_fences: weakref.WeakSet[Fence] = weakref.WeakSet()


def protect() -> None:
    """Wait until no snapshot is being copied: call this before anything but an optimizer changes parameters in place.

    Between two optimizer steps a save may still be copying what the optimizer updates. Code that writes there itself
    (clipping weights outside of the step, re-initialising a layer, an optimizer of your own making) calls this first.
    """
    for fence in list(_fences):
        fence.wait()
