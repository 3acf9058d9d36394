"""Connections to one service: kept, checked, and opened again; each request on one of them at a time."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from holdfast.core.errors import HoldfastError, PermissionDenied, StoreError
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.address import PeerAddress
from holdfast.stores.peers.handshake import Refused, introduce
from holdfast.stores.peers.secret import Secret
from holdfast.stores.peers.service import keep_alive
from holdfast.stores.peers.wire import DOCUMENT, Channel, Garbled

__all__ = ["Link"]

CONNECT_SECONDS = 3.0
IDLE_CHANNELS = 8

T = TypeVar("T")


class Link:
    """What speaks to the service at an address. Thread-safe, and usable in a forked child.

    It belongs to the instance of the service that it first spoke to, and refuses another: that has lost everything.
    """

    def __init__(self, address: PeerAddress, secret: Secret, answer_seconds: float) -> None:
        self.address = address
        self.url = address.url
        self._secret = secret
        self._seconds = answer_seconds
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._pid = os.getpid()
        self._instance: bytes | None = None
        weakref.finalize(self, _close_all, self._idle)

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
            raise StoreError(
                f"{self.url}: {place} did not answer as a service of peers does: {e}; if it is one, its log says why"
            ) from None
        with self._lock:
            known = self._instance = self._instance or instance
        if known != instance:
            channel.close()
            raise StoreError(
                f"{self.url}: the service at {place} was restarted and has lost what it held; start the program again, "
                "which goes on from another place that holds the run"
            )
        return channel

    def _take(self) -> Channel:
        """Return a channel that nobody uses."""
        with self._lock:
            if self._pid != os.getpid():  # the parent's connections: what we sent there would garble them
                self._pid = os.getpid()
                _close_all(self._idle)
            while self._idle:
                channel = self._idle.pop()
                if not _has_news(channel):
                    return channel
                channel.close()  # nothing is expected: it was closed
        return self._connect()

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

    def again(self, doing: str, act: Callable[[Channel], T]) -> T:
        """Do what has the same effect twice as once, a second time on a new connection when one fails."""
        for last in (False, True):
            channel = self._take()
            try:
                with self._speaking(channel, doing):
                    return act(channel)
            except _Broken as e:
                if last:
                    raise StoreError(str(e)) from None
        raise AssertionError

    def hear(self, channel: Channel) -> m.Answer:
        """Return the answer to what was sent on a channel; what the service tells is for `again` to raise."""
        answer = m.decode_answer(channel.receive_document(self._seconds))
        if isinstance(answer, m.Failed):
            raise _Told(answer.rebuilt(self.url))
        return answer

    @property
    def instance(self) -> bytes | None:
        """The instance of the service that this object belongs to, once it has spoken to it."""
        return self._instance

    def ask(self, request: m.Request, doing: str) -> m.Answer:
        """Have the service do what has the same effect twice as once. Raises what it tells, and StoreError."""

        def act(channel: Channel) -> m.Answer:
            channel.send(DOCUMENT, [m.encode(request)])
            return self.hear(channel)

        return self.again(doing, act)

    @contextlib.contextmanager
    def sending(self, begin: m.Begin, doing: str) -> Iterator[Callable[[int, list[memoryview]], None]]:
        """Give what sends the frames of an object, which is whole when the context is left without an error.

        Raises:
            StoreError: of the service, or of the connection. What the context itself raises passes.
        """
        channel = self._take()
        mine: list[BaseException] = []
        try:
            with self._speaking(channel, doing):
                channel.send(DOCUMENT, [m.encode(begin)])
                self.hear(channel)

                def send(kind: int, frame: list[memoryview]) -> None:
                    try:
                        if _has_news(channel):  # it refuses the rest
                            self._end_refused(channel)
                        channel.send(kind, frame)
                    except BaseException as e:
                        mine.append(e)
                        raise

                try:
                    yield send
                except BaseException as e:
                    if e not in mine:
                        raise _Foreign(e) from None
                    raise
                channel.send(DOCUMENT, [m.encode(m.End())])
                self.hear(channel)
        except _Broken as e:
            raise StoreError(str(e)) from None
        except _Foreign as e:
            raise e.error from None

    def _end_refused(self, channel: Channel) -> None:
        """Raise what a service says in the middle of an object."""
        try:
            self.hear(channel)
        except _Told:
            channel.send(DOCUMENT, [m.encode(m.End(whole=False))])
            raise
        raise Garbled("an answer that nothing was asked for")


class _Broken(Exception):
    """The connection failed; whether the request was carried out is not known."""


class _Foreign(Exception):
    """What the body of a stream raised: not ours to translate."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


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
