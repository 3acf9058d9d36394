"""A store in the memory of another machine, which `holdfast peer serve` gives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

from holdfast.core.buffers import Buffer
from holdfast.core.errors import HoldfastError, InvalidFormat, StoreError
from holdfast.core.names import check_key
from holdfast.stores.base import MAX_WHOLE_BYTES, ObjectInfo, Stream
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.address import PeerAddress
from holdfast.stores.peers.link import Link
from holdfast.stores.peers.secret import Secret, find_secret
from holdfast.stores.peers.wire import DATA, DOCUMENT, HEAD, Channel, Garbled, frames

__all__ = ["PeerStore"]

ANSWER_SECONDS = 30.0  # a service works in memory: one that takes longer is not there
TOKEN_BYTES = 16
DELETE_BYTES = 512 << 10  # of keys in one request


class PeerStore:
    """What lies under a prefix in the memory of a service. Thread-safe, and usable in a forked child.

    What is written survives the loss of this machine, and nothing survives the end of the service. A service that was
    restarted in between has lost what it held: then every operation of this object fails, and says so.

    Raises:
        PolicyError: there is no secret in the environment, and none was given.
    """

    appendable = True
    single_writer = False

    def __init__(
        self, address: PeerAddress, *, secret: Secret | None = None, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self.address = address
        self.url = address.url
        self.link = Link(address, secret or find_secret(), answer_seconds)
        self._seconds = answer_seconds

    def __repr__(self) -> str:
        return f"PeerStore({self.url!r})"

    # ---- writing --------------------------------------------------------------------------------------------------

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self._send(key, "create", data)

    def create(self, key: str, data: Buffer) -> None:
        self._send(key, "create", [data])

    def replace(self, key: str, data: Buffer) -> None:
        self._send(key, "replace", [data])

    def append(self, key: str, data: Buffer) -> None:
        self._send(key, "append", [data])

    def _send(self, key: str, mode: m.Mode, data: Sequence[Buffer]) -> None:
        """Store an object whose bytes are all here. A token lets the service know a request that is sent again."""
        place, token, size = self.place_of(key), os.urandom(TOKEN_BYTES), sum(map(len, data))
        doing = f"{mode} {key}"
        if size <= m.INLINE_BYTES:
            self.link.ask(m.Put(place, mode, token, b"".join(data)), doing)
            return
        begin = m.Begin(place, mode, token, 0, size, exact=True)
        with self.link.sending(begin, doing) as send:
            for frame in frames(data):
                send(DATA, frame)

    def write_streams(self, streams: Iterable[Stream]) -> None:
        begun: list[str] = []
        try:
            for stream in streams:
                self._send_stream(stream)
                if not stream.over:
                    begun.append(stream.key)
        except BaseException:
            with contextlib.suppress(HoldfastError):  # what stays is reclaimed by the next owner of the run
                self.delete(begun)
            raise

    def _send_stream(self, stream: Stream) -> None:
        """Send a body as it comes: it can be taken once, so nothing is tried again."""
        body, size = stream.body, stream.body_bytes
        exact = isinstance(body, Sequence)
        if isinstance(body, Sequence):
            size = sum(map(len, body))
        how: m.Mode = "replace" if stream.over else "create"
        begin = m.Begin(
            self.place_of(stream.key), how, os.urandom(TOKEN_BYTES), stream.head_bytes, size, exact=exact
        )
        with self.link.sending(begin, f"write {stream.key}") as send:
            for frame in frames(body):
                send(DATA, frame)
            for frame in frames([stream.head()]):
                send(HEAD, frame)

    # ---- reading --------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        request = m.Read(self.place_of(key), start, end if end is None else max(start, end))

        def act(channel: Channel) -> bytes:
            size = self._announced(channel, request)
            if end is None and start + size > MAX_WHOLE_BYTES:
                raise InvalidFormat(f"{key}: has {start + size} bytes, which no document of a run has")
            target = bytearray(size)
            _fill(channel, memoryview(target), self._seconds)
            return bytes(target)

        return self.link.again(f"read {key}", act)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        request = m.Read(self.place_of(key), start, start + len(target))

        def act(channel: Channel) -> None:
            if self._announced(channel, request) != len(target):
                raise Garbled("another number of bytes than was asked for")
            _fill(channel, target.cast("B"), self._seconds)

        self.link.again(f"read {key}", act)

    def _announced(self, channel: Channel, request: m.Read) -> int:
        channel.send(DOCUMENT, [m.encode(request)])
        answer = self.link.hear(channel)
        if not isinstance(answer, m.Sized) or (
            request.end is not None and answer.size != request.end - request.start
        ):
            raise Garbled("an answer to another question")
        return answer.size

    def info(self, key: str) -> ObjectInfo:
        answer = self.link.ask(m.Info(self.place_of(key)), f"look at {key}")
        if not isinstance(answer, m.Listed) or len(answer.objects) != 1:
            raise StoreError(f"{self.url}: the service answered another question")
        return self._ours(answer.infos()[0])

    def names(self, prefix: str, after: str = "") -> list[str]:
        return [o.key for o in self._listed(prefix, after)]

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [*self._listed(prefix, "")]

    def _listed(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        place = self.place_of(prefix) if prefix else self.address.prefix
        last = (f"{self.address.prefix}/{after}" if self.address.prefix else after) if after else ""
        more = True
        while more:
            answer = self.link.ask(m.List(place, last), f"list {prefix or 'it'}")
            if not isinstance(answer, m.Listed) or (answer.more and not answer.objects):
                raise StoreError(f"{self.url}: the service answered another question")
            found = answer.infos()
            yield from map(self._ours, found)
            more, last = answer.more, found[-1].key if found else ""

    def room(self) -> int | None:
        answer = self.link.ask(m.Room(), "ask for its room")
        return answer.size if isinstance(answer, m.Sized) else None

    def sweep(self, before: float) -> None:
        """Do nothing: an object that is half sent goes with its connection."""

    def delete(self, keys: Sequence[str]) -> None:
        batch: list[str] = []
        size = 0
        for key in map(self.place_of, keys):
            if len(batch) == m.PAGE_KEYS or size + len(key) > DELETE_BYTES:
                self.link.ask(m.Delete(batch), "delete")
                batch, size = [], 0
            batch.append(key)
            size += len(key)
        if batch:
            self.link.ask(m.Delete(batch), "delete")

    def place_of(self, key: str) -> str:
        """Return the key by which the service knows an object."""
        check_key(key)
        place = f"{self.address.prefix}/{key}" if self.address.prefix else key
        if len(place) > m.KEY_CHARS:
            raise InvalidFormat(
                f"store key {key[:120]!r}… has {len(place)} characters; at most {m.KEY_CHARS}"
            )
        return place

    def _ours(self, found: ObjectInfo) -> ObjectInfo:
        cut = len(self.address.prefix) + 1 if self.address.prefix else 0
        return ObjectInfo(found.key[cut:], found.size, found.modified)


def _fill(channel: Channel, target: memoryview, seconds: float) -> None:
    """Receive just as many bytes as fit."""
    done = 0

    def room(kind: int, size: int) -> list[memoryview]:
        if kind != DATA or not 0 < size <= len(target) - done:
            raise Garbled("not the data that was asked for")
        return [target[done : done + size]]

    while done < len(target):
        _, size = channel.receive(room, seconds)
        done += size
