"""The trainer's end of the writer process: start it, tell it of jobs, hear what became of them."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

from holdfast.catalog.checkpoints import entries, read_entry
from holdfast.catalog.keyfiles import PASSPHRASE_VARIABLE
from holdfast.catalog.lease import Lease
from holdfast.core.errors import CommitUnknown, HoldfastError, SaveFailed
from holdfast.core.memory import Memory
from holdfast.core.processes import start_module
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.words import Company
from holdfast.format.signing import SigningKey
from holdfast.saving.image import Image
from holdfast.saving.job import Committed, Job, discard
from holdfast.saving.progress import Progress
from holdfast.saving.rank_job import refuse
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
from holdfast.stores import Store, is_reopenable

__all__ = ["WriterProcess", "can_have_process"]

logger = logging.getLogger("holdfast")

LOOK_MILLISECONDS = 500  # how often a silent writer is looked at
END_SECONDS = 10.0
LAST_WORDS_BYTES = 2000


def can_have_process(store: Store) -> bool:
    """Return whether another process can commit to this store and share memory with this one."""
    able = sys.platform == "linux" and hasattr(os, "memfd_create") and bool(sys.executable)
    return able and not getattr(sys, "frozen", False) and is_reopenable(store)


class WriterProcess:
    """A host in a process of its own. If it dies, the job under way fails, and the next one starts another."""

    def __init__(self) -> None:
        self._sending = threading.Lock()
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        self._stderr = os.memfd_create("holdfast-writer-stderr")
        path = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            self._process = start_module(
                "holdfast.saving.server",
                theirs.fileno(),
                os.getpid(),
                fds=[theirs.fileno()],
                stderr=self._stderr,
                environment={**_without_keys(os.environ), "PYTHONPATH": path},
            )
        self._inbox = Inbox(ours)
        self._heard: deque[Message] = deque()
        self._socket = ours
        self._told = Told()
        self._memory: Memory | None = None
        self._letting_go = weakref.finalize(self, _let_go, ours, self._process, self._stderr)
        self._letting_go.atexit = False  # saves are still waited for then

    @property
    def pid(self) -> int:
        """The process that commits."""
        return self._process.pid

    def start(
        self, store: Store, lease: Lease, key: SigningKey | None = None, company: Company | None = None
    ) -> None:
        """Commit to this store under this lease from now on, and sign with this key; see `Host.start`."""
        self._store, self._lease, self._key, self._company = store, lease, key, company
        self._say(Open(store.url, lease.doc, key.der() if key is not None else b"", company))

    def begin(self, job: Job, image: Image) -> None:
        """Tell the writer of a job, and of each step forward of the copy. The rest is its own doing."""
        if self._process.poll() is not None:
            logger.warning("the writer process had ended (%s); starting another", self._end())
            self._letting_go()
            self._spawn()
            if self._company is None or self._company.rank == 0:
                self._lease.change_writer(self.pid)
            self.start(self._store, self._lease, self._key, self._company)
        fds = [image.memory.fd] if image.memory is not None and image.memory is not self._memory else []
        self._memory = image.memory
        self._say(Begin(job, *self._told.shorten(image), bool(fds)), fds)
        if image.progress is None:
            self._say(Copied(image.end))
        else:
            image.progress.told = self._tell
            self._tell(image.progress)

    def _tell(self, progress: Progress) -> None:
        if progress.error is not None:
            self._say(Aborted(f"the state could not be copied: {progress.error}"))
        elif progress.end:
            self._say(Copied(progress.end))

    def _say(self, message: Message, fds: Sequence[int] = ()) -> None:
        with self._sending, contextlib.suppress(ConnectionError):  # a dead writer is found out by `finish`
            send(self._socket, message, fds)

    def finish(self, job: Job, image: Image) -> Committed:
        """Return what became of the job that was begun last.

        Raises:
            CommitUnknown: the writer died as it committed.
            SaveFailed: it died before; nothing of the job is left behind.
            HoldfastError: what it says that the job failed with.
        """
        answer = self._hear()
        if isinstance(answer, Done):
            return answer.committed
        if isinstance(answer, Failed):
            raise answer.rebuilt()
        failure = SaveFailed(
            f"the writer process died while it saved step {job.manifest.step} ({self._end()})"
        )
        company = self._company
        if company is not None:
            refuse(Meeting.of(self._store, company), job.manifest.attempt, failure)
        if company is None or company.rank == 0:
            self._settle(job)
        raise failure

    def _hear(self) -> Message | None:
        """Return the writer's next message; None when it is gone."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not self._heard:
            gone = self._process.poll() is not None
            if poll.poll(LOOK_MILLISECONDS):
                try:
                    found = self._inbox.receive()
                except OSError:
                    return None
                if found is None:
                    return None
                self._heard.extend(found)
            elif gone:
                return None
        return self._heard.popleft()

    def _settle(self, job: Job) -> None:
        """Free what a dead writer has left of a job, unless it committed it."""
        step, attempt = job.manifest.step, job.manifest.attempt
        try:
            found = [read_entry(self._store, e) for e in entries(self._store) if e.step == step]
        except HoldfastError as e:
            raise CommitUnknown(f"the writer process died, and what it left cannot be read: {e}") from e
        if any(m.attempt == attempt for m in found):
            raise CommitUnknown(
                f"the writer process died ({self._end()}) as it committed step {step}; the checkpoint is there, "
                "but its name may not survive a power failure before the next save"
            )
        discard(self._store, step, attempt)

    def _end(self) -> str:
        """Return how the process ended, with its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        size = os.fstat(self._stderr).st_size
        words = os.pread(self._stderr, LAST_WORDS_BYTES, max(0, size - LAST_WORDS_BYTES)).decode(
            errors="replace"
        )
        return f"{how}: {words.strip()}" if words.strip() else how

    def close(self) -> None:
        """Let the process end. Doing it again does nothing: whoever made it does so too when its session has failed."""
        if self._letting_go.alive:
            self._say(Bye(_is_failing()))
            self._letting_go()


def _without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without private keys and their passphrase: a writer is told its key on the socket."""
    return {
        name: value
        for name, value in environment.items()
        if name != PASSPHRASE_VARIABLE and "PRIVATE KEY-----" not in value
    }


def _is_failing() -> bool:
    """Return whether this is called because of an exception: on its way out of a `with`, or at the end of a process
    that it ends."""
    return isinstance(sys.exc_info()[1] or getattr(sys, "last_value", None), Exception)


def _let_go(sock: socket.socket, process: subprocess.Popen[bytes], stderr: int) -> None:
    """Hang up: the process finishes what it was told of, and ends."""
    sock.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    os.close(stderr)
