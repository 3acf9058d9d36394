"""The service: holds objects in memory for those who know the secret.

Each connection has a thread. Whatever a connection sends, it costs that connection alone, and of a stranger no more
than a few bytes for a few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from types import TracebackType

from holdfast.core.errors import HoldfastError, StoreError
from holdfast.stores.peers.address import PeerAddress
from holdfast.stores.peers.conversation import Conversation
from holdfast.stores.peers.handshake import INSTANCE_BYTES, Refused, answer
from holdfast.stores.peers.secret import Secret, find_secret
from holdfast.stores.peers.shelf import Shelf
from holdfast.stores.peers.votes import Votes

__all__ = ["PeerService", "keep_alive"]

logger = logging.getLogger("holdfast")

HANDSHAKE_SECONDS = 5.0
FRAME_SECONDS = 60.0
MAX_STRANGERS = 64  # in the handshake at once; the oldest makes room
MAX_CONNECTIONS = 512
MAX_NAMED = 256  # hosts whose refusal is a warning once
STOP_SECONDS = 5.0
_PROBE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


def keep_alive(sock: socket.socket) -> None:
    """Have a connection fail within half a minute when the other machine is gone, and send small frames at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class PeerService:
    """Serves at most `memory_bytes` of this process's memory at a host and port; port 0 is any free one.

    It serves from when the context is entered, or `start` is called, and forgets everything when it stops.

    Raises:
        StoreError: nobody can listen there.
        PolicyError: there is no secret in the environment, and none was given.
    """

    def __init__(
        self,
        host: str,
        port: int,
        memory_bytes: int,
        *,
        secret: Secret | None = None,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        frame_seconds: float = FRAME_SECONDS,
    ) -> None:
        self._secret = secret or find_secret()
        self._seconds = (handshake_seconds, frame_seconds)
        self.instance = os.urandom(INSTANCE_BYTES)
        self.shelf = Shelf(memory_bytes)
        self._votes = Votes(self.shelf, self.instance)
        self._lock = threading.Lock()
        self._strangers: dict[socket.socket, None] = {}
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._named: set[str] = set()
        self._stopping = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listening = socket.create_server((host, port), family=family, backlog=128)
        except OSError as e:
            place = PeerAddress(host, port).place
            raise StoreError(f"cannot serve at {place}: {e.strerror or e}; give another --bind") from None
        self.address = PeerAddress(host, int(self._listening.getsockname()[1]))
        self._accepting = threading.Thread(target=self._accept, name="holdfast-peers", daemon=True)

    @property
    def url(self) -> str:
        """Where it is reached, if its host is a name that others can use."""
        return self.address.url

    def __enter__(self) -> PeerService:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to serve."""
        self._accepting.start()

    def stop(self) -> None:
        """End every connection and forget everything."""
        with self._lock:
            self._stopping = True
            threads = list(self._connections.values())
            for sock in self._connections:
                _hang_up(sock)
        _hang_up(self._listening)
        self._listening.close()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in (self._accepting, *threads):
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        self.shelf = Shelf(0)
        self._votes = Votes(self.shelf, b"")

    # ---- connections ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, whom = self._listening.accept()
            except OSError as e:
                if self._is_stopping():
                    return
                logger.warning("peers at %s: a connection was not accepted: %s", self.address.place, e)
                time.sleep(0.1)  # out of descriptors, most likely: some will be closed
                continue
            self._take_on(sock, str(whom[0]))

    def _is_stopping(self) -> bool:
        return self._stopping

    def _take_on(self, sock: socket.socket, whom: str) -> None:
        thread = threading.Thread(target=self._serve, args=(sock, whom), name="holdfast-peer", daemon=True)
        if len(self._connections) >= MAX_CONNECTIONS:  # only this thread adds to them
            sock.close()
            self._name(whom, f"turned away: {MAX_CONNECTIONS} connections are open, and no more are taken")
            return
        with self._lock:
            if self._stopping:
                sock.close()
                return
            while len(self._strangers) >= MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                _hang_up(oldest)
            self._strangers[sock] = None
            self._connections[sock] = thread
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._forget(sock)

    def _serve(self, sock: socket.socket, whom: str) -> None:
        try:
            keep_alive(sock)
            handshake, frame = self._seconds
            channel = answer(sock, self._secret, self.instance, seconds=handshake, frame_seconds=frame)
            with self._lock:
                self._strangers.pop(sock, None)
            Conversation(channel, self.shelf, self._votes).run()
        except Refused as e:
            self._name(whom, f"refused: {e}")
        except (OSError, HoldfastError) as e:
            known = sock not in self._strangers
            self._name(whom, str(e)) if not known else logger.info("peer %s: connection ended: %s", whom, e)
        except Exception as e:  # noqa: BLE001 - a connection never ends the service
            logger.error("peer %s: unexpected %s; the connection was closed", whom, type(e).__name__)
        finally:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(sock, None)
            self._connections.pop(sock, None)
        sock.close()

    def _name(self, whom: str, why: str) -> None:
        """Tell of a stranger, once for each host: one that knocks all day must not fill the log."""
        if self._stopping:
            return
        with self._lock:
            new = whom not in self._named and len(self._named) < MAX_NAMED
            if new:
                self._named.add(whom)
        logger.log(
            logging.WARNING if new else logging.DEBUG, "peers at %s: %s: %s", self.address.place, whom, why
        )


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
