"""What trainer and writer process say to each other: JSON messages with a length before them, over a socket.

Trainer: Open, then for each save a Begin (with the arena's file descriptor when it is a new one) followed by Copied as
the copy comes along, or Aborted; at last Bye. Writer: Done or Failed for each Begin, in order.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from holdfast.catalog.lease import LeaseDoc
from holdfast.core import errors
from holdfast.core.errors import HoldfastError, SaveFailed
from holdfast.distributed.words import Company
from holdfast.format.datafile import StoredTensor
from holdfast.saving.image import Image, PartImage
from holdfast.saving.job import Committed, Job

__all__ = [
    "Aborted",
    "Begin",
    "Bye",
    "Copied",
    "Done",
    "Failed",
    "Inbox",
    "Open",
    "PartMessage",
    "Told",
    "framed",
    "send",
]

_LENGTH = struct.Struct("<Q")
_READ_BYTES = 1 << 20


class Open(msgspec.Struct, tag=True):
    """Commit to this store under this lease from now on, and sign with this key (unencrypted; empty for none); in
    company, as one of several ranks."""

    url: str
    lease: LeaseDoc
    key: bytes = b""
    company: Company | None = None

    def __repr__(self) -> str:
        return f"Open({self.url!r})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("url", self.url)]


class PartMessage(msgspec.Struct):
    """A part of an image; `tensors` is left out while they are laid out as in the part of this name before."""

    kind: str
    aliases: dict[str, str]
    tensors: list[StoredTensor] | None
    offset: int
    size: int


class Begin(msgspec.Struct, tag=True):
    """Carry this job out. The image lies in the memory of the job before, or in one whose descriptor comes along.
    `trees` are the values of those parts that have others than before."""

    job: Job
    parts: dict[str, PartMessage]
    trees: dict[str, msgspec.Raw]
    new_memory: bool


class Copied(msgspec.Struct, tag=True):
    """The image's first `end` bytes are there."""

    end: int


class Aborted(msgspec.Struct, tag=True):
    """The image will never be whole."""

    why: str


class Bye(msgspec.Struct, tag=True):
    """No further job will come. `failed`: because of an error, so that the trainer may be started again."""

    failed: bool = False


class Done(msgspec.Struct, tag=True):
    """The job is committed."""

    committed: Committed


class Failed(msgspec.Struct, tag=True):
    """The job failed with an error of this class, made from these arguments."""

    error: str
    arguments: list[int | str | None]

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """Return what tells the other side of an error."""
        plain = all(isinstance(a, (int, str, type(None))) for a in error.args)
        if isinstance(error, HoldfastError) and plain:
            return cls(type(error).__name__, list(error.args))
        return cls(SaveFailed.__name__, [f"{type(error).__name__}: {error}"])

    def rebuilt(self) -> HoldfastError:
        """Return the error."""
        kind = getattr(errors, self.error) if self.error in errors.__all__ else SaveFailed
        found: HoldfastError = kind(*self.arguments)
        return found


Message = Open | Begin | Copied | Aborted | Bye | Done | Failed
_DECODER = msgspec.json.Decoder(Message)


def framed(message: Message) -> bytes:
    """Return a message with its length before it."""
    raw = msgspec.json.encode(message)
    return _LENGTH.pack(len(raw)) + raw


def send(sock: socket.socket, message: Message | bytes, fds: Sequence[int] = ()) -> None:
    """Send a message, which may be framed already, and file descriptors with it."""
    frame = message if isinstance(message, bytes) else framed(message)
    if fds:
        sent = socket.send_fds(sock, [frame], list(fds))
        frame = frame[sent:]
    sock.sendall(frame)


class Inbox:
    """Puts the pieces that come out of a socket together to messages; file descriptors gather in `fds`."""

    def __init__(self, sock: socket.socket) -> None:
        self.fds: list[int] = []
        self._sock = sock
        self._data = bytearray()

    def receive(self) -> list[Message] | None:
        """Return the messages that are complete after one more read; None when the other side has hung up."""
        raw, ancillary, _, _ = self._sock.recvmsg(
            _READ_BYTES, socket.CMSG_SPACE(4 * array.array("i").itemsize)
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(data[: len(data) - len(data) % found.itemsize])
                self.fds += found
        if not raw:
            return None
        self._data += raw
        messages: list[Message] = []
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                break
            messages.append(
                _DECODER.decode(bytes(self._data[_LENGTH.size : end]))
            )  # value trees stay views of it
            del self._data[:end]
        return messages


@dataclass(slots=True)
class Told:
    """The values and tensors of each part as they were told last: what stays is not told again."""

    trees: dict[str, msgspec.Raw] = field(default_factory=dict)
    tensors: dict[str, list[StoredTensor]] = field(default_factory=dict)

    def shorten(self, image: Image) -> tuple[dict[str, PartMessage], dict[str, msgspec.Raw]]:
        """Return an image's parts as messages, and the values that are new."""
        parts: dict[str, PartMessage] = {}
        for name, part in image.parts.items():
            tensors = None if self.tensors.get(name) is part.tensors else part.tensors
            parts[name] = PartMessage(part.kind, part.aliases, tensors, part.offset, len(part.data))
        trees = {n: p.tree for n, p in image.parts.items() if self.trees.get(n) is not p.tree}
        self.trees = {name: part.tree for name, part in image.parts.items()}
        self.tensors = {name: part.tensors for name, part in image.parts.items()}
        return parts, trees

    def expand(self, begin: Begin, memory: memoryview) -> dict[str, PartImage]:
        """Return the parts that a message describes, over this memory."""
        parts = begin.parts
        self.trees = {n: begin.trees[n] if n in begin.trees else self.trees[n] for n in parts}
        self.tensors = {n: self.tensors[n] if p.tensors is None else p.tensors for n, p in parts.items()}
        return {
            name: PartImage(
                self.trees[name], part.kind, part.aliases, self.tensors[name],
                memory[part.offset : part.offset + part.size], part.offset,
            )
            for name, part in parts.items()
        }  # fmt: skip
