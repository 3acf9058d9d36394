"""Services of peers' memory as processes of their own, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

__all__ = ["PEER_SECRET", "Peer", "serving_peer"]

PEER_SECRET = "a secret that these tests share"
START_SECONDS = 60.0


class Peer:
    """A running `holdfast peer serve`; `url` is what it says. `inside` is put before the command."""

    def __init__(self, memory: str, bind: str = "127.0.0.1:0", inside: Sequence[str] = ()) -> None:
        command = [
            *inside,
            sys.executable,
            "-m",
            "holdfast",
            "peer",
            "serve",
            "--bind",
            bind,
            "--memory",
            memory,
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HOLDFAST_PEER_SECRET": PEER_SECRET},
        )
        try:
            self.url = self._hear()
        except BaseException:
            self.stop()
            raise

    def _hear(self) -> str:
        """Return the URL in the first line that it prints."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            deadline = time.monotonic() + START_SECONDS
            while not selector.select(0.5):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the service did not start")
        words = self.process.stdout.readline().split()
        if len(words) < 2:
            assert self.process.stderr is not None
            raise RuntimeError(f"the service did not start: {self.process.stderr.read()[-2000:]}")
        return words[1]

    def stop(self) -> tuple[int, str]:
        """End it as a user does; return its exit code and what it said to the error stream."""
        self.process.terminate()
        return self._end()

    def kill(self) -> None:
        """Lose it."""
        self.process.kill()
        self._end()

    def _end(self) -> tuple[int, str]:
        try:
            _, said = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
        return self.process.returncode, said


@contextlib.contextmanager
def serving_peer(memory: str = "64MB", bind: str = "127.0.0.1:0") -> Iterator[Peer]:
    """Run a service until the context is left."""
    peer = Peer(memory, bind)
    try:
        yield peer
    finally:
        if peer.process.returncode is None:
            peer.stop()
