"""Rivals for a lease, in every order of their steps and in processes, and faults in the middle of taking it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
from multiprocessing.connection import Connection

import pytest
from leases import put

from holdfast.catalog.keys import LEASES, lease_key
from holdfast.catalog.lease import acquire, holder
from holdfast.core.errors import InvalidFormat, LeaseHeld, StoreError
from holdfast.format.sealed import seal
from holdfast.stores import LocalStore, MemoryStore, ObjectInfo
from holdfast.testing import FaultyDisk, MockClock

FORK = multiprocessing.get_context("fork")


class Interleaved(MemoryStore):
    """Lets a rival act right after the next listing of the leases, as another process may."""

    def __init__(self) -> None:
        super().__init__()
        self.rival: list[object] = []

    def list(self, prefix: str) -> list[ObjectInfo]:
        found = super().list(prefix)
        if prefix == LEASES and self.rival:
            self.rival.pop()()  # type: ignore[operator]
        return found


@pytest.mark.parametrize("rivals", [1, 2, 3])
def test_who_looked_before_a_rival_took_the_run_does_not_get_it_too(rivals: int) -> None:
    """The rival deletes the generation that was seen, so that its number, or a lower one, is free again."""
    store, clock = Interleaved(), MockClock()
    put(store, generation=1, released=True)
    held = []

    def take() -> None:
        if held:
            held[-1].release()
        held.append(acquire(store, clock, heartbeat=False))

    def take_all() -> None:
        for _ in range(rivals):
            take()

    store.rival = [take_all]
    with pytest.raises(LeaseHeld):
        acquire(store, clock, heartbeat=False)
    held[-1].check()
    found = holder(store)
    assert found is not None
    assert found.generation == held[-1].generation


def hold(root: pathlib.Path, gate: Connection) -> None:
    gate.recv()
    try:
        held = acquire(LocalStore(root), heartbeat=False)
        gate.send(held.generation)
    except LeaseHeld:
        gate.send(None)
    gate.recv()  # alive until the end of the turn; then gone without a release
    os._exit(0)


def test_of_rivals_in_processes_exactly_one_takes_over(tmp_path: pathlib.Path) -> None:
    generations = []
    for _ in range(8):  # each turn's winner dies and leaves its lease to the next turn's rivals
        gates, processes = [], []
        for _ in range(5):
            gate, theirs = FORK.Pipe()
            process = FORK.Process(target=hold, args=(tmp_path, theirs))
            process.start()
            gates.append(gate)
            processes.append(process)
        for gate in gates:
            gate.send("go")
        taken = [g for g in [gate.recv() for gate in gates] if g is not None]
        for gate, process in zip(gates, processes, strict=True):
            gate.send("end")
            process.join()
        assert len(taken) == 1
        generations += taken
    assert generations == sorted(set(generations))


# ---- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True], ids=["instead", "applied"])
def test_after_a_fault_while_taking_the_same_process_can_try_again(
    tmp_path: pathlib.Path, applied: bool
) -> None:
    for n in range(1, 40):
        root = tmp_path / f"{applied}-{n}"
        acquire(LocalStore(root), heartbeat=False).release()
        disk = FaultyDisk(n, applied=applied)
        with contextlib.suppress(StoreError):
            acquire(LocalStore(root, disk), heartbeat=False).release()
        if not disk.fired:
            break
        again = acquire(LocalStore(root), heartbeat=False)
        again.check()
    assert n > 4


@pytest.mark.parametrize(
    "body",
    [
        b'{"generation":1}',
        b'{"generation":"x"}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"host":"\xff"}',
    ],
)
def test_a_lease_outside_the_grammar_is_refused_by_name(body: bytes) -> None:
    store = MemoryStore()
    store.create(lease_key(3), seal(body))
    with pytest.raises(InvalidFormat, match=lease_key(3)):
        holder(store)
    with pytest.raises(LeaseHeld, match=lease_key(3)):  # for a term: somebody may have just written it
        acquire(store, MockClock(), heartbeat=False)
