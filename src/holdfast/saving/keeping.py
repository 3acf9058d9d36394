"""Memory that outlives its trainer: `python -m holdfast.saving.keeping`.

When a trainer has died, its last snapshot still lies in the arena, and the writer has made it a checkpoint. A process
that does nothing else keeps that memory for a while, and hands it to whoever takes the run up on this machine: a
restart need not read from the disk what is in memory. What is taken for a checkpoint's bytes is verified by its
digests, as after a rollback.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from holdfast.core.errors import HoldfastError
from holdfast.core.machine import available_memory
from holdfast.core.memory import Memory
from holdfast.core.processes import start_module
from holdfast.saving.image import Image
from holdfast.saving.job import Job
from holdfast.saving.wire import Begin, Inbox, Told, framed, send

__all__ = ["Kept", "hand_over", "keep", "main", "take_over"]

logger = logging.getLogger("holdfast")

KEEP_SECONDS = 60.0
LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 10.0  # with the other side, once it is there
_CREDENTIALS = struct.Struct("3i")  # of struct ucred: process, user, group


@dataclass(frozen=True, slots=True)
class Kept:
    """What lies in memory that is kept, and the job that made a checkpoint of it."""

    job: Job
    image: Image
    memory: Memory


def keep(kept: Kept, rank: int, seconds: float | None = None) -> subprocess.Popen[bytes]:
    """Have memory kept by a process of its own, which ends once it is handed over, after so many seconds (by default
    `KEEP_SECONDS`), or when memory gets short."""
    run = kept.job.manifest.run
    take_over(run, rank)  # a rest of an earlier trainer, which nobody asked for
    words = os.memfd_create("holdfast-kept")
    with socket.socket(socket.AF_UNIX) as waiting, open(words, "r+b") as file:
        waiting.bind(_address(run, rank))
        waiting.listen(1)
        file.write(framed(Begin(kept.job, *Told().shorten(kept.image), new_memory=True)))
        file.flush()
        fds = [waiting.fileno(), words, kept.memory.fd]
        return start_module(
            "holdfast.saving.keeping", *fds, KEEP_SECONDS if seconds is None else seconds, fds=fds
        )


def take_over(run: str, rank: int) -> Kept | None:
    """Return the memory that is kept for a run on this machine, if there is any; the keeper ends with that."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        try:
            sock.connect(_address(run, rank))
            if not _is_ours(sock):
                return None
            inbox = Inbox(sock)
            for message in _heard(inbox):
                if isinstance(message, Begin) and inbox.fds:
                    memory = Memory.of(inbox.fds.pop(0))
                    image = Image(Told().expand(message, memory.view), None, memory)
                    return Kept(message.job, image, memory)
        except (OSError, ValueError, LookupError, HoldfastError) as e:  # of an older version, perhaps
            logger.debug("no memory of an earlier trainer is taken over: %s", e)
    return None


def _heard(inbox: Inbox) -> Iterator[object]:
    while (found := inbox.receive()) is not None:
        yield from found


def _address(run: str, rank: int) -> str:
    """Return a name outside of the file system, that is gone when nobody listens any more."""
    name = hashlib.blake2b(f"{os.getuid()} {rank} {run}".encode(), digest_size=16).hexdigest()
    return f"\0holdfast-{name}"


def _is_ours(sock: socket.socket) -> bool:
    """Return whether the other side is a process of the same user."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.getuid())


def hand_over(waiting: socket.socket, words: int, memory: int, seconds: float) -> bool:
    """Give who asks first `words` and `memory`, both file descriptors; return False when nobody did in time, or memory
    got short."""
    end = time.monotonic() + seconds
    size = os.fstat(memory).st_size
    while (left := end - time.monotonic()) > 0:
        room = available_memory()
        if room is not None and room < size:  # others need it more
            return False
        waiting.settimeout(min(left, LOOK_SECONDS))
        try:
            asking, _ = waiting.accept()
        except TimeoutError:
            continue
        with asking:
            if _is_ours(asking):
                waiting.close()  # who has been given it finds the name free
                asking.settimeout(PATIENCE_SECONDS)
                with contextlib.suppress(OSError):  # who has asked is gone
                    send(asking, os.pread(words, os.fstat(words).st_size, 0), [memory])
                return True
    return False


def main() -> None:
    """Keep memory: the arguments are the file descriptors of a socket to listen on, of what is said of the memory, and
    of the memory itself, and for how many seconds."""
    listening, words, memory = map(int, sys.argv[1:4])
    hand_over(socket.socket(fileno=listening), words, memory, float(sys.argv[4]))


if __name__ == "__main__":
    main()
