"""A store in the memory of another machine, which `holdfast peer serve` gives."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from holdfast.core.buffers import Buffer
from holdfast.core.errors import HoldfastError, InvalidFormat, PermissionDenied, StoreError
from holdfast.core.names import check_key
from holdfast.stores.base import MAX_WHOLE_BYTES, ObjectInfo, Stream
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.address import PeerAddress
from holdfast.stores.peers.handshake import Refused, introduce
from holdfast.stores.peers.secret import Secret, find_secret
from holdfast.stores.peers.service import keep_alive
from holdfast.stores.peers.wire import DATA, DOCUMENT, HEAD, Channel, Garbled, frames

__all__ = ["PeerStore"]

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0  # a service works in memory: one that takes longer is not there
IDLE_CHANNELS = 8
TOKEN_BYTES = 16
DELETE_BYTES = 512 << 10  # of keys in one request

T = TypeVar("T")


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
        self._secret = secret or find_secret()
        self._seconds = answer_seconds
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._pid = os.getpid()
        self._instance: bytes | None = None
        weakref.finalize(self, _close_all, self._idle)

    def __repr__(self) -> str:
        return f"PeerStore({self.url!r})"

    # ---- connections ----------------------------------------------------------------------------------------------

    def _connect(self) -> Channel:
        place = self.address.place
        try:
            sock = socket.create_connection((self.address.host, self.address.port), CONNECT_SECONDS)
        except OSError as e:
            raise StoreError(
                f"{self.url}: no service answers at {place} ({e.strerror or e}); start `holdfast peer serve` there"
            ) from None
        try:
            keep_alive(sock)
            channel, instance = introduce(
                sock, self._secret, seconds=CONNECT_SECONDS, frame_seconds=self._seconds
            )
        except Refused as e:
            sock.close()
            raise PermissionDenied(
                f"{self.url}: the service at {place} was not believed, or did not believe us: {e}"
            ) from None
        except OSError as e:
            sock.close()
            raise StoreError(f"{self.url}: {place} did not answer as a service of peers does: {e}") from None
        with self._lock:
            known = self._instance = self._instance or instance
        if known != instance:
            channel.close()
            raise StoreError(
                f"{self.url}: the service at {place} was restarted and has lost what it held; start the program again, "
                "which goes on from another place that holds the run"
            )
        return channel

    def _take(self) -> tuple[Channel, bool]:
        """Return a channel, and whether it was used before."""
        with self._lock:
            if self._pid != os.getpid():  # the parent's connections: what we sent there would garble them
                self._pid = os.getpid()
                _close_all(self._idle)
            while self._idle:
                channel = self._idle.pop()
                if not _has_news(channel):
                    return channel, True
                channel.close()  # nothing is expected: it was closed
        return self._connect(), False

    def _give(self, channel: Channel) -> None:
        with self._lock:
            if len(self._idle) < IDLE_CHANNELS:
                self._idle.append(channel)
                return
        channel.close()

    @contextlib.contextmanager
    def _speaking(self, channel: Channel, doing: str) -> Iterator[None]:
        """Close the channel on any failure, but that which the service tells of, and say it in our words."""
        try:
            yield
        except _Told as told:
            self._give(channel)
            raise told.error from None
        except HoldfastError:
            channel.close()
            raise
        except OSError as e:
            channel.close()
            raise _Broken(
                f"{self.url}: the connection failed; could not {doing}: {e.strerror or e}"
            ) from None
        except BaseException:
            channel.close()
            raise
        else:
            self._give(channel)

    def _again(self, doing: str, act: Callable[[Channel], T]) -> T:
        """Do what has the same effect twice as once, a second time on a new connection when one fails."""
        for last in (False, True):
            channel, _ = self._take()
            try:
                with self._speaking(channel, doing):
                    return act(channel)
            except _Broken as e:
                if last:
                    raise StoreError(str(e)) from None
        raise AssertionError

    def _hear(self, channel: Channel) -> m.Answer:
        answer = m.decode_answer(channel.receive_document(self._seconds))
        if isinstance(answer, m.Failed):
            raise _Told(answer.rebuilt(self.url))
        return answer

    def _ask(self, request: m.Request, doing: str) -> m.Answer:
        def act(channel: Channel) -> m.Answer:
            channel.send(DOCUMENT, [m.encode(request)])
            return self._hear(channel)

        return self._again(doing, act)

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
        place, token, size = self._key(key), os.urandom(TOKEN_BYTES), sum(map(len, data))
        doing = f"{mode} {key}"
        if size <= m.INLINE_BYTES:
            self._ask(m.Put(place, mode, token, b"".join(data)), doing)
            return
        begin = m.Begin(place, mode, token, 0, size, exact=True)
        self._again(doing, lambda channel: self._upload(channel, begin, data, lambda: b""))

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
        begin = m.Begin(
            self._key(stream.key),
            "replace" if stream.over else "create",
            os.urandom(TOKEN_BYTES),
            stream.head_bytes,
            size,
            exact=exact,
        )
        channel, _ = self._take()
        try:
            with self._speaking(channel, f"write {stream.key}"):
                self._upload(channel, begin, body, stream.head)
        except _Broken as e:
            raise StoreError(str(e)) from None

    def _upload(
        self, channel: Channel, begin: m.Begin, body: Iterable[Buffer], head: Callable[[], Buffer]
    ) -> None:
        channel.send(DOCUMENT, [m.encode(begin)])
        self._hear(channel)
        for frame in frames(body):
            if _has_news(channel):  # it refuses the rest
                self._end_refused(channel)
            channel.send(DATA, frame)
        for frame in frames([head()]):
            channel.send(HEAD, frame)
        channel.send(DOCUMENT, [m.encode(m.End())])
        self._hear(channel)

    def _end_refused(self, channel: Channel) -> None:
        """Raise what a service says in the middle of an object."""
        try:
            self._hear(channel)
        except _Told:
            channel.send(DOCUMENT, [m.encode(m.End(whole=False))])
            raise
        raise Garbled("an answer that nothing was asked for")

    # ---- reading --------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        request = m.Read(self._key(key), start, end if end is None else max(start, end))

        def act(channel: Channel) -> bytes:
            size = self._announced(channel, request)
            if end is None and start + size > MAX_WHOLE_BYTES:
                raise InvalidFormat(f"{key}: has {start + size} bytes, which no document of a run has")
            target = bytearray(size)
            _fill(channel, memoryview(target), self._seconds)
            return bytes(target)

        return self._again(f"read {key}", act)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        request = m.Read(self._key(key), start, start + len(target))

        def act(channel: Channel) -> None:
            if self._announced(channel, request) != len(target):
                raise Garbled("another number of bytes than was asked for")
            _fill(channel, target.cast("B"), self._seconds)

        self._again(f"read {key}", act)

    def _announced(self, channel: Channel, request: m.Read) -> int:
        channel.send(DOCUMENT, [m.encode(request)])
        answer = self._hear(channel)
        if not isinstance(answer, m.Sized) or (
            request.end is not None and answer.size != request.end - request.start
        ):
            raise Garbled("an answer to another question")
        return answer.size

    def info(self, key: str) -> ObjectInfo:
        answer = self._ask(m.Info(self._key(key)), f"look at {key}")
        if not isinstance(answer, m.Listed) or len(answer.objects) != 1:
            raise StoreError(f"{self.url}: the service answered another question")
        return self._ours(answer.infos()[0])

    def names(self, prefix: str, after: str = "") -> list[str]:
        return [o.key for o in self._listed(prefix, after)]

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [*self._listed(prefix, "")]

    def _listed(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        place = self._key(prefix) if prefix else self.address.prefix
        last = (f"{self.address.prefix}/{after}" if self.address.prefix else after) if after else ""
        more = True
        while more:
            answer = self._ask(m.List(place, last), f"list {prefix or 'it'}")
            if not isinstance(answer, m.Listed) or (answer.more and not answer.objects):
                raise StoreError(f"{self.url}: the service answered another question")
            found = answer.infos()
            yield from map(self._ours, found)
            more, last = answer.more, found[-1].key if found else ""

    def room(self) -> int | None:
        answer = self._ask(m.Room(), "ask for its room")
        return answer.size if isinstance(answer, m.Sized) else None

    def sweep(self, before: float) -> None:
        """Do nothing: an object that is half sent goes with its connection."""

    def delete(self, keys: Sequence[str]) -> None:
        batch: list[str] = []
        size = 0
        for key in map(self._key, keys):
            if len(batch) == m.PAGE_KEYS or size + len(key) > DELETE_BYTES:
                self._ask(m.Delete(batch), "delete")
                batch, size = [], 0
            batch.append(key)
            size += len(key)
        if batch:
            self._ask(m.Delete(batch), "delete")

    def _key(self, key: str) -> str:
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


class _Broken(Exception):
    """The connection failed; whether the request was carried out is not known."""


class _Told(Exception):
    """The service said no; the connection is fine."""

    def __init__(self, error: HoldfastError) -> None:
        super().__init__(str(error))
        self.error = error


def _close_all(channels: list[Channel]) -> None:
    while channels:
        channels.pop().close()


def _has_news(channel: Channel) -> bool:
    """Return whether something came, or the other side hung up."""
    poll = select.poll()
    poll.register(channel.socket, select.POLLIN)
    return bool(poll.poll(0))


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
