"""Who takes a run up searches it for left-overs unless the holder before left none, and says so in its mark."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from manifests import Interrupted, fail

import holdfast
from holdfast.catalog import tidiness
from holdfast.catalog.keys import TIDY
from holdfast.catalog.tidiness import HALF_MADE_SECONDS, MARK_FROM, SEARCH_SECONDS, check_mark
from holdfast.core.clock import Clock
from holdfast.core.errors import DigestMismatch, HoldfastError, StoreError
from holdfast.format.sealed import seal
from holdfast.loop.session import SaveOrder, Session
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot
from holdfast.testing import MockClock

LEFT_OVER = "data/000000000099-dead/m.safetensors"


class Watched(Interrupted):
    """Counts searches; may fail to delete data."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: list[float] = []
        self.listed: list[str] = []
        self.stuck = False

    def sweep(self, before: float) -> None:
        self.sweeps.append(before)

    def names(self, prefix: str, after: str = "") -> list[str]:
        self.listed.append(prefix)
        return super().names(prefix, after)

    def delete(self, keys) -> None:
        if self.stuck and any(key.startswith("data/") for key in keys):
            raise StoreError(5, "Input/output error")
        super().delete(keys)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A run of a few checkpoints, of which two need data of another one, that was left tidy an hour after a search."""
    monkeypatch.setattr(tidiness, "MARK_FROM", 1)
    store, clock = Watched(), MockClock()
    with held(store, clock) as session:
        for step in range(1, 5):
            save(session, step)
    clock.advance(HALF_MADE_SECONDS + 1)
    with held(store, clock):
        pass
    store.sweeps.clear()
    return store


@pytest.fixture
def clock() -> MockClock:
    clock = MockClock()
    clock.advance(HALF_MADE_SECONDS + 2)
    return clock


@contextlib.contextmanager
def held(store: Watched, clock: MockClock):
    session = Session(store, clock)
    try:
        yield session
    finally:
        session.close()


def save(session: Session, step: int, seed: float | None = None) -> None:
    image = take_snapshot(
        {"a": {"w": np.full(9, float(step if seed is None else seed))}}, Arena(), rng=False
    ).image
    session.persist(image, SaveOrder(Clock(step=step), {}, ("test",)))


def searched(store: Watched, clock: MockClock) -> bool:
    """Whether the next holder searches; it frees what it finds."""
    before = len(store.sweeps)
    store.write(LEFT_OVER, [b"x"])
    Session(store, clock).close()
    found = len(store.sweeps) > before
    assert found == (LEFT_OVER not in store._objects), "it searches all or nothing"
    store.delete([LEFT_OVER])
    return found


def test_after_a_holder_that_left_nothing_nothing_is_searched(store: Watched, clock: MockClock) -> None:
    store.listed.clear()
    for step in range(5, 8):
        with held(store, clock) as session:
            save(session, step)
            session.remove_steps([step - 2], {})
    assert store.sweeps == []
    assert "data" not in store.listed
    assert not searched(store, clock)


def test_after_one_that_died_all_is_searched_and_again_when_its_halves_are_old(
    store: Watched, clock: MockClock
) -> None:
    Session(store, clock).lease.forget()
    assert searched(store, clock)
    assert not searched(store, clock)
    died = clock.now()
    clock.advance(HALF_MADE_SECONDS + 1)
    assert searched(store, clock)
    assert store.sweeps[-1] > died, "what it was making then is freed now"
    clock.advance(SEARCH_SECONDS - 1)
    assert not searched(store, clock)
    clock.advance(2)
    assert searched(store, clock), "once a day, for those who write without the lease"


def test_a_clock_that_was_ahead_does_not_put_the_search_off(store: Watched, clock: MockClock) -> None:
    behind = MockClock()
    behind.advance(-10 * SEARCH_SECONDS)
    assert searched(store, behind)


@pytest.mark.parametrize("how", ["save", "commit", "answer", "removal", "older state"])
def test_who_failed_leaves_no_mark_that_counts(store: Watched, clock: MockClock, how: str) -> None:
    with held(store, clock) as session, contextlib.suppress(HoldfastError):
        if how == "removal":
            store.stuck = True
            session.remove_steps([2], {})
        elif how == "older state":
            store.stuck = True
            save(session, 4, 40.0)
        elif how == "save":
            store.write = store.write_streams = lambda *_: fail("data")  # type: ignore[method-assign]
            save(session, 9)
        else:
            setattr(store, "before" if how == "commit" else "after", fail)
            save(session, 9)
    store.__dict__.pop("write", None)
    store.__dict__.pop("write_streams", None)
    store.stuck = False
    assert searched(store, clock)
    assert not searched(store, clock)


@pytest.mark.parametrize("act", ["remove", "save again"])
def test_what_a_broken_one_needed_is_searched_for(store: Watched, clock: MockClock, act: str) -> None:
    before = {o.key for o in store.list("data")}
    (its,) = [key for key in before if key.startswith("data/000000000002-")]
    store.replace("checkpoints/000000000002.json", b"spoilt")
    if act == "remove":
        holdfast.Run(store, time=clock).remove([2], grace=0)
    else:
        with held(store, clock) as session:
            save(session, 2, 7.0)
    assert its in store._objects
    assert searched(store, clock)
    assert its not in store._objects


def test_while_a_manifest_cannot_be_read_every_holder_searches(store: Watched, clock: MockClock) -> None:
    store.replace("checkpoints/000000000002.json", b"spoilt")
    Session(store, clock).lease.forget()
    for _ in range(2):
        sweeps = len(store.sweeps)
        Session(store, clock).close()
        assert len(store.sweeps) > sweeps


def test_old_trash_is_freed_though_nothing_else_is_owing(store: Watched, clock: MockClock) -> None:
    with held(store, clock) as session:
        session.abandon_after(3, "test")
    (aside,) = store.list("trash")
    assert not searched(store, clock)
    store._objects[aside.key] = (store._objects[aside.key][0], clock.now() - 24 * 3600 - 1)
    assert searched(store, clock)
    assert store.list("trash") == []
    assert len(store.list("data")) == 3


@pytest.mark.parametrize("how", ["cut", "flipped", "of another run", "later version", "older"])
def test_a_mark_that_does_not_count(store: Watched, clock: MockClock, how: str) -> None:
    raw = store.read(TIDY)
    run = holdfast.Run(store, time=clock)
    made = {
        "cut": raw[:-9],
        "flipped": raw.replace(b'"format":1', b'"format":0'),
        "of another run": seal(raw[:-78].replace(run.id.encode(), b"0" * 32) + b"}"),
        "later version": seal(b'{"format":2,"mark":7}'),
        "older": raw,
    }[how]
    if how == "older":
        Session(store, clock).close()
    store.replace(TIDY, made)
    if how == "flipped":
        with pytest.raises(DigestMismatch, match=TIDY):
            check_mark(store)
    assert [p.key for p in run.verify_beside()] == ([TIDY] if how in ("cut", "flipped") else [])
    assert searched(store, clock)
    assert run.verify_beside() == []


def test_who_lost_the_lease_leaves_no_mark(store: Watched, clock: MockClock) -> None:
    paused = Session(store, clock)
    paused.lease.forget()
    rival = Session(store, clock)
    before = store.read(TIDY)
    paused._tidiness.leave()
    assert store.read(TIDY) == before
    rival.close()


def test_a_mark_that_cannot_be_stored_is_no_failure(store: Watched, clock: MockClock) -> None:
    replace, store.replace = store.replace, lambda key, data: fail(key) if key == TIDY else replace(key, data)  # type: ignore[method-assign]
    Session(store, clock).close()
    del store.replace
    assert searched(store, clock)


def test_a_short_run_has_no_mark() -> None:
    assert MARK_FROM > 3
    store = Watched()
    for step in range(3):
        holdfast.save(store, {"a": {"w": np.ones(3)}}, step=step)
    assert TIDY not in store._objects
