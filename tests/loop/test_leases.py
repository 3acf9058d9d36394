"""A job that was moved to another machine waits for the old machine's lease to end, and only as long; a run that was
moved away from under a job is not written any more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from holdfast import Checkpointer, Run, every
from holdfast.catalog.keys import lease_key
from holdfast.catalog.lease import LEASE_SECONDS, LeaseDoc, acquire
from holdfast.core.errors import LeaseHeld, LeaseLost, NotARun
from holdfast.format.sealed import seal
from holdfast.stores import MemoryStore
from holdfast.testing import MockClock


def held_elsewhere(store: MemoryStore, clock: MockClock, ahead: float = 0.0) -> LeaseDoc:
    there = clock.now() + ahead
    doc = LeaseDoc(1, "lost-machine", 7, "1", "elsewhere", there, there + LEASE_SECONDS)
    store.create(lease_key(1), seal(msgspec.json.encode(doc)))
    return doc


@pytest.mark.parametrize("ahead", [0.0, 3600.0, 1e9])
def test_waits_for_a_lease_that_is_never_renewed(ahead: float) -> None:
    store, clock = MemoryStore(), MockClock()
    held_elsewhere(store, clock, ahead)  # by a clock that may be wrong
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


@pytest.mark.parametrize("act", [lambda run: run.rename(run.with_name("moved")), shutil.rmtree])
def test_nothing_is_committed_to_where_a_run_was(tmp_path: Path, act: Callable[[Path], object]) -> None:
    run = tmp_path / "run"
    state = {"model": {"frozen": np.ones(1000), "weight": np.zeros(1000)}}  # the frozen one is written once

    def train() -> None:
        with Checkpointer(run, state, save=every(steps=1), writer="inline") as ckpt:
            for step in ckpt.steps(4):
                state["model"]["weight"] += 1
                if step == 2:
                    act(run)

    with pytest.raises(LeaseLost, match="moved, removed or put back"):
        train()
    assert not (run / "checkpoints").exists()
    with pytest.raises(NotARun):
        Run(run)
    if (tmp_path / "moved").exists():
        assert Run(tmp_path / "moved").steps == [1, 2]
        assert Run(tmp_path / "moved").verify() == {1: [], 2: []}
