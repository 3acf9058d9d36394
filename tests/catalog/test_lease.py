"""The lease: one writer at a time, taken at once from the dead, fenced against those who come back."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from leases import put

from holdfast.catalog import lease as lease_module
from holdfast.catalog.keys import LEASES, lease_key
from holdfast.catalog.lease import LEASE_SECONDS, LeaseDoc, acquire, holder, is_held
from holdfast.core import processes
from holdfast.core.errors import LeaseHeld, LeaseLost
from holdfast.stores import LocalStore, MemoryStore
from holdfast.testing import MockClock


def mine(**changes: object) -> LeaseDoc:
    store = MemoryStore()
    acquire(store, MockClock(), heartbeat=False)
    doc = holder(store)
    assert doc is not None
    return msgspec.structs.replace(doc, **changes)


@contextlib.contextmanager
def living_process() -> Iterator[int]:
    """A process that does nothing until the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def start_of(pid: int) -> str:
    return lease_module.process_start(pid)


# ---- taking ---------------------------------------------------------------------------------------------------------


def test_the_first_to_come_holds_the_run_until_it_releases() -> None:
    store, clock = MemoryStore(), MockClock()
    assert holder(store) is None
    first = acquire(store, clock, heartbeat=False)
    assert first.generation == 1
    with pytest.raises(LeaseHeld, match="another Checkpointer of this process"):
        acquire(store, clock, heartbeat=False)
    first.release()
    found = holder(store)
    assert found is not None
    assert found.released
    assert not is_held(found, clock.now())
    assert acquire(store, clock, heartbeat=False).generation == 2
    assert [o.key for o in store.list(LEASES)] == [lease_key(2)]


def test_a_living_process_of_this_machine_keeps_its_run_whatever_the_clock_says() -> None:
    store, clock = MemoryStore(), MockClock()
    with living_process() as pid:
        put(store, pid=pid, started=start_of(pid), namespace=mine().namespace, host="here")
        clock.advance(1000 * LEASE_SECONDS)
        with pytest.raises(LeaseHeld, match=f"process {pid} on here"):
            acquire(store, clock, heartbeat=False)


def test_a_dead_process_of_this_machine_loses_its_run_at_once() -> None:
    store, clock = MemoryStore(), MockClock()
    with living_process() as pid:
        started = start_of(pid)
    put(store, pid=pid, started=started, namespace=mine().namespace)
    assert acquire(store, clock, heartbeat=False).generation == 2


def test_a_recycled_process_number_is_not_the_holder() -> None:
    store, clock = MemoryStore(), MockClock()
    with living_process() as pid:
        put(store, pid=pid, started="1", namespace=mine().namespace)
        assert acquire(store, clock, heartbeat=False).generation == 2


def test_a_killed_process_that_nobody_has_waited_for_is_dead() -> None:
    store, clock = MemoryStore(), MockClock()
    pid = os.fork()
    if pid == 0:
        signal.pause()
    started = start_of(pid)
    put(store, pid=pid, started=started, namespace=mine().namespace)
    with pytest.raises(LeaseHeld):
        acquire(store, clock, heartbeat=False)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    try:
        assert acquire(store, clock, heartbeat=False).generation == 2
    finally:
        os.waitpid(pid, 0)


def test_a_process_that_may_not_be_looked_at_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid shows other users' processes as absent, but a signal still tells them apart."""
    store = MemoryStore()
    put(store, pid=4242, started="99", namespace=mine().namespace)
    monkeypatch.setattr(lease_module, "process_start", lambda pid: "")
    monkeypatch.setattr(processes, "process_start", lambda pid: "")

    def not_permitted(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_permitted)
    with pytest.raises(LeaseHeld):
        acquire(store, MockClock(), heartbeat=False)


def test_a_lease_from_elsewhere_is_taken_when_it_has_expired_and_not_before() -> None:
    store, clock = MemoryStore(), MockClock()
    put(store, pid=os.getpid(), generation=41)
    clock.advance(LEASE_SECONDS - 0.001)
    with pytest.raises(LeaseHeld, match=r"process \d+ on elsewhere .* its lease ends in 0 s"):
        acquire(store, clock, heartbeat=False)
    clock.advance(0.001)
    assert acquire(store, clock, heartbeat=False).generation == 42


def test_a_renewed_lease_lasts_another_term() -> None:
    store, clock = MemoryStore(), MockClock()
    held = acquire(store, clock, heartbeat=False)
    clock.advance(40)
    held.check_and_renew()
    found = holder(store)
    assert found is not None
    assert found.expires == clock.now() + LEASE_SECONDS
    assert found.acquired == clock.now() - 40


def test_a_forked_child_neither_releases_nor_holds_its_parents_lease(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    held = acquire(store, heartbeat=False)
    pid = os.fork()
    if pid == 0:
        held.release()
        os._exit(0)
    os.waitpid(pid, 0)
    found = holder(store)
    assert found is not None
    assert not found.released
    held.check()


# ---- fencing --------------------------------------------------------------------------------------------------------


def test_a_holder_that_was_overtaken_is_told_so_and_stays_silent() -> None:
    store, clock = MemoryStore(), MockClock()
    stale = acquire(store, clock, heartbeat=False)
    stale.check()
    put(store, generation=2, host="rival", pid=7)
    with pytest.raises(LeaseLost, match="process 7 on rival"):
        stale.check()
    store.delete([lease_key(1)])  # as the rival does
    before = store.read(lease_key(2))
    for silent in (stale.check_and_renew, stale.renew, stale.release):
        silent()
        assert [o.key for o in store.list(LEASES)] == [lease_key(2)]
        assert store.read(lease_key(2)) == before
    with pytest.raises(LeaseLost):
        stale.check()


def test_a_lease_that_is_no_longer_there_is_lost_and_is_not_made_again() -> None:
    store, clock = MemoryStore(), MockClock()
    lease = acquire(store, clock, heartbeat=False)
    store.delete([lease_key(1)])  # with all of the run, or by hand
    with pytest.raises(LeaseLost, match="moved, removed or put back"):
        lease.check()
    for silent in (lease.check_and_renew, lease.renew, lease.release):
        silent()
        assert store.list(LEASES) == []


def test_after_a_lost_lease_the_old_generation_stays_lower() -> None:
    store, clock = MemoryStore(), MockClock()
    stale = acquire(store, clock, heartbeat=False)
    put(store, generation=2, released=True)
    store.delete([lease_key(1)])
    stale.renew()  # comes too late: writes its own, lower number
    third = acquire(store, clock, heartbeat=False)
    assert third.generation == 3
    third.check()
    assert [o.key for o in store.list(LEASES)] == [lease_key(3)]
