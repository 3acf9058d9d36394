"""The writer process: `python -m holdfast.saving.server`. Imports no framework and none of the user's code.

It shares the arena with the trainer. When the trainer is killed it finishes what was snapshotted, has the memory kept
for the next one, and then ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from holdfast.catalog.lease import Lease
from holdfast.core.clock import SystemTime
from holdfast.core.errors import SaveFailed
from holdfast.core.memory import Memory
from holdfast.distributed.meeting import Meeting
from holdfast.format.signing import SigningKey
from holdfast.saving.committing import committing
from holdfast.saving.image import Image
from holdfast.saving.job import Committing
from holdfast.saving.keeping import Kept, keep
from holdfast.saving.progress import Progress
from holdfast.saving.wire import (
    Aborted,
    Begin,
    Bye,
    Copied,
    Done,
    Failed,
    Inbox,
    Message,
    Open,
    Told,
    send,
)
from holdfast.stores import open_store

__all__ = ["Server", "main"]

NICENESS = 10


class Server:
    """Takes jobs from the socket on a thread of its own, and carries them out one after the other."""

    def __init__(self, sock: socket.socket, trainer: int) -> None:
        self._sock = sock
        self._inbox = Inbox(sock)
        self._trainer = trainer
        self._orders: queue.SimpleQueue[tuple[Begin, Memory | None, Progress] | None] = queue.SimpleQueue()
        self._copying: Progress | None = None
        self._memory: Memory | None = None
        self._lease: Lease | None = None
        self._committing: Committing | None = None
        self._meeting: Meeting | None = None
        self._error: BaseException | None = None
        self._kept: Kept | None = None  # the last checkpoint, while it lies in memory
        self._deserted = False  # the trainer has died

    def run(self) -> None:
        """Serve until the trainer says goodbye, or is gone and its last snapshot is durable."""
        threading.Thread(target=self._listen, name="holdfast-listen", daemon=True).start()
        told = Told()
        while (order := self._orders.get()) is not None:
            begin, memory, progress = order
            if self._kept is not None and self._kept.memory is memory:
                self._kept = None
            view = memory.view if memory is not None else memoryview(b"")
            answer: Message
            try:
                image = Image(told.expand(begin, view), progress)
                assert self._committing is not None
                answer = Done(self._committing.carry_out(begin.job, image))
                if memory is not None and not begin.job.more:
                    self._kept = Kept(begin.job, image, memory)
            except Exception as e:  # noqa: BLE001 - told to the trainer, who raises it
                answer = Failed.of(e)
            with contextlib.suppress(OSError):  # the trainer is gone: nobody is left to be told
                send(self._sock, answer)
        if self._error is not None:
            raise self._error
        if self._deserted and self._kept is not None:
            with contextlib.suppress(OSError):  # it is on the disk
                keep(self._kept, self._meeting.ranks.rank if self._meeting is not None else 0)

    def _listen(self) -> None:
        try:
            for message in self._messages():
                if isinstance(message, Bye):
                    self._deserted = message.failed
                    return
                self._take(message)
            self._deserted = True
            if self._meeting is not None:
                self._meeting.alone_since = time.monotonic()
            if self._lease is not None and (self._meeting is None or self._meeting.ranks.leads):
                self._lease.start_heartbeat()  # the trainer's has ended with it
        except BaseException as e:  # noqa: BLE001 - raised by `run`, which the process ends with
            self._error = e
        finally:
            if self._copying is not None:
                self._copying.fail(SaveFailed("the training process ended while its state was being copied"))
            self._orders.put(None)

    def _messages(self) -> Iterator[Message]:
        """Yield what the trainer says, until it is gone.

        A worker that the trainer forked may keep the socket open after it: the trainer itself is watched too.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        with contextlib.suppress(AttributeError, OSError):
            poll.register(os.pidfd_open(self._trainer), select.POLLIN)
        patience = None if os.getppid() == self._trainer else 0  # it may have ended before we came to look
        while True:
            ready = [fd for fd, _ in poll.poll(patience)]
            if self._sock.fileno() not in ready:
                return  # it ended, and everything that it said was read
            found = self._inbox.receive()
            if found is None:
                return
            yield from found

    def _take(self, message: Message) -> None:
        if isinstance(message, Open):
            store = open_store(message.url)
            self._lease = Lease(store, message.lease, SystemTime())
            key = SigningKey.of_der(message.key) if message.key else None
            self._meeting = None if message.company is None else Meeting.of(store, message.company)
            self._committing = committing(store, self._lease, key, self._meeting)
        elif isinstance(message, Begin):
            if message.new_memory:
                self._memory = None  # the one before may go
                self._memory = Memory.of(self._inbox.fds.pop(0))
            self._copying = Progress(max((p.offset + p.size for p in message.parts.values()), default=0))
            self._orders.put((message, self._memory, self._copying))
        elif isinstance(message, Copied) and self._copying is not None:
            self._copying.advance(message.end)
        elif isinstance(message, Aborted) and self._copying is not None:
            self._copying.fail(SaveFailed(message.why))


def main() -> None:
    """Serve the trainer at the other end of the socket whose file descriptor is the first argument."""
    # Meant for the trainer, which decides. Slurm and systemd send them to every process of a job.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    Server(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()


if __name__ == "__main__":
    main()
