"""The index saves reading and decides nothing: with any index, or none, a run is what its listed manifests say.

The machine writes the index after each save, on a store whose clock may stand still, and spoils it in every way that a
crash, a restore from a backup or a rival leaves it; a new reader, the owner and a plain scan must agree after each act.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from manifests import manifest, put

import holdfast
from holdfast.catalog import history as history_module
from holdfast.catalog.checkpoints import commit, entries, read_entry
from holdfast.catalog.deletion import Ages, collect
from holdfast.catalog.history import History
from holdfast.catalog.index import Index, check_index
from holdfast.catalog.keys import INDEX
from holdfast.catalog.lease import acquire
from holdfast.catalog.summary import read_summary, summarize
from holdfast.core.buffers import Buffer
from holdfast.core.clock import Clock
from holdfast.core.errors import DigestMismatch, HoldfastError, LeaseLost, StoreError
from holdfast.core.records import CheckpointRecord
from holdfast.format.manifest import Manifest
from holdfast.format.sealed import seal
from holdfast.loop.session import SaveOrder, Session
from holdfast.policies import last, plan
from holdfast.policies.best import Best
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import MemoryStore
from holdfast.testing import MockClock

PARTS = ("encoder", "head")
SEAL = b',"digest":"' + b"0" * 64 + b'"}\n'


class Clocked(MemoryStore):
    """A store with a clock of its own, which ticks as coarsely as it is told to; it counts what is read."""

    def __init__(self, tick: float = 1e-6) -> None:
        super().__init__("clocked")
        self.now, self.tick = 1000.0, tick
        self.reads: list[str] = []
        self.index_fails: str | None = None  # "before" or "after" it took effect

    def _stamp(self, key: str) -> None:
        self._objects[key] = (self._objects[key][0], math.floor(self.now / self.tick) * self.tick)

    def create(self, key: str, data: Buffer) -> None:
        super().create(key, data)
        self._stamp(key)

    def replace(self, key: str, data: Buffer) -> None:
        fails, self.index_fails = (self.index_fails, None) if key == INDEX else (None, self.index_fails)
        if fails == "before":
            raise StoreError(28, "No space left on device")
        super().replace(key, data)
        self._stamp(key)
        if fails == "after":
            raise StoreError(5, "Input/output error")

    def put_index(self, raw: bytes) -> None:
        MemoryStore.replace(self, INDEX, raw)
        self._stamp(INDEX)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.reads.append(key)
        return super().read(key, start, end)

    def manifests_read(self, act: Callable[[], object]) -> int:
        self.reads.clear()
        act()
        return sum(key.startswith(("checkpoints/", "trash/")) for key in self.reads)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is stored whenever it is behind at all."""
    for name in ("INDEX_FROM", "BEHIND", "BEHIND_AT_CLOSE"):
        monkeypatch.setattr(history_module, name, 1)


def scan(store: MemoryStore) -> list[Manifest]:
    """What the manifests say, each read."""
    return [read_entry(store, entry) for entry in entries(store)]


def said(record: CheckpointRecord) -> tuple[object, ...]:
    return (
        record.step, record.attempt, record.time, record.clock.step, dict(record.metrics), record.reasons,
        record.stored_bytes, record.new_bytes, record.demoted,
    )  # fmt: skip


def said_by(manifest: Manifest) -> tuple[object, ...]:
    return said(summarize(manifest).record())


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = MockClock()
        self.seeds = dict.fromkeys(PARTS, 0)
        self.copies: list[bytes] = []
        self.paused: Session | None = None
        self.kept = {
            name: getattr(history_module, name) for name in ("INDEX_FROM", "BEHIND", "BEHIND_AT_CLOSE")
        }
        for name in self.kept:
            setattr(history_module, name, 1)

    @initialize(tick=st.sampled_from([1e-6, 1.0, 2.0]))
    def begin(self, tick: float) -> None:
        self.store = Clocked(tick)
        self.session = Session(self.store, self.clock)

    def teardown(self) -> None:
        for name, value in self.kept.items():
            setattr(history_module, name, value)
        if hasattr(self, "session"):
            self.session.close()

    @property
    def steps(self) -> list[int]:
        return [e.step for e in entries(self.store)]

    # ---- the run goes on ----------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.4, 1.1, 2.5, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.store.now += seconds

    @rule(part=st.sampled_from(PARTS), seed=st.integers(0, 9))
    def train(self, part: str, seed: int) -> None:
        self.seeds[part] = seed

    @rule(ahead=st.integers(0, 2), later=st.sampled_from([0.0, 0.4, 5.0, 6.0]))
    def save(self, ahead: int, later: float = 0.0) -> None:
        self.store.now += later
        state = {part: {"w": np.full(8192, seed, np.float64)} for part, seed in self.seeds.items()}
        step = max(self.steps, default=0) + ahead
        order = SaveOrder(Clock(step=step), {"loss": float(self.seeds["head"])}, ("test",))
        self.session.persist(take_snapshot(state, Arena(), rng=False).image, order)
        self.session.label_and_retain(Best("loss", "min"), None)
        assert self.store.names("checkpoints") == [e.key for e in entries(self.store)], (
            "no older state is left"
        )

    @precondition(lambda self: len(self.steps) > 1)
    @rule(pick=st.randoms(use_true_random=False), again=st.booleans())
    def remove(self, pick, again: bool) -> None:
        victims = pick.sample(self.steps[:-1], 1) if not again else self.steps[-1:]
        self.session.remove_steps(victims, {})
        if again:  # the key is used again, by another attempt
            self.save(1)

    @precondition(lambda self: self.steps)
    @rule(pick=st.randoms(use_true_random=False))
    def tag(self, pick) -> None:
        holdfast.Run(self.store, time=self.clock).tag("mine", pick.choice(self.steps))

    @precondition(lambda self: self.steps)
    @rule(pick=st.randoms(use_true_random=False))
    def demote(self, pick) -> None:
        _, whole = self.session.history.manifests[pick.choice(self.steps)]
        lighter = msgspec.structs.replace(whole, parts={"head": whole.parts["head"]}, demoted=True)
        self.session.history.take(commit(self.store, lighter, self.session.lease), lighter)
        self.session._known = None

    @precondition(lambda self: self.steps)
    @rule(pick=st.randoms(use_true_random=False))
    def go_on_from(self, pick) -> None:
        step = pick.choice(self.steps)
        self.session.abandon_after(step, "test")
        self.session.parent = self.session.history.summary(step).attempt

    @rule(how=st.sampled_from(["closed", "died", "paused"]))
    def another_process_takes_over(self, how: str) -> None:
        if how == "closed":
            self.session.close()
        else:
            self.session.lease.forget()
        self.paused = self.session if how == "paused" else self.paused
        self.session = Session(self.store, self.clock)

    @precondition(lambda self: self.paused)
    @rule()
    def the_paused_one_goes_on(self) -> None:
        self.paused.history.index(self.paused.lease)

    @rule()
    def look_again(self) -> None:
        self.session.history.refresh()

    @rule(days=st.sampled_from([0.5, 2.0]))
    def reclaim_everything(self, days: float) -> None:
        self.session.close()
        collect(self.store, ages=Ages(now=2.0**40))
        needed = {key for m in scan(self.store) for key in m.file_keys}
        assert {o.key for o in self.store.list("data")} == needed
        self.session = Session(self.store, self.clock)

    # ---- the index suffers --------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["before", "after"]))
    def the_next_index_fails(self, how: str) -> None:
        self.store.index_fails = how

    @precondition(lambda self: INDEX in self.store._objects)
    @rule()
    def copy_the_index(self) -> None:
        self.copies.append(self.store.read(INDEX))

    @precondition(lambda self: self.copies)
    @rule(pick=st.randoms(use_true_random=False))
    def put_an_old_index_back(self, pick) -> None:
        self.store.put_index(pick.choice(self.copies))

    @precondition(lambda self: INDEX in self.store._objects)
    @rule(how=st.sampled_from(["gone", "cut", "flipped", "of another run"]), at=st.integers(0, 400))
    def spoil(self, how: str, at: int) -> None:
        raw = bytearray(self.store.read(INDEX))
        if how == "gone":
            return self.store.delete([INDEX])
        if how == "cut":
            raw = raw[: at % (len(raw) or 1)]
        elif how == "flipped" and raw:
            raw[at % len(raw)] ^= 0x10
        elif not raw.startswith(b'{"format":1') or not raw.endswith(b'"}\n'):
            return None  # spoilt before
        else:  # what lies there says other things of objects of the same size and age
            head = bytes(raw[: -len(SEAL)]).replace(b'"attempt":"', b'"attempt":"f')
            raw = bytearray(seal(head.replace(self.session.identity.run.encode(), b"0" * 32) + b"}"))
        return self.store.put_index(bytes(raw))

    # ---- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def everybody_sees_what_the_manifests_say(self) -> None:
        truth = [said_by(m) for m in scan(self.store)]
        run = holdfast.Run(self.store, time=self.clock)
        records = run.records()
        assert [said(r) for r in records] == truth
        assert not run.broken
        assert [said(r) for r in self.session.history.records()] == truth
        without = History(self.store, "no such run")
        assert records == without.records(), "tags and the log included"
        for keep in (last(1), last(2)):
            assert run.plan(keep) == plan(without.records(), keep, now=self.clock.now())
        if truth:
            newest = scan(self.store)[-1]
            assert holdfast.Run(self.store).latest.manifest == newest
            assert holdfast.Run(self.store)[newest.step].manifest == newest
        for name, step in run.tags.items():
            assert holdfast.Run(self.store)[name].manifest == read_entry(self.store, run.history.entry(step))

    @invariant()
    def what_any_manifest_needs_is_there(self) -> None:
        there = {o.key for o in self.store.list("data")}
        for key in [*self.store.names("checkpoints"), *self.store.names("trash")]:
            assert set(read_summary(self.store, key).sizes()) <= there, key


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestMachine = Machine.TestCase


# ---- what is proven -------------------------------------------------------------------------------------------------


def written(store: Clocked) -> Index:
    """Store an index of all that is there."""
    held = acquire(store, MockClock(), heartbeat=False)
    known = {e.key: summarize(read_entry(store, e)) for e in entries(store)}
    index = Index(store, "r")
    index.rewrite(known, held)
    held.release()
    return index


@pytest.mark.parametrize("tick", [1e-6, 1.0, 2.0])
def test_a_key_that_is_used_again_at_the_same_moment_is_not_mistaken(tick: float) -> None:
    store = Clocked(tick)
    put(store, manifest(1, "aa"))
    written(store)
    store.delete(["checkpoints/000000000001.json"])
    put(store, manifest(1, "bb"))
    store.now += 100
    put(store, manifest(2, "cc"))
    assert [r.attempt for r in History(store, "r").records()] == ["bb", "cc"]


def test_a_holder_that_lost_the_lease_writes_no_index_of_what_another_made() -> None:
    store = Clocked()
    put(store, manifest(1, "aa"))
    paused = acquire(store, MockClock(), heartbeat=False)
    known = {e.key: summarize(read_entry(store, e)) for e in entries(store)}
    paused.forget()
    store.delete(["checkpoints/000000000001.json"])
    store.now += 10
    put(store, manifest(1, "bb"))
    store.now += 10
    put(store, manifest(2, "cc"))
    with pytest.raises(LeaseLost):
        Index(store, "r").rewrite(known, paused)
    assert [r.attempt for r in History(store, "r").records()] == ["bb", "cc"]


def test_a_reader_that_looks_again_sees_who_took_a_key() -> None:
    store = Clocked()
    put(store, manifest(1, "aa"))
    store.now += 10
    put(store, manifest(2, "bb"))
    history = History(store, "r")
    assert [r.attempt for r in history.records()] == ["aa", "bb"]
    store.delete(["checkpoints/000000000001.json"])
    put(store, manifest(1, "cc"))
    assert [r.attempt for r in history.records()] == ["aa", "bb"], "as of the last look"
    history.refresh()
    assert [r.attempt for r in history.records()] == ["cc", "bb"]


def test_what_is_not_listed_is_not_believed() -> None:
    store = Clocked()
    put(store, manifest(1, "aa"))
    store.now += 10
    put(store, manifest(2, "bb"))
    written(store)
    store.delete(["checkpoints/000000000001.json"])
    history = History(store, "r")
    assert history.steps == [2]


def test_an_index_does_not_hide_damage_that_changed_the_object_and_open_always_reads() -> None:
    store = Clocked()
    first, second = put(store, manifest(1, "aa"), manifest(2, "bb"))
    store.now += 10
    put(store, manifest(3, "cc"))
    written(store)
    store.now += 10
    raw = store.read(first.key)
    store.replace(first.key, raw.replace(b'"step":1', b'"step":3'))
    store._objects[second.key] = (
        raw,
        store._objects[second.key][1],
    )  # bit rot leaves size and time as they are
    history = History(store, "r")
    assert list(history.broken) == [1]
    assert history.steps == [2, 3]
    with pytest.raises(HoldfastError, match=second.key):
        history.resolve(2)
    assert history.steps == [3]


def test_a_damaged_index_is_a_problem_that_verify_names_and_nothing_else(eager: None) -> None:
    store = Clocked()
    holdfast.save(store, {"a": {"w": np.ones(3)}}, step=1)
    store.now += 10
    holdfast.save(store, {"a": {"w": np.ones(3)}}, step=2)
    assert INDEX in store._objects
    check_index(store)
    raw = store.read(INDEX)
    store.replace(INDEX, raw.replace(b'"step":1', b'"step":3'))
    with pytest.raises(DigestMismatch, match=INDEX):
        check_index(store)
    run = holdfast.Run(store)
    assert [p.key for p in run.verify_beside()] == [INDEX]
    assert run.steps == [1, 2]
    holdfast.save(store, {"a": {"w": np.ones(3)}}, step=3)
    assert run.verify_beside() == []


def test_an_index_of_another_run_is_not_believed() -> None:
    store = Clocked(2.0)
    put(store, manifest(1, "aa"))
    store.now += 10
    put(store, manifest(2, "bb"))
    written(store)
    raw = store.read(INDEX)
    store.put_index(seal(raw[: -len(SEAL)].replace(b'"aa"', b'"zz"') + b"}"))
    assert [r.attempt for r in History(store, "r").records()] == ["zz", "bb"], "a forged one would be"
    assert [r.attempt for r in History(store, "other").records()] == ["aa", "bb"]


def test_a_later_version_of_the_index_is_passed_over() -> None:
    store = Clocked()
    put(store, manifest(1, "aa"))
    store.replace(INDEX, seal(b'{"format":2,"run":"r","manifests":7}'))
    check_index(store)
    history = History(store, "r")
    assert history.steps == [1]


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.fixture
def long() -> Clocked:
    """A run of a thousand checkpoints, with an index of them but for the newest few."""
    store = Clocked()
    holdfast.save(store, {"model": {"w": np.ones(4)}}, step=0, tag="first")
    (entry,) = entries(store)
    one = read_entry(store, entry)
    held = acquire(store, MockClock(), heartbeat=False)
    for step in range(1, 1000):
        store.now += 5
        commit(store, msgspec.structs.replace(one, step=step, attempt=f"{step:08x}"), held)
    held.release()
    Session(store, MockClock()).close()
    assert len(store.read(INDEX)) > 100_000
    return store


def test_one_checkpoint_costs_one_manifest_however_many_there_are(long: Clocked) -> None:
    for which in ("latest", "first", 500, "500"):
        assert long.manifests_read(lambda which=which: holdfast.Run(long)[which]) <= 2
        assert INDEX not in long.reads
        assert len(long.reads) <= 4  # run.json, the tag


def test_the_whole_history_costs_the_manifests_that_are_not_in_the_index(long: Clocked) -> None:
    acts: tuple[Callable[[holdfast.Run], object], ...] = (
        holdfast.Run.records,
        lambda run: run.plan(last(10)),
        lambda run: run.steps,
        lambda run: run.tags,
    )
    for act in acts:
        assert long.manifests_read(lambda act=act: act(holdfast.Run(long))) <= 2


def test_a_save_costs_what_changed(long: Clocked) -> None:
    session = Session(long, MockClock())
    reads = []
    for step in range(1000, 1006):
        long.now += 5
        image = take_snapshot({"model": {"w": np.full(4, step)}}, Arena(), rng=False).image
        order = SaveOrder(Clock(step=step), {"loss": 1.0 / step}, ("test",))

        def save(image=image, order=order) -> None:
            session.persist(image, order)
            session.label_and_retain(Best("loss", "min"), last(1000))

        reads.append(long.manifests_read(save))
        assert INDEX not in long.reads
        assert sum(key.startswith("tags/") for key in long.reads) <= 2, "one pass over the tags"
    assert len(session.history.steps) == 1001, "the tagged one and a thousand"
    assert reads[0] <= 1  # what it builds on
    assert reads[1:] == [0] * 5
    session.close()


def test_setting_aside_and_removing_cost_no_reading(long: Clocked) -> None:
    session = Session(long, MockClock())
    assert (
        long.manifests_read(lambda: session.abandon_after(900, "test")) == 99
    )  # each is copied to the trash
    assert long.manifests_read(lambda: session.remove_steps([10, 20], {})) == 0
    session.close()


def test_the_index_is_written_seldom(long: Clocked) -> None:
    session = Session(long, MockClock())
    written = []
    replace = long.replace
    long.replace = lambda key, data: (written.append(key), replace(key, data))  # type: ignore[method-assign,assign,return-value]
    for step in range(1000, 1150):
        long.now += 5
        image = take_snapshot({"model": {"w": np.ones(4)}}, Arena(), rng=False).image
        session.persist(image, SaveOrder(Clock(step=step), {}, ("test",)))
        session.label_and_retain(None, None)
    assert written.count(INDEX) == 2
    session.close()
    assert written.count(INDEX) == 3
    assert long.manifests_read(holdfast.Run(long).records) <= 1
