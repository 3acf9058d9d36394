"""What others do meanwhile: a reader keeps what it reads; a writer that wakes up after it has lost the run harms nobody."""

from __future__ import annotations

import numpy as np
import pytest
from leases import MockClock
from test_trash import HOUR, Dated, run_of

import holdfast
from holdfast.catalog.checkpoints import commit
from holdfast.catalog.keys import lease_key
from holdfast.catalog.lease import LEASE_SECONDS, Lease, acquire
from holdfast.catalog.readers import READER_SECONDS, find_readers, reading
from holdfast.core.clock import Clock
from holdfast.core.errors import CommitConflict, LeaseLost, PermissionDenied
from holdfast.export import export_part
from holdfast.format.manifest import Manifest
from holdfast.loop.session import SaveOrder, Session
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot


@pytest.fixture
def store() -> Dated:
    store = Dated()
    for step in (1, 2, 3):
        holdfast.save(store, {"m": {"w": np.full(3, step)}}, step=step)
    return store


# ---- readers ----------------------------------------------------------------------------------------------------------


def test_retention_keeps_what_is_read(store: Dated) -> None:
    run = run_of(store)
    with reading(store, run[1].manifest, "test"):
        kept = {
            d.step: d.reasons for d in run_of(store).prune(holdfast.last(1), grace=0) if d.action == "keep"
        }
        assert kept[1] == ("guard: in use by a reader",)
        assert run_of(store).verify() == {1: [], 3: []}
    assert store.list("readers") == []
    run_of(store).prune(holdfast.last(1), grace=0)
    assert run_of(store).steps == [3]


def test_what_is_read_keeps_its_bytes_though_it_is_removed(store: Dated) -> None:
    run = run_of(store)
    checkpoint = run[1]
    with reading(store, checkpoint.manifest, "test"):
        assert run.remove([1], force=True, grace=0) == 0
        assert run.steps == [2, 3]
        run.collect(grace=0)
        assert checkpoint.values(as_="numpy")["m"]["w"].tolist() == [1, 1, 1]
    assert run.collect().files == 1


def test_a_reader_that_died_counts_until_its_time_is_over_by_the_clock_of_the_store(store: Dated) -> None:
    run = run_of(store)
    context = reading(store, run[1].manifest, "test")
    context.__enter__()
    (key,) = store.names("readers")
    raw = store.read(key)
    context.__exit__(None, None, None)
    store.create(key, raw)
    run.remove([1], grace=0)
    store.clock.advance(READER_SECONDS)
    assert run.collect().files == 0
    store.clock.advance(1)
    assert run.collect().files == 1
    assert store.list("readers") == []


def test_a_reader_that_does_not_say_what_it_needs_keeps_all_data(store: Dated) -> None:
    store.create("readers/0123456789ab.json", b"spoilt")
    assert find_readers(store).unknown
    run_of(store).remove([1], grace=0)
    assert len(store.list("data")) == 3
    store.clock.advance(READER_SECONDS + 1)
    run_of(store).collect()
    assert len(store.list("data")) == 2


def test_where_nothing_may_be_written_one_reads_without_protection(store: Dated, tmp_path) -> None:
    create, checkpoint = store.create, run_of(store)[2]

    def refuse(key: str, data) -> None:
        raise PermissionDenied(13, "read only")

    store.create = refuse  # type: ignore[method-assign]
    export_part(checkpoint, tmp_path / "m.safetensors", part="m")
    assert (tmp_path / "m.safetensors").stat().st_size > 0
    store.create = create  # type: ignore[method-assign]


def test_an_export_protects_what_it_reads(store: Dated, tmp_path) -> None:
    checkpoint, seen = run_of(store)[2], []

    def progress(done: int) -> None:
        seen.append(find_readers(store).attempts)

    export_part(checkpoint, tmp_path / "m.safetensors", part="m", progress=progress)
    assert seen == [{checkpoint.manifest.attempt}]
    assert store.list("readers") == []


# ---- a writer that wakes up late ----------------------------------------------------------------------------------------


def lost_to_another(store: Dated, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """A holder on another machine whose lease ran out, though it may still live."""
    with monkeypatch.context() as patch:
        patch.setattr("holdfast.catalog.lease.namespace", lambda: "another:namespace")
        held = acquire(store, store.clock, heartbeat=False)
    store.clock.advance(LEASE_SECONDS + 1)
    return held


def late(store: Dated, stale: Lease, step: int, attempt: str = "1a7e") -> Manifest:
    """What it has written, and not yet committed."""
    newest = run_of(store).latest.manifest
    manifest = {
        "step": step,
        "attempt": attempt,
        "generation": stale.generation,
        "clock": (step, 0, 0, 0, 0.0),
    }
    return Manifest(**{f: getattr(newest, f) for f in newest.__struct_fields__} | manifest)


def save(session: Session, step: int) -> None:
    image = take_snapshot({"m": {"w": np.full(3, step)}}, Arena(), rng=False).image
    session.persist(image, SaveOrder(Clock(step=step), {}, ("test",)))
    session.label_and_retain(None, None)


def test_what_a_stale_holder_commits_is_put_into_the_trash(store: Dated, monkeypatch, caplog) -> None:
    stale = lost_to_another(store, monkeypatch)
    session = Session(store, store.clock)
    assert session.lease.displaced
    with monkeypatch.context() as patch:  # it had looked just before the run was taken
        patch.setattr(stale, "check", lambda: None)
        commit(store, late(store, stale, 7), stale)
    save(session, 4)
    assert run_of(store).steps == [1, 2, 3, 4]
    assert "had lost the run" in caplog.text
    assert [(d.step, d.reasons) for d in run_of(store).trash()] == [(7, ("its writer had lost the run",))]
    run_of(store).undelete(7)
    save(session, 5)
    assert run_of(store).steps == [1, 2, 3, 4, 5, 7], "whoever brings it back wants it"
    session.close()


def test_a_stale_holder_never_overtakes_a_state_of_the_new_one(store: Dated, monkeypatch) -> None:
    """It wakes up between its look at the lease and its commit, when the new holder has committed that very step."""
    stale = lost_to_another(store, monkeypatch)
    manifest, looked = late(store, stale, 4), []

    def look_and_fall_asleep() -> None:
        if not looked:
            looked.append(True)
            session = Session(store, store.clock)
            save(session, 4)
            session.close()
            return
        raise LeaseLost("taken over")

    monkeypatch.setattr(stale, "check", look_and_fall_asleep)
    with pytest.raises(CommitConflict):
        commit(store, manifest, stale)
    assert holdfast.load(store, step=4)["m"]["w"].tolist() == [4, 4, 4]


def test_data_of_a_holder_that_may_live_is_left_alone_for_an_hour(store: Dated, monkeypatch) -> None:
    stale = lost_to_another(store, monkeypatch)
    key = "data/000000000007-1a7e/m.safetensors"
    store.write(key, [b"x"])
    assert lease_key(stale.generation) in store.names("lease")
    Session(store, store.clock).close()
    assert key in store.names("data")
    store.clock.advance(HOUR)
    run_of(store).collect()
    assert key not in store.names("data")


def test_data_of_a_holder_that_is_known_to_be_gone_is_freed_at_once(store: Dated) -> None:
    store.write("data/000000000007-1a7e/m.safetensors", [b"x"])
    acquire(store, MockClock(), heartbeat=False).forget()
    Session(store, store.clock).close()
    assert len(store.names("data")) == 3
