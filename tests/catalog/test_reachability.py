"""Whatever is saved, shared, removed, set aside, reclaimed or cut short, and in whatever order: what is listed is whole.

A state machine over one run with the arrays of a model that changes in part from save to save, so that later
checkpoints refer to files of earlier ones. After each act every listed checkpoint must verify to the last byte and
give back its own values; once everything is reclaimed no data file may be left that nothing refers to.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from manifests import Interrupted, fail, set_aside

import holdfast
from holdfast.catalog import tidiness
from holdfast.catalog.deletion import Ages, collect
from holdfast.catalog.verify import verify_manifest
from holdfast.core.clock import Clock
from holdfast.core.errors import CommitUnknown, HoldfastError, StateError, StoreError
from holdfast.format.digest import BLOCK_BYTES
from holdfast.loop.session import SaveOrder, Session
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import Stream
from holdfast.testing import MockClock

LARGE = 8192  # float64: 64 KiB, the size from which a tensor has blocks of its own
PARTS = ("encoder", "head", "tail")


class Store(Interrupted):
    """Can be told to fail when the n-th next object is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_data_in: int | None = None

    def write_streams(self, streams: Iterable[Stream]) -> None:
        super().write_streams(map(self._unless_full, streams))

    def _unless_full(self, stream: Stream) -> Stream:
        if self.fail_data_in is not None:
            self.fail_data_in -= 1
            if self.fail_data_in < 0:
                self.fail_data_in = None
                raise StoreError(28, f"could not write {stream.key}: No space left on device")
        return stream


BLOCKS = 10  # of the table, of which a save may change some


def large(seed: int) -> np.ndarray:
    return np.full(LARGE, seed, np.float64)


def table(seeds: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.array(seeds, np.float64), LARGE).reshape(-1, 64)


class Run(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.clock = MockClock()
        self.seeds = dict.fromkeys(PARTS, 0)
        self.next_seed = 1
        self.looked_at: set[str] = set()
        self.saved: dict[int, dict[str, int]] = {}  # step -> what its arrays are filled with
        self.by_attempt: dict[str, dict[str, int]] = {}  # the same of all that was ever saved
        self.blocks = (0,) * BLOCKS
        self.tables: dict[int, tuple[int, ...]] = {}  # step -> what the table's blocks are filled with
        self.mark_from, tidiness.MARK_FROM = tidiness.MARK_FROM, 0
        self.block_bytes, BLOCK_BYTES[2] = BLOCK_BYTES[2], 8 * LARGE

    @initialize()
    def begin(self) -> None:
        self.session = Session(self.store, self.clock)

    def teardown(self) -> None:
        tidiness.MARK_FROM = self.mark_from
        BLOCK_BYTES[2] = self.block_bytes
        if hasattr(self, "session"):
            self.session.close()

    # ---- acts ---------------------------------------------------------------------------------------------------

    @rule(part=st.sampled_from(PARTS))
    def train(self, part: str) -> None:
        self.seeds[part] = self.next_seed
        self.next_seed += 1

    @rule(changed=st.sets(st.integers(0, BLOCKS - 1), min_size=1))
    def train_rows(self, changed: set[int]) -> None:
        self.blocks = tuple(self.next_seed if i in changed else seed for i, seed in enumerate(self.blocks))
        self.next_seed += 1

    @rule(part=st.sampled_from(PARTS), seed=st.integers(0, 3))
    def go_back_to_old_values(self, part: str, seed: int) -> None:
        self.seeds[part] = seed

    def _persist(self, step: int) -> None:
        state = {part: {"w": large(seed), "b": np.full(3, seed)} for part, seed in self.seeds.items()}
        state["table"] = {"rows": table(self.blocks)}
        order = SaveOrder(Clock(step=step), {}, ("test",))
        self.session.persist(take_snapshot(state, Arena(), rng=False).image, order)

    def _expect(self, step: int) -> None:
        self.saved[step] = dict(self.seeds)
        self.by_attempt[holdfast.Run(self.store)[step].manifest.attempt] = dict(self.seeds)
        self.tables[step] = self.blocks

    @rule(ahead=st.integers(0, 2))
    def save(self, ahead: int) -> None:
        step = max(self.saved, default=0) + ahead
        self._persist(step)
        self._expect(step)

    @rule(ahead=st.integers(0, 2), which=st.integers(0, 2))
    def run_out_of_space(self, ahead: int, which: int) -> None:
        self.store.fail_data_in = which
        step = max(self.saved, default=0) + ahead
        try:
            self._persist(step)
        except StoreError:
            return
        finally:
            self.store.fail_data_in = None
        self._expect(step)  # fewer files than that were new

    @rule(ahead=st.integers(0, 2))
    def fail_to_commit(self, ahead: int) -> None:
        self.store.before = fail
        try:
            self._persist(max(self.saved, default=0) + ahead)
        except StoreError:
            pass
        else:
            raise AssertionError("a commit that failed was acknowledged")

    @rule(ahead=st.integers(0, 2))
    def commit_without_an_answer(self, ahead: int) -> None:
        self.store.after = fail
        step = max(self.saved, default=0) + ahead
        try:
            self._persist(step)
        except CommitUnknown:
            self._expect(step)  # nobody knows, but it is there
        else:
            raise AssertionError("a commit without an answer was acknowledged")

    @precondition(lambda self: len(self.session.history.steps) > 1)
    @rule(pick=st.randoms(use_true_random=False), grace=st.sampled_from([0, 3600]))
    def remove_some(self, pick, grace: int) -> None:
        """As retention does: anything but the newest that this session knows."""
        steps = self.session.history.steps[:-1]
        victims = sorted(pick.sample(steps, pick.randint(1, len(steps))))
        self.session.remove_steps(victims, {}, grace_seconds=grace)
        for step in victims:
            del self.saved[step]

    @rule(pick=st.randoms(use_true_random=False))
    def bring_one_back(self, pick) -> None:
        """While the run is held; a step that was saved again is refused."""
        run = holdfast.Run(self.store, time=self.clock)
        trash = run.trash()
        if not trash:
            return
        one = pick.choice(trash)
        try:
            run.undelete(one.step, one.attempt)
        except StateError:
            assert one.step in self.saved
            return
        assert one.step not in self.saved
        self.saved[one.step] = self.by_attempt[one.attempt]
        self.session.history.refresh()

    @rule(grace=st.sampled_from([0.0, None]))
    def empty_the_trash(self, grace: float | None) -> None:
        before = holdfast.Run(self.store, time=self.clock).trash()
        self.session.upkeep.free_trash(grace)
        left = holdfast.Run(self.store, time=self.clock).trash()
        assert left == ([] if grace == 0.0 else before)

    @precondition(lambda self: self.saved)
    @rule(pick=st.randoms(use_true_random=False))
    def remove_any_from_outside(self, pick) -> None:
        self.session.close()
        victim = pick.choice(sorted(self.saved))
        holdfast.Run(self.store, time=self.clock).remove([victim], force=True, grace=0)
        del self.saved[victim]
        self._take_up()

    @precondition(lambda self: self.session.history.steps)
    @rule(pick=st.randoms(use_true_random=False))
    def go_on_from(self, pick) -> None:
        """As a restore of an older step does: what lies beyond is set aside."""
        self.session.history.refresh()
        step = pick.choice(self.session.history.steps)
        self.session.abandon_after(step, "test")
        self.session.parent = self.session.history.manifests[step][1].attempt
        self.seeds, self.blocks = dict(self.saved[step]), self.tables[step]
        for later in [s for s in self.saved if s > step]:
            del self.saved[later]

    @rule(orderly=st.booleans())
    def begin_anew(self, orderly: bool) -> None:
        """Another process takes the run up; the one before closed it, or died."""
        if orderly:
            self.session.close()
        else:
            self.session.lease.forget()
        self._take_up()

    @rule(whole=st.integers(0, 2))
    def die_amid_a_save(self, whole: int) -> None:
        """Some files of the attempt are there, and nobody is left to free them."""
        for name in PARTS[:whole]:
            self.store.write(f"data/{99:012d}-dead/{name}.safetensors", [b"x"])
        self.session.lease.forget()
        self._take_up()

    @precondition(lambda self: len(self.session.history.steps) > 1)
    @rule(again=st.booleans())
    def die_amid_a_removal(self, again: bool) -> None:
        """The name is gone and the bytes are there; then others hold the run, in good order."""
        step = self.session.history.steps[0]
        self.store.delete([key for key in self.store.names("checkpoints") if f"/{step:012d}" in key])
        del self.saved[step]
        self.session.lease.forget()
        self._take_up()
        if again:
            self.begin_anew(orderly=True)

    def _take_up(self) -> None:
        self.session = Session(self.store, self.clock)
        aside = {key for m in set_aside(self.store) for key in m.file_keys}
        needed = {key for step in self.saved for key in holdfast.Run(self.store)[step].manifest.file_keys}
        assert {o.key for o in self.store.list("data")} == needed | aside, (
            "who takes a run up finds left-overs"
        )

    @rule(days=st.sampled_from([0.5, 2.0]))
    def time_passes(self, days: float) -> None:
        self.clock.advance(days * 86400)

    # ---- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def what_is_listed_is_whole_and_right(self) -> None:
        run = holdfast.Run(self.store, time=self.clock)
        assert not run.broken
        assert run.steps == sorted(self.saved)
        for step, found in run.verify().items():
            assert not found, (step, [p.message for p in found])
            if (
                run[step].manifest.attempt in self.looked_at
            ):  # objects never change: what verifies has its values still
                continue
            self.looked_at.add(run[step].manifest.attempt)
            values = run[step].values()
            for part, seed in self.saved[step].items():
                assert values[part]["w"].tobytes() == large(seed).tobytes(), (step, part)
                assert values[part]["b"].tolist() == [seed] * 3
            assert values["table"]["rows"].tobytes() == table(self.tables[step]).tobytes(), step

    @invariant()
    def what_was_set_aside_keeps_its_bytes(self) -> None:
        for aside in set_aside(self.store):
            assert list(verify_manifest(self.store, aside)) == [], aside.step

    @rule()
    def reclaim_everything(self) -> None:
        collect(self.store, ages=Ages(now=2.0**40))
        run = holdfast.Run(self.store, time=self.clock)
        needed = {key for step in run.steps for key in run[step].manifest.file_keys}
        assert {o.key for o in self.store.list("data")} == needed
        assert self.store.list("trash") == []
        self.session.history.refresh()


Run.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestRun = Run.TestCase


def test_what_was_committed_without_an_answer_keeps_what_it_shares() -> None:
    run = Run()
    run.begin()
    run.save(1)
    run.train("head")
    run.commit_without_an_answer(1)
    run.train("encoder")
    run.save(1)
    run.session.remove_steps([1], {})
    del run.saved[1]
    run.what_is_listed_is_whole_and_right()
    assert run.saved.keys() == {2, 3}
    run.teardown()


def test_an_unchanged_array_is_stored_once() -> None:
    store, state = Store(), {part: {"w": large(i)} for i, part in enumerate(PARTS)}
    holdfast.save(store, state, step=1)
    before = sum(o.size for o in store.list("data"))
    holdfast.save(store, {**state, "head": {"w": large(9)}}, step=2)
    assert sum(o.size for o in store.list("data")) - before == 4096 + LARGE * 8
    assert holdfast.Run(store).remove([1], force=True) == 4096 + LARGE * 8
    assert not holdfast.Run(store).verify()[2]


def test_a_failed_save_never_hides_a_holdfast_error_behind_another() -> None:
    store = Store()
    store.fail_data_in = 0
    with pytest.raises(HoldfastError, match="No space left"):
        holdfast.save(store, {"a": {"w": large(1)}}, step=1)
