"""The same bytes to several services at once, of which some may fail on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from holdfast.core.buffers import Buffer
from holdfast.core.errors import OutOfSpace, StoreError
from holdfast.stores.base import Stream
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.client import PeerStore
from holdfast.stores.peers.wire import DATA, HEAD, frames

__all__ = ["Spreading"]

COPY_BYTES = 16 << 20
Send: TypeAlias = Callable[[int, list[memoryview]], None]


class Spreading:
    """Sends one object to services; `failed` is told which of them failed, and why.

    Its bytes can be taken once, so nothing is begun again: those that are left get the rest, and `top_up` copies from
    them.
    """

    def __init__(self, stores: dict[int, PeerStore], failed: Callable[[int, StoreError], None]) -> None:
        self.done: list[int] = []
        self.sent_bytes = 0
        self._stores = stores
        self._failed = failed
        self._why: StoreError | None = None

    def send(self, begin: Callable[[PeerStore], m.Begin], stream: Stream, wanted: int) -> None:
        """Send the object to `wanted` services, the first that take it on; `done` are those that have it whole then.

        Raises:
            StoreError: none has.
        """
        doing = f"write {stream.key}"
        sending: dict[int, tuple[contextlib.ExitStack, Send]] = {}
        for i, store in self._stores.items():
            if len(sending) == wanted:
                break
            stack = contextlib.ExitStack()
            with self._failing(i):
                sending[i] = stack, stack.enter_context(store.link.sending(begin(store), doing))
        try:
            for kind, frame in _whole(stream):
                self.sent_bytes += sum(map(len, frame))
                self._pass_on(sending, kind, frame)
                self._raise_without(sending)
        except BaseException as e:
            for stack, _ in sending.values():
                with contextlib.suppress(type(e)):
                    stack.__exit__(type(e), e, e.__traceback__)
            raise
        for i, (stack, _) in sending.items():
            with self._failing(i):
                stack.close()
                self.done.append(i)
        self._raise_without(self.done)

    def _pass_on(
        self, sending: dict[int, tuple[contextlib.ExitStack, Send]], kind: int, frame: list[memoryview]
    ) -> None:
        """Send a frame to all; who fails is left out from then on."""
        for i, (stack, send) in [*sending.items()]:
            try:
                send(kind, frame)
            except Exception as e:  # noqa: BLE001 - the connection's, which its own context puts into our words
                del sending[i]
                with self._failing(i):
                    stack.__exit__(type(e), e, e.__traceback__)

    def top_up(self, key: str, wanted: int) -> None:
        """Copy the object from a service that has it to others, until there are as many as wanted or no more."""
        for i, store in self._stores.items():
            if len(self.done) >= wanted:
                return
            if i not in self.done:
                source = self._stores[self.done[0]]
                pieces = _read(source, key, self.sent_bytes)
                with self._failing(i):
                    store.write_streams([Stream(key, 0, pieces, bytes, body_bytes=self.sent_bytes)])
                    self.done.append(i)

    def refusal(self, what: str) -> StoreError:
        """Return the error that says so, of the kind that the last service that failed gave."""
        kind = OutOfSpace if isinstance(self._why, OutOfSpace) else StoreError
        return kind(what if self._why is None else f"{what}: {self._why}")

    @contextlib.contextmanager
    def _failing(self, index: int) -> Iterator[None]:
        try:
            yield
        except StoreError as e:
            self._why = e
            if not isinstance(e, OutOfSpace):
                self._failed(index, e)

    def _raise_without(self, any_left: object) -> None:
        if not any_left:
            raise self._why or StoreError("none of the services of the ring is there")


def _whole(stream: Stream) -> Iterator[tuple[int, list[memoryview]]]:
    for frame in frames(stream.body):
        yield DATA, frame
    for frame in frames(_head(stream)):
        yield HEAD, frame


def _head(stream: Stream) -> Iterable[Buffer]:
    yield stream.head()


def _read(store: PeerStore, key: str, size: int) -> Iterator[bytes]:
    for at in range(0, size, COPY_BYTES):
        yield store.read(key, at, min(size, at + COPY_BYTES))
