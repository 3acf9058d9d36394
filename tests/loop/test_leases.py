"""A job that was moved to another machine waits for the old machine's lease to end, and only as long."""

from __future__ import annotations

import msgspec
import pytest

from holdfast.catalog.keys import lease_key
from holdfast.catalog.lease import LEASE_SECONDS, LeaseDoc, acquire
from holdfast.core.errors import LeaseHeld
from holdfast.format.sealed import seal
from holdfast.stores import MemoryStore
from holdfast.testing import MockClock


def held_elsewhere(store: MemoryStore, clock: MockClock) -> LeaseDoc:
    doc = LeaseDoc(1, "lost-machine", 7, "1", "elsewhere", clock.now(), clock.now() + LEASE_SECONDS)
    store.create(lease_key(1), seal(msgspec.json.encode(doc)))
    return doc


def test_waits_for_a_lease_that_is_never_renewed() -> None:
    store, clock = MemoryStore(), MockClock()
    held_elsewhere(store, clock)
    began = clock.now()
    lease = acquire(store, clock, heartbeat=False, wait=True)
    assert lease.generation == 2
    assert LEASE_SECONDS <= clock.now() - began <= LEASE_SECONDS + 2


def test_does_not_wait_for_a_holder_that_lives() -> None:
    store = MemoryStore()

    class Renewing(MockClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            renewed = msgspec.structs.replace(doc, expires=self.now() + LEASE_SECONDS)
            store.replace(lease_key(1), seal(msgspec.json.encode(renewed)))

    clock = Renewing()
    doc = held_elsewhere(store, clock)
    began = clock.now()
    with pytest.raises(LeaseHeld, match="process 7 on lost-machine"):
        acquire(store, clock, heartbeat=False, wait=True)
    assert clock.now() - began < 5


def test_without_waiting_it_says_how_long() -> None:
    store, clock = MemoryStore(), MockClock()
    held_elsewhere(store, clock)
    with pytest.raises(LeaseHeld, match="its lease ends in 60 s"):
        acquire(store, clock, heartbeat=False)
