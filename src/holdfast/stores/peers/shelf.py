"""Objects in the memory of a service, within a budget. Nothing is ever given up to make room.

An object is a list of blocks that do not change any more. Who reads holds the blocks it reads, so an object that is
replaced or removed meanwhile is read whole, and its memory counts until the reader is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, StoreError, Truncated
from holdfast.core.memory import HUGE_PAGE, map_pages, page_aligned
from holdfast.core.names import check_key
from holdfast.core.units import format_bytes
from holdfast.stores.base import ObjectInfo
from holdfast.stores.peers.messages import Mode

__all__ = ["Shelf", "Upload"]

BLOCK_BYTES = 8 << 20
FIRST_BYTES = 1 << 20  # of an object that nobody knows the length of
MAPPED_BYTES = 64 << 10  # less is not worth a mapping of its own
OBJECT_BYTES = 512  # what an object costs besides its bytes, so that very many small ones are bounded too


class _Block:
    """Memory that is counted for as long as anything refers to it."""

    __slots__ = ("_shelf", "cost", "used", "view")

    def __init__(self, shelf: Shelf, view: memoryview, cost: int) -> None:
        self.view = view
        self.used = 0
        self.cost = cost
        self._shelf = shelf

    def __del__(self) -> None:
        self._shelf._give_back(self.view, self.cost)


@dataclass(frozen=True, slots=True)
class _Held:
    blocks: tuple[_Block, ...]
    size: int
    modified: float
    token: bytes


def _cost(size: int) -> int:
    """Return how much memory a block of so many bytes takes."""
    if size >= HUGE_PAGE:
        return -(-size // HUGE_PAGE) * HUGE_PAGE
    return page_aligned(size) if size >= MAPPED_BYTES else size + OBJECT_BYTES


def _split(size: int) -> list[int]:
    """Return the sizes of the blocks that so many bytes go to."""
    rest = size % BLOCK_BYTES
    return [BLOCK_BYTES] * (size // BLOCK_BYTES) + ([rest] if rest else [])


class Shelf:
    """Holds objects by key in at most `limit_bytes` of memory. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._objects: dict[str, _Held] = {}
        self._used = 0
        self._free: list[memoryview] = []  # whole blocks: the kernel provided their pages already
        self._lock = threading.RLock()  # giving a block back may happen anywhere

    # ---- memory ---------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """The memory that objects take, those on their way included."""
        return self._used

    def room(self) -> int:
        """Return how many more bytes fit."""
        with self._lock:
            return max(0, self.limit_bytes - self._used)

    def take(self, size: int) -> _Block:
        """Return a new block. Raises OutOfSpace."""
        cost = _cost(size)
        with self._lock:
            self._refuse_beyond(cost)
            if size == BLOCK_BYTES and self._free:
                view = self._free.pop()
            else:
                view = map_pages(size) if size >= MAPPED_BYTES else memoryview(bytearray(size))
            self._used += cost
            while self._free and self._used + len(self._free) * BLOCK_BYTES > self.limit_bytes:
                self._free.pop()
        return _Block(self, view, cost)

    def _refuse_beyond(self, cost: int) -> None:
        if cost > self.limit_bytes - self._used:
            raise OutOfSpace(
                f"its memory is full: {format_bytes(self._used)} of {format_bytes(self.limit_bytes)} are taken, and "
                f"{format_bytes(cost)} more do not fit; keep less there, or give the service more --memory"
            )

    def _give_back(self, view: memoryview, cost: int) -> None:
        with self._lock:
            self._used -= cost
            keep = self._used + (len(self._free) + 1) * BLOCK_BYTES <= self.limit_bytes
            if len(view) == BLOCK_BYTES and keep:
                self._free.append(view)

    # ---- writing --------------------------------------------------------------------------------------------------

    def put(self, key: str, mode: Mode, token: bytes, data: Buffer) -> None:
        """Store a small object at once."""
        check_key(key)
        with self._lock:
            present = self._objects.get(key)
            if self._is_done(present, key, mode, token):
                return
            last = present.blocks[-1] if present is not None and present.blocks else None
            blocks: tuple[_Block, ...] = ()
            if mode == "append" and present is not None:
                blocks = present.blocks
                if last is not None and last.used < MAPPED_BYTES:  # else a log would be a block for each line
                    data, blocks = b"".join([last.view[: last.used], data]), blocks[:-1]
            block = self.take(len(data))
            block.view[: len(data)] = data
            block.used = len(data)
            self._place(key, (*blocks, block), token)

    def begin(
        self, key: str, mode: Mode, token: bytes, *, head: int, body: int | None, exact: bool
    ) -> Upload:
        """Take in an object piece by piece.

        Raises:
            AlreadyExists, OutOfSpace: as far as that can be told beforehand.
        """
        check_key(key)
        with self._lock:
            self._is_done(self._objects.get(key), key, mode, token)
            self._refuse_beyond(head + (body or 0) if exact else head)
            if exact and body is not None:
                self._refuse_beyond(sum(map(_cost, _split(head))) + sum(map(_cost, _split(body))))
            sizes = _split(body) if exact and body is not None else None
            return Upload(self, key, (mode, token), _split(head), sizes)

    def finish(self, upload: Upload) -> None:
        """Store what was taken in."""
        blocks = (*upload.head, *upload.body)
        with self._lock:
            present = self._objects.get(upload.key)
            mode, token = upload.how
            if self._is_done(present, upload.key, mode, token):
                return
            if mode == "append" and present is not None:
                blocks = (*present.blocks, *blocks)
            self._place(upload.key, blocks, token)

    def _is_done(self, present: _Held | None, key: str, mode: Mode, token: bytes) -> bool:
        """Return whether this very request was carried out already; refuse to create what is there."""
        if present is None or (not token or present.token != token):
            if present is not None and mode == "create":
                raise AlreadyExists(f"object {key!r} exists already")
            return False
        return True

    def _place(self, key: str, blocks: tuple[_Block, ...], token: bytes) -> None:
        self._objects[key] = _Held(blocks, sum(b.used for b in blocks), time.time(), token)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; one that is missing already is no error."""
        for key in keys:
            check_key(key)
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    # ---- reading --------------------------------------------------------------------------------------------------

    def info(self, key: str) -> ObjectInfo:
        """Return how an object stands. Raises NotFound."""
        found = self._get(key)
        return ObjectInfo(key, found.size, found.modified)

    def read(self, key: str, start: int, end: int | None) -> list[tuple[object, memoryview]]:
        """Return the bytes of an object from `start` to `end`: views, each with what keeps its memory.

        Raises NotFound, and Truncated where it ends before.
        """
        found = self._get(key)
        end = found.size if end is None else end
        if end > found.size or start > end:
            raise Truncated(f"{key}: ends after {found.size} bytes; expected {max(start, end)}")
        views: list[tuple[object, memoryview]] = []
        at = 0
        for block in found.blocks:
            first, last = max(start, at), min(end, at + block.used)
            if first < last:
                views.append((block, block.view[first - at : last - at]))
            at += block.used
        return views

    def list(self, prefix: str, after: str, most: int) -> tuple[list[ObjectInfo], bool]:
        """Return up to `most` objects below a prefix whose keys sort behind another, and whether there are more."""
        start = f"{check_key(prefix)}/" if prefix else ""
        with self._lock:
            keys = sorted(k for k in self._objects if k.startswith(start) and k > after)
            found = [(k, self._objects[k]) for k in keys[:most]]
        return [ObjectInfo(k, h.size, h.modified) for k, h in found], len(keys) > most

    def _get(self, key: str) -> _Held:
        check_key(key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise NotFound(f"no object {key!r}")
        return found


class Upload:
    """An object on its way. It is dropped by being forgotten."""

    def __init__(
        self, shelf: Shelf, key: str, how: tuple[Mode, bytes], head: list[int], body: list[int] | None
    ) -> None:
        self.key = key
        self.how = how
        self._shelf = shelf
        self._grows = body is None
        self.head = [shelf.take(size) for size in head]
        self.body = [shelf.take(size) for size in body or ()]
        self._at = {True: 0, False: 0}  # the block that is being filled, of the head and of the body

    def room(self, size: int, *, head: bool) -> list[memoryview]:
        """Return the memory for the next bytes. Raises OutOfSpace, and StoreError for more than was announced."""
        blocks, found = self.head if head else self.body, list[memoryview]()
        while size:
            at = self._at[head]
            if at == len(blocks):
                if head or not self._grows:
                    raise StoreError(f"{self.key}: is longer than was announced")
                blocks.append(self._shelf.take(BLOCK_BYTES if blocks else FIRST_BYTES))
            block = blocks[at]
            part = block.view[block.used : block.used + size]
            block.used += len(part)
            size -= len(part)
            self._at[head] += block.used == len(block.view)
            found.append(part)
        return found

    def finish(self) -> None:
        """Store it. Raises AlreadyExists, and StoreError where it is shorter than was announced."""
        fixed = self.head if self._grows else [*self.head, *self.body]
        if any(block.used < len(block.view) for block in fixed):
            raise StoreError(f"{self.key}: is shorter than was announced")
        last = self.body[-1] if self.body else None
        if last is not None and last.used < len(last.view) // 2:  # of one that grew
            short = self._shelf.take(last.used)
            short.view[:] = last.view[: last.used]
            short.used = last.used
            self.body[-1] = short
        self._shelf.finish(self)
