"""Frames on an authenticated connection.

A frame is a head of 24 bytes (length, kind, authentication code) and a payload of at most MAX_FRAME bytes. The code is
keyed BLAKE3 over the number of the frame, its length and kind, and the payload, under a key of this connection and
direction: a frame that was changed, left out, repeated or made up does not pass.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from blake3 import blake3

from holdfast.core.buffers import Buffer

__all__ = [
    "DATA",
    "DOCUMENT",
    "HEAD",
    "MAX_FRAME",
    "Channel",
    "Closed",
    "Garbled",
    "TooSlow",
    "frames",
    "read_exactly",
]

MAX_FRAME: Final = 1 << 20
DOCUMENT, DATA, HEAD = 1, 2, 3
CODE_BYTES = 16
_SEEN = struct.Struct("<QIB3x")  # number, length, kind
_SENT = struct.Struct("<IB3x")
HEAD_BYTES = _SENT.size + CODE_BYTES
MAX_PIECES = 64  # of one frame; the system takes 1024 at a time


class Closed(ConnectionError):
    """The other side has hung up."""


class Garbled(ConnectionError):
    """What came is no frame of this connection."""


class TooSlow(TimeoutError):
    """What was begun did not come, or was not taken, in time."""


def read_exactly(sock: socket.socket, target: memoryview, deadline: float, *, begun: bool = True) -> None:
    """Fill `target` from a socket before a deadline on the monotonic clock, however it dribbles in.

    Raises:
        Closed: the other side hung up; cleanly only where nothing had `begun`.
        TooSlow: the time is over.
    """
    done = 0
    while done < len(target):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TooSlow("the other side did not send what it had begun in time")
        sock.settimeout(left)
        try:
            got = sock.recv_into(target[done:])
        except TimeoutError:
            raise TooSlow("the other side did not send in time") from None
        if got == 0:
            raise Closed("the other side hung up" + (" in the middle" if done or begun else ""))
        done += got


def frames(pieces: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """Yield the payloads of the frames that pieces make: large ones are cut, small ones put together, none copied."""
    frame: list[memoryview] = []
    room = MAX_FRAME
    for piece in pieces:
        view = memoryview(piece).cast("B")
        at = 0
        while at < len(view):
            part = view[at : at + room]
            frame.append(part)
            at += len(part)
            room -= len(part)
            if not room or len(frame) == MAX_PIECES:
                yield frame
                frame, room = [], MAX_FRAME
    if frame:
        yield frame


class Channel:
    """An authenticated connection. One thread at a time.

    `frame_seconds` is how long a frame may take once it has begun.
    """

    def __init__(
        self, sock: socket.socket, send_key: bytes, receive_key: bytes, frame_seconds: float
    ) -> None:
        self.socket = sock
        self._keys = (send_key, receive_key)
        self._sent = self._received = 0
        self._seconds = frame_seconds
        self._head = memoryview(bytearray(HEAD_BYTES))

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def send(self, kind: int, pieces: Sequence[Buffer], size: int | None = None) -> None:
        """Send a frame whose payload is these pieces, which are at most MAX_PIECES. Raises OSError."""
        size = sum(map(len, pieces)) if size is None else size
        if size > MAX_FRAME:
            raise ValueError(f"a frame of {size} bytes; at most {MAX_FRAME}")
        code = blake3(_SEEN.pack(self._sent, size, kind), key=self._keys[0])
        for piece in pieces:
            code.update(piece)
        self._sent += 1
        head = _SENT.pack(size, kind) + code.digest(CODE_BYTES)
        self._send_all([memoryview(head), *(memoryview(p).cast("B") for p in pieces if len(p))])

    def _send_all(self, views: list[memoryview]) -> None:
        deadline = time.monotonic() + self._seconds
        while views:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TooSlow("the other side did not take what was sent in time")
            self.socket.settimeout(left)
            try:
                sent = self.socket.sendmsg(views)
            except TimeoutError:
                raise TooSlow("the other side did not take what was sent in time") from None
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def receive(
        self, room: Callable[[int, int], Sequence[memoryview]], idle_seconds: float | None
    ) -> tuple[int, int]:
        """Receive a frame; return its kind and length.

        `room` is told kind and length and gives the memory that the payload goes to; it refuses by an exception. What
        lies there counts only when this has returned. The frame may let wait `idle_seconds` for it, for ever with None.

        Raises:
            Closed, Garbled, TooSlow, OSError: the connection is of no use any more.
        """
        self.socket.settimeout(idle_seconds)
        try:
            got = self.socket.recv_into(self._head)
        except TimeoutError:
            raise TooSlow(f"nothing came within {idle_seconds:g} s") from None
        if got == 0:
            raise Closed("the other side hung up")
        deadline = time.monotonic() + self._seconds
        read_exactly(self.socket, self._head[got:], deadline)
        size, kind = _SENT.unpack_from(self._head)
        if size > MAX_FRAME or kind not in (DOCUMENT, DATA, HEAD):
            raise Garbled("a frame that no peer sends")
        code = blake3(_SEEN.pack(self._received, size, kind), key=self._keys[1])
        for part in room(kind, size):
            read_exactly(self.socket, part, deadline)
            code.update(part)
        if not hmac.compare_digest(code.digest(CODE_BYTES), self._head[_SENT.size :]):
            raise Garbled("a frame whose authentication code is wrong: it was changed on the way, or made up")
        self._received += 1
        return kind, size

    def receive_document(self, idle_seconds: float | None) -> bytes:
        """Receive a frame that must be a document."""
        found: list[bytearray] = []

        def room(kind: int, size: int) -> list[memoryview]:
            if kind != DOCUMENT:
                raise Garbled("data where a document belongs")
            found.append(bytearray(size))
            return [memoryview(found[0])]

        self.receive(room, idle_seconds)
        return bytes(found[0])
