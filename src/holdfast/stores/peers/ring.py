"""A store in the memories of several machines, of which any minority may be lost.

What small objects hold is decided by a majority (`quorum`). The bytes of large ones lie on `copies` of the services,
under a name that nobody else uses; what is decided is where.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec
from blake3 import blake3

from holdfast.core.buffers import Buffer
from holdfast.core.errors import (
    AlreadyExists,
    HoldfastError,
    IntegrityError,
    InvalidFormat,
    NotFound,
    StoreError,
    Truncated,
)
from holdfast.core.names import check_key
from holdfast.stores.base import MAX_WHOLE_BYTES, ObjectInfo, Stream
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.address import RingAddress
from holdfast.stores.peers.client import PeerStore
from holdfast.stores.peers.quorum import Quorum
from holdfast.stores.peers.secret import Secret, find_secret
from holdfast.stores.peers.spreading import Spreading

__all__ = ["RingStore"]

BULK = "bulk"
T = TypeVar("T")
READ_AGAIN = 5  # an object that was replaced while it was looked for


class RingStore:
    """What lies under a prefix in the memories of several services. Thread-safe.

    Survives the loss of fewer than half of them, and of `copies` - 1 at a time. With fewer than a majority every
    operation is refused. A service that comes back after a restart has no part in it.
    """

    appendable = False
    single_writer = False

    def __init__(self, address: RingAddress, *, secret: Secret | None = None) -> None:
        secret = secret or find_secret()
        self.address = address
        self.url = address.url
        self._stores = [
            PeerStore(replace(one, prefix=address.prefix), secret=secret) for one in address.hosts
        ]
        self._quorum = Quorum(self.url, address.prefix, self._stores)

    def __repr__(self) -> str:
        return f"RingStore({self.url!r})"

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self._store(key, data, over=False)

    def create(self, key: str, data: Buffer) -> None:
        self._store(key, [data], over=False)

    def replace(self, key: str, data: Buffer) -> None:
        self._store(key, [data], over=True)

    def append(self, key: str, data: Buffer) -> None:
        check_key(key)
        raise StoreError(f"could not append to {key}: objects of {self.url} cannot grow")

    def write_streams(self, streams: Iterable[Stream]) -> None:
        begun: list[str] = []
        try:
            for stream in streams:
                self._place(self._key(stream.key), self._send(stream), over=stream.over)
                if not stream.over:
                    begun.append(stream.key)
        except BaseException:
            with contextlib.suppress(HoldfastError):  # what stays is reclaimed by the next owner of the run
                self.delete(begun)
            raise

    def _store(self, key: str, data: Sequence[Buffer], *, over: bool) -> None:
        self._key(key)
        size = sum(map(len, data))
        if size <= m.INLINE_BYTES:
            value = m.Value(os.urandom(16), False, size, 0.0, b"".join(data))
        else:
            value = self._send(Stream(key, 0, data, bytes, over))
        self._place(key, value, over=over)

    def _place(self, key: str, value: m.Value, *, over: bool) -> None:
        """Decide that this is the object of a key, and forget the bytes of the one that it takes the place of."""
        before: list[m.Value] = []

        def decide(current: m.Value, now: float) -> tuple[m.Value, HoldfastError | None]:
            before[:] = []
            if current.writer == value.writer:  # a round of ours that seemed to have failed
                return current, None
            if not (current.dead or over):
                return current, AlreadyExists(f"{self.url}: object {key!r} exists already")
            before[:] = [current]
            return _at(value, now), None

        try:
            self._quorum.change(key, decide, f"store {key}")
        except AlreadyExists:
            self._forget([value])
            raise
        self._forget(before)

    def _send(self, stream: Stream) -> m.Value:
        """Send the bytes of an object to as many services as there are to be copies; return where they are."""
        check_key(stream.key)
        there = not self._quorum.value(stream.key, f"look at {stream.key}").dead
        if there and not stream.over:
            raise AlreadyExists(f"{self.url}: object {stream.key!r} exists already")
        present = self._quorum.present()
        name = f"{BULK}/{os.urandom(16).hex()}"
        order = sorted(present, key=lambda i: blake3(f"{stream.key} {i}".encode()).digest())
        size, copies = stream.body_bytes, self.address.copies
        if exact := isinstance(stream.body, Sequence):
            size = sum(map(len, stream.body))
        spreading = Spreading({i: self._stores[i] for i in order}, self._quorum.set_aside)

        def begin(store: PeerStore) -> m.Begin:
            return m.Begin(
                store.place_of(name), "create", os.urandom(16), stream.head_bytes, size, exact=exact
            )

        spreading.send(begin, stream, copies)
        spreading.top_up(name, copies)
        value = m.Value(
            os.urandom(16),
            False,
            spreading.sent_bytes,
            0.0,
            b"",
            name.removeprefix(f"{BULK}/"),
            spreading.done,
        )
        if len(spreading.done) < copies:
            self._forget([value])
            raise spreading.refusal(
                f"{self.url}: {stream.key} would have {len(spreading.done)} copies; {copies} are wanted"
            )
        return value

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        def act(store: PeerStore | None, value: m.Value) -> bytes:
            stop = value.size if end is None else max(start, end)
            if end is None and stop > MAX_WHOLE_BYTES:
                raise InvalidFormat(f"{key}: has {stop} bytes, which no document of a run has")
            if stop > value.size or start > stop:
                raise Truncated(f"{key}: ends after {value.size} bytes; expected {max(start, stop)}")
            return (
                value.data[start:stop] if store is None else store.read(f"{BULK}/{value.bulk}", start, stop)
            )

        return self._reading(key, act)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        def act(store: PeerStore | None, value: m.Value) -> None:
            if start + len(target) > value.size:
                raise Truncated(f"{key}: ends after {value.size} bytes; expected {start + len(target)}")
            if store is None:
                target[:] = value.data[start : start + len(target)]
            else:
                store.read_into(f"{BULK}/{value.bulk}", start, target)

        self._reading(key, act)

    def _reading(self, key: str, act: Callable[[PeerStore | None, m.Value], T]) -> T:
        """Do something with an object at one of the services that hold it."""
        why: StoreError | None = None
        away = False
        for _ in range(READ_AGAIN):
            value = self._value(key)
            if not value.bulk:
                return act(None, value)
            present = self._quorum.present()
            for i in sorted(value.hosts, key=lambda i: i not in present):
                if not 0 <= i < len(self._stores):
                    continue
                try:
                    return act(self._stores[i], value)
                except NotFound as e:  # it was replaced meanwhile
                    why = e
                except StoreError as e:
                    self._quorum.set_aside(i, e)
                    why, away = e, True
        if away:
            raise StoreError(
                f"{self.url}: could not read {key}: a service that holds it does not answer: {why}"
            )
        raise IntegrityError(f"{self.url}: {key} is lost: none of the services that held it has it: {why}")

    def _value(self, key: str) -> m.Value:
        value = self._quorum.value(self._key(key), f"read {key}")
        if value.dead:
            raise NotFound(f"{self.url}: no object {key!r}")
        return value

    def info(self, key: str) -> ObjectInfo:
        value = self._value(key)
        return ObjectInfo(key, value.size, value.time)

    def names(self, prefix: str, after: str = "") -> list[str]:
        return [o.key for o in self.list(prefix) if o.key > after]

    def list(self, prefix: str) -> list[ObjectInfo]:
        if prefix:
            check_key(prefix)
        found = self._quorum.registers(prefix, f"list {prefix or 'it'}")
        return [ObjectInfo(key, size, time) for key, dead, size, time in found if not dead]

    def room(self) -> int | None:
        """Return how much fits into the fullest of the services that are there."""
        rooms = [self._stores[i].room() for i in self._quorum.present()]
        return min((room for room in rooms if room is not None), default=None)

    # ---- deleting ---------------------------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        for key in [self._key(key) for key in keys]:
            if self._quorum.value(key, f"delete {key}").dead:
                continue
            gone: list[m.Value] = []

            def decide(current: m.Value, now: float) -> tuple[m.Value, None]:
                gone[:] = [current]  # noqa: B023 - called in this turn
                return m.Value(), None

            self._quorum.change(key, decide, f"delete {key}")
            self._forget(gone)

    def _forget(self, values: Sequence[m.Value]) -> None:
        """Free the bytes of what is no object any more, where they can be reached; `sweep` finds the rest."""
        for value in values:
            for i in value.hosts if value.bulk else ():
                if i in self._quorum.present():
                    with contextlib.suppress(StoreError):
                        self._stores[i].delete([f"{BULK}/{value.bulk}"])

    def sweep(self, before: float) -> None:
        """Free bytes that were sent before a time by writers that died before it was decided what they are."""
        values = [self._quorum.value(o.key, "sweep") for o in self.list("")]
        needed = {f"{BULK}/{value.bulk}" for value in values}
        for i in self._quorum.present():
            left = [o.key for o in self._stores[i].list(BULK) if o.modified < before and o.key not in needed]
            self._stores[i].delete(left)

    def _key(self, key: str) -> str:
        self._stores[0].place_of(key)
        return key


def _at(value: m.Value, time: float) -> m.Value:
    return msgspec.structs.replace(value, time=time)
