"""One authenticated connection of a service: requests in, answers out."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.errors import HoldfastError
from holdfast.core.names import check_key
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.shelf import Shelf, Upload
from holdfast.stores.peers.votes import Votes
from holdfast.stores.peers.wire import DATA, DOCUMENT, HEAD, MAX_FRAME, Channel, Closed, Garbled, frames

__all__ = ["Conversation"]


class Conversation:
    """Answers what comes over a channel until the other side hangs up."""

    def __init__(self, channel: Channel, shelf: Shelf, votes: Votes) -> None:
        self._channel = channel
        self._shelf = shelf
        self._votes = votes

    def run(self) -> None:
        """Return when the other side has hung up.

        Raises:
            OSError: the connection is of no use any more.
        """
        while True:
            try:
                raw = self._channel.receive_document(None)
            except Closed:
                return
            request = m.decode_request(raw)
            try:
                if isinstance(request, m.Begin):
                    self._take_in(request)
                elif isinstance(request, m.Read):
                    self._read(request)
                else:
                    self._say(self._do(request))
            except HoldfastError as e:
                self._say(m.Failed.of(e))

    def _say(self, answer: m.Answer) -> None:
        self._channel.send(DOCUMENT, [m.encode(answer)])

    def _do(self, request: m.Request) -> m.Answer:
        shelf = self._shelf
        match request:
            case m.Put(key, mode, token, data):
                shelf.put(key, mode, token, data)
            case m.Info(key):
                found = shelf.info(key)
                return m.Listed([(found.key, found.size, found.modified)])
            case m.List(prefix, after):
                infos, more = shelf.list(prefix, after, m.PAGE_KEYS)
                return m.Listed([(o.key, o.size, o.modified) for o in infos], more)
            case m.Delete(keys):
                shelf.delete(keys)
            case m.Room():
                return m.Sized(shelf.room())
            case m.Members() | m.Prepare() | m.Accept() | m.Peek() | m.Registers():
                return self._votes.answer(request)
            case _:
                raise Garbled("a request out of turn")
        return m.Fine()

    # ---- large objects ----------------------------------------------------------------------------------------------

    def _read(self, request: m.Read) -> None:
        slices = self._shelf.read(request.key, request.start, request.end)
        self._say(m.Sized(sum(len(view) for _, view in slices)))
        for frame in frames(view for _, view in slices):
            self._channel.send(DATA, frame)

    def _take_in(self, request: m.Begin) -> None:
        """Take an object in, or say at once why not, and then let pass what still comes of it."""
        check_key(request.key)
        intake = _Intake(
            self._shelf.begin(
                request.key,
                request.mode,
                request.token,
                head=request.head,
                body=request.body,
                exact=request.exact,
            )
        )
        self._say(m.Fine())
        told = False
        while True:
            kind, _ = self._channel.receive(intake.room, None)
            if intake.failure is not None and not told:
                told = True
                self._say(m.Failed.of(intake.failure))
            if kind == DOCUMENT:
                break
        end = m.decode_request(bytes(intake.document))
        if not isinstance(end, m.End):
            raise Garbled("a request in the middle of an object")
        if not told:
            if end.whole and intake.upload is not None:
                intake.upload.finish()
            self._say(m.Fine())


class _Intake:
    """Gives the frames of an object their memory."""

    def __init__(self, upload: Upload) -> None:
        self.upload: Upload | None = upload
        self.failure: HoldfastError | None = None
        self.document = bytearray()
        self._waste = memoryview(bytearray(0))

    def room(self, kind: int, size: int) -> Sequence[memoryview]:
        if kind == DOCUMENT:
            self.document = bytearray(size)
            return [memoryview(self.document)]
        if self.upload is not None:
            try:
                return self.upload.room(size, head=kind == HEAD)
            except HoldfastError as e:
                self.failure = e.with_traceback(None)
                self.upload = None  # its memory is free again
        if len(self._waste) < size:
            self._waste = memoryview(bytearray(MAX_FRAME))
        return [self._waste[:size]]
