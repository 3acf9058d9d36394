"""Three simulated hosts, each with a trainer and a service of peers' memory, of which any one is lost, and then two."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from patience import TIMEOUT
from replication.host_trainer import DURABLE_AT, ROWS
from servers.namespaces import Host, hosts, why_not
from servers.peers import PEER_SECRET, Peer

HOSTS = 3
HOLD_AT, TOTAL = 7, 9
TRAINER = Path(__file__).with_name("host_trainer.py")

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@functools.cache
def expected(seed: int) -> str:
    """What a run comes to that nothing happened to."""
    w, m, noise = np.zeros(ROWS), np.zeros(ROWS), np.random.default_rng(seed)
    for _ in range(TOTAL):
        m[:] = 0.9 * m + noise.standard_normal(ROWS)
        w[:] -= 0.01 * m
    return blake3(w.tobytes()).hexdigest()


class Trainer:
    """A trainer of a run on a host."""

    def __init__(
        self, world: World, seed: int, host: Host, run: str, *, hold_at: int, peers: Sequence[str]
    ) -> None:
        self._log = (world.durable / f"trainer-{seed}-{host.name}.log").open("w+")
        command = [
            *host.inside, sys.executable, str(TRAINER), str(seed), run, str(TOTAL), str(hold_at),
            str(world.durable / f"run-{seed}"), *peers,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "HOLDFAST_PEER_SECRET": PEER_SECRET, "OMP_NUM_THREADS": "1"},
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")

    def hear(self, word: str) -> str:
        """Return what follows a word in the next line that begins with it."""
        said: list[str] = []
        end = time.monotonic() + TIMEOUT
        with contextlib.suppress(queue.Empty):
            while line := self._lines.get(timeout=max(0.0, end - time.monotonic())):
                said.append(line)
                if line.startswith(f"{word} "):
                    return line.removeprefix(f"{word} ")
        raise AssertionError(f"no {word!r} from the trainer; it said {said}, and {self.log()[-3000:]}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._log.close()


class World:
    """The hosts, their services, and durable storage that all of them reach."""

    def __init__(self, found: list[Host], durable: Path, stack: contextlib.ExitStack) -> None:
        self.hosts = found
        self.durable = durable
        self._stack = stack
        with ThreadPoolExecutor(HOSTS) as pool:
            starting = [pool.submit(Peer, "64MB", f"{host.address}:7070", host.inside) for host in found]
        self.peers = [peer.result() for peer in starting]
        for peer in self.peers:
            stack.callback(peer.kill)

    @property
    def ring(self) -> str:
        """A place in the memories of all hosts."""
        return f"peers://{','.join(peer.url.removeprefix('peer://') for peer in self.peers)}/run"

    def train(
        self, run: int, on: int, *, hold_at: int = 0, peers: Sequence[int] = (), where: str = ""
    ) -> Trainer:
        """Start the trainer of a run on a host, by default on its disk, with these hosts as its peers."""
        urls = [f"{self.peers[n].url}/run-{run}" for n in peers]
        host = self.hosts[on]
        trainer = Trainer(
            self, run, host, where or str(host.disk / f"run-{run}"), hold_at=hold_at, peers=urls
        )
        self._stack.callback(trainer.end)
        return trainer

    def train_all(self) -> list[Trainer]:
        """Train a run on each host, whose peer is the next one, up to where that peer holds a step that durable storage
        has not."""
        trainers = [self.train(n, n, hold_at=HOLD_AT, peers=[(n + 1) % HOSTS]) for n in range(HOSTS)]
        for trainer in trainers:
            assert trainer.hear("from") == "0"
        for trainer in trainers:
            assert trainer.hear("secured") == str(HOLD_AT)
        return trainers


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(hosts(HOSTS, tmp_path / "disks"))
        (tmp_path / "durable").mkdir()
        yield World(found, tmp_path / "durable", stack)
    assert not [h for h in found if not h.lost]


@pytest.mark.parametrize("lost", range(HOSTS))
def test_the_loss_of_any_one_host_loses_no_step(world: World, lost: int) -> None:
    trainers = world.train_all()
    world.hosts[lost].lose()
    survivors = [n for n in range(HOSTS) if n != lost]
    # The run of the lost host goes on elsewhere: wherever its peer is, the others are asked.
    again = world.train(lost, survivors[0], peers=survivors)
    assert again.hear("from") == str(HOLD_AT)
    assert again.hear("done") == expected(lost)
    assert f"step {HOLD_AT} was brought back from the mirror peer://" in again.log()
    # And the others, of whom one has lost its peer, train on.
    for n in survivors:
        trainers[n].go_on()
        assert trainers[n].hear("done") == expected(n)


def test_when_its_peer_is_lost_too_a_run_goes_on_from_durable_storage_and_says_so(world: World) -> None:
    world.train_all()
    for lost in (0, 1):  # the trainer of run 0, and the memory that held it
        world.hosts[lost].lose()
    again = world.train(0, 2, peers=[1, 2])
    assert again.hear("from") == str(DURABLE_AT)
    assert again.hear("done") == expected(0)
    assert f"the mirror {world.peers[1].url}/run-0 cannot be read" in again.log()
    assert f"step {DURABLE_AT} was brought back from the mirror file://" in again.log()


@pytest.mark.parametrize("lost", range(HOSTS))
def test_a_run_in_the_memories_of_all_hosts_outlives_any_one_of_them(world: World, lost: int) -> None:
    first = world.train(5, lost, hold_at=HOLD_AT, where=world.ring)
    assert first.hear("secured") == str(HOLD_AT)
    world.hosts[lost].lose()
    again = world.train(5, (lost + 1) % HOSTS, where=world.ring)
    assert again.hear("from") == str(HOLD_AT)
    assert again.hear("done") == expected(5)
    if lost:
        return
    # Without a majority it refuses, and what is durable is what there is.
    again.process.wait(TIMEOUT)
    world.hosts[(lost + 1) % HOSTS].lose()
    refused = world.train(5, (lost + 2) % HOSTS, where=world.ring)
    assert refused.process.wait(TIMEOUT) != 0
    assert "fewer than a majority" in refused.log() or "no such majority" in refused.log()
    there = world.train(5, (lost + 2) % HOSTS)
    assert there.hear("done") == expected(5)
    assert f"step {TOTAL} was brought back from the mirror file://" in there.log()
