"""What holdfast asks of a store, and what a store promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from holdfast.core.buffers import Buffer

__all__ = ["LOOKING", "MAX_WHOLE_BYTES", "ObjectInfo", "Served", "Store", "Stream"]

MAX_WHOLE_BYTES = 1 << 30
LOOKING = ("read", "look at")  # what fails for want of an object; who writes lacks something else


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it: key, size in bytes, time of last change in seconds since the Unix epoch."""

    key: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Stream:
    """A new object whose first `head_bytes` bytes are known last.

    `body` gives what follows them, piece by piece, and may wait for each; a piece stays as it is until the write has
    returned. `make_head` is called once, when the whole body was taken. With `over` the object takes the place of the
    present one of its key, if there is one, in one step when it is whole; the key need not be free. `body_bytes` is how
    long the body will be, or at most is, where that is known: a hint for stores that cut it into parts.
    """

    key: str
    head_bytes: int
    body: Iterable[Buffer]
    make_head: Callable[[], Buffer]
    over: bool = False
    body_bytes: int | None = None

    def head(self) -> Buffer:
        """Return the first bytes. Raises ValueError when they are not as many as was said."""
        head = self.make_head()
        if len(head) != self.head_bytes:
            raise ValueError(f"{self.key}: its head has {len(head)} bytes; {self.head_bytes} were announced")
        return head


class Store(Protocol):
    """A place that holds objects by key.

    Keys are relative paths of plain components (`core.names.check_key`). Obligations of every implementation:

    - `write`, `write_streams`, `create`, `replace`, `append` and `delete` return only when the effect survives
      power loss.
    - `create` and `replace` are atomic: a reader, or a crash at any point, sees the whole old or the whole new object.
    - `create` succeeds for exactly one of any number of rivals.
    - Errors are the StoreError family of `core.errors`; nothing is retried that cannot be retried safely.
    """

    url: str
    appendable: bool

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        """Store a new object at a key that no other writer uses; a crash may leave a part of it behind."""
        ...

    def write_streams(self, streams: Iterable[Stream]) -> None:
        """Store new objects at keys that no other writer uses; a crash may leave parts of them behind.

        Streams are asked for one after the other, each when the body of the one before was taken, and bodies piece by
        piece, in the calling thread. Heads come after bodies: until an object is whole, a reader finds none, or zeros
        in the place of its head (on a disk the head is written into a hole; in an object store nothing is seen of an
        upload until it is completed). What `body`, `make_head` or the store raises ends the
        write, and none of the objects stays; one that was to go over another is whole, the old or the new.
        """
        ...

    def create(self, key: str, data: Buffer) -> None:
        """Store an object at a key that is free. Raises AlreadyExists when it is not."""
        ...

    def replace(self, key: str, data: Buffer) -> None:
        """Store an object, over the present one if there is one."""
        ...

    def append(self, key: str, data: Buffer) -> None:
        """Add bytes to the end of an object, made if absent; only where `appendable`."""
        ...

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` to `end` (or to its end) of an object. Raises NotFound, Truncated on a short read.

        To its end is for documents: InvalidFormat is raised, and nothing read, where it is beyond MAX_WHOLE_BYTES.
        """
        ...

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target` with an object's bytes from `start` on. Raises NotFound, Truncated on a short read."""
        ...

    def info(self, key: str) -> ObjectInfo:
        """Return size and age of an object. Raises NotFound."""
        ...

    def names(self, prefix: str, after: str = "") -> list[str]:
        """Return the keys of what `list` returns that sort behind `after`; where possible for less than it costs."""
        ...

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Return every object whose key starts with `prefix` + "/", sorted by key; empty when there is none."""
        ...

    def room(self) -> int | None:
        """Return how many more bytes fit, None where there is no telling."""
        ...

    def sweep(self, before: float) -> None:
        """Remove what writers that died left half-made before a time (seconds since the Unix epoch). No object is."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; one that is missing already is no error."""
        ...


@runtime_checkable
class Served(Protocol):
    """A store behind a server, which any process can open by its URL, and whose `create` is as good as that server.

    `stores.probe` finds that out; with `single_writer` the user vouches that nobody else writes there.
    """

    url: str
    single_writer: bool
