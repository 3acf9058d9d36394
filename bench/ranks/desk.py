"""A launch of several ranks, as a worker's desk: what is asked of it is asked of all ranks at once."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import subprocess
import sys
from multiprocessing.connection import Connection, Listener, wait
from typing import Any

from bench.contestants import Entry
from bench.states import Recipe
from bench.timing import Figures

RANKS = 4
START_SECONDS = 240
END_SECONDS = 40


class RanksDesk:
    """One contestant under torchrun. Of what its ranks find the largest counts; of bytes and processor time, what
    `rank.py` says of all of them and of rank 0."""

    def __init__(self, entry: Entry | None, recipe: Recipe, scratch: pathlib.Path) -> None:
        key = secrets.token_bytes(16)
        with Listener(family="AF_UNIX", backlog=RANKS, authkey=key) as listener:  # in a temporary folder
            listener._listener._socket.settimeout(START_SECONDS)  # type: ignore[attr-defined]
            self._launch = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
                    "-m", "bench.ranks.rank", str(listener.address), key.hex(),
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self._failed = False
            try:
                met: dict[int, Connection] = {}
                while len(met) < RANKS:
                    pipe = listener.accept()
                    met[pipe.recv()] = pipe
                    pipe.send((entry, recipe, scratch))
                self._ranks = [met[rank] for rank in range(RANKS)]
                self._answers()
            except BaseException:
                self._launch.terminate()
                raise

    def open(self) -> None:
        """Let the contestant prepare."""
        self._all("open")

    def rest(self) -> None:
        """Nothing goes on before a save."""

    def save(self) -> Figures:
        """Change the state and save it."""
        return _largest(self._all("save"))

    def step(self) -> Figures:
        """Save in a training step."""
        return _largest(self._all("step"))

    def load(self) -> Figures:
        """Load the newest checkpoint, from the disk and from the page cache."""
        return _largest(self._all("load"))

    def stored_bytes(self) -> int:
        """Bytes of everything it stored and has not removed."""
        return int(self._all("stored_bytes")[0])

    def state_bytes(self) -> int:
        """Bytes of the state on all ranks."""
        return sum(self._all("state_bytes"))

    def close(self) -> None:
        try:
            if not self._failed:  # else the others may still wait for the one that failed
                self._all("close")
        finally:
            self._launch.terminate()  # torchrun ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launch.wait(END_SECONDS)  # whoever is still there then is killed by the worker's owner

    def _all(self, method: str) -> list[Any]:
        for pipe in self._ranks:
            pipe.send(method)
        return self._answers()

    def _answers(self) -> list[Any]:
        """Raise what a rank failed with; the first one that says so, for the others may wait for it."""
        found: dict[int, Any] = {}
        silent = {pipe: rank for rank, pipe in enumerate(self._ranks)}
        while silent:
            for pipe in wait(list(silent)):
                assert isinstance(pipe, Connection)
                rank = silent.pop(pipe)
                try:
                    error, found[rank] = pipe.recv()
                except EOFError:
                    error = "its process ended"
                if error is not None:
                    self._failed = True
                    raise RuntimeError(f"rank {rank}: {error}")
        return [found[rank] for rank in range(len(self._ranks))]


def _largest(found: list[Figures]) -> Figures:
    return {key: max(each[key] for each in found if key in each) for key in found[0]}


class RanksLimitDesk(RanksDesk):
    """The limit: every rank copies, writes and reads at once."""

    def __init__(self, recipe: Recipe, scratch: pathlib.Path) -> None:
        super().__init__(None, recipe, scratch)
