"""Histories that nobody wrote down: saves, deletions, crashes, power cuts, damage, rivals, clocks that jump, mirrors that
come and go, in any order. What was acknowledged is the model; the promises are asked after every step."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import holdfast
from crash import ledger
from crash.operations import state
from holdfast import Run, last
from holdfast.catalog import lease, tidiness
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError
from holdfast.loop.session import SaveOrder, Session
from holdfast.replication.looking import look
from holdfast.replication.reconcile import Goal, Reconciler
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import (
    Crash,
    Fault,
    FaultPlan,
    FaultStore,
    MockClock,
    ModelService,
    ModelStore,
    PowerLossDisk,
    forget_this_process,
    invariants,
    lay_out,
)
from holdfast.testing.invariants import Broken

ROW = "random histories (crash, power cut, damage, rival, clock, mirror)"
PLACES = ("memory", "objects", "disk")
CELLS = [(ROW, place) for place in PLACES]
WHENS = st.sampled_from(["before", "after", "torn"])
KINDS = st.sampled_from(["EIO", "ENOSPC", "timeout", "503"])
SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
steps_tried = 0


class Histories(RuleBasedStateMachine):
    """One run in one place, and a mirror of it. `saved` is all that was ever tried, by step; `acknowledged` what must be
    there; `damaged` the steps that somebody broke on purpose."""

    place = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
        self.clock = MockClock()
        self.plain: Store = {
            "memory": MemoryStore,
            "objects": lambda: ModelStore(ModelService(time=self.clock)),
            "disk": lambda: LocalStore(self.scratch / "run"),
        }[self.place]()
        self.mirror: Store = MemoryStore("mirror")
        self.down = False
        self.saved: set[int] = set()
        self.acknowledged: set[int] = set()
        self.open: set[int] = set()  # deletions and saves whose outcome nobody was told
        self.damaged: set[int] = set()
        self.next = 1

    def teardown(self) -> None:
        forget_this_process()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # ---- acts -------------------------------------------------------------------------------------------------------

    def save(self, store: Store) -> None:
        step, self.next = self.next, self.next + 1
        self.saved.add(step)
        self.open.add(step)
        session = Session(store, self.clock)
        try:
            image = take_snapshot(state(step), Arena(), rng=False).image
            session.persist(image, SaveOrder(Clock(step=step), {"loss": 1.0 / step}, ("asked for",)))
        except BaseException:
            with contextlib.suppress(HoldfastError):
                session.close()
            raise
        self.acknowledged.add(step)
        self.open.discard(step)
        session.close()

    def prune(self, store: Store, keep: int) -> None:
        self.open |= self.acknowledged
        # No rule lets the newest go; after a crash that may be one which nobody was told of.
        self.acknowledged &= set(Run(self.plain, time=self.clock).steps[-1:])
        gone = {d.step for d in Run(store, time=self.clock).prune(last(keep), grace=0) if d.action == "drop"}
        self.acknowledged |= self.open - gone - self.unlisted()
        self.open -= gone | self.acknowledged

    def unlisted(self) -> set[int]:
        run = Run(self.plain, time=self.clock)
        return self.saved - set(run.steps)

    @initialize()
    def begin(self) -> None:
        self.save(self.plain)

    @rule()
    def save_well(self) -> None:
        self.save(self.plain)

    @rule(keep=st.integers(1, 3))
    def prune_well(self, keep: int) -> None:
        with contextlib.suppress(HoldfastError):  # a broken tag or manifest stays what it is
            self.prune(self.plain, keep)

    @rule(name=st.sampled_from(["best", "kept"]))
    def tag(self, name: str) -> None:
        run = Run(self.plain, time=self.clock)
        if run.steps:
            with contextlib.suppress(IntegrityError):
                run.tag(name, run.steps[0])
                run.untag(name)

    @rule(at=st.integers(1, 40), when=WHENS, pruning=st.booleans())
    def crash(self, at: int, when: str, pruning: bool) -> None:
        store = FaultStore(self.plain, FaultPlan(Fault("kill", at, when)))  # type: ignore[arg-type]
        with contextlib.suppress(Crash, HoldfastError):
            self.prune(store, 1) if pruning else self.save(store)
        forget_this_process()

    @rule(at=st.integers(1, 30), kind=KINDS, when=WHENS, sticky=st.booleans())
    def fail(self, at: int, kind: str, when: str, sticky: bool) -> None:
        fault = Fault(kind, at, when, times=None if sticky else 1)  # type: ignore[arg-type]
        with contextlib.suppress(HoldfastError):
            self.save(FaultStore(self.plain, FaultPlan(fault)))

    @precondition(lambda self: self.place == "disk")
    @rule(at=st.floats(0, 1), number=st.integers(0, 30))
    def power_cut(self, at: float, number: int) -> None:
        """The power goes during a save: one of the images that may be left is what there is from now on."""
        root = self.scratch / "run"
        disk = PowerLossDisk(self.scratch)
        before = set(self.acknowledged)
        step = self.next
        self.save(LocalStore(root, disk))
        disk.mark("acknowledged")
        moments = len(disk.calls)
        for moment in disk.moments():
            if moment.position >= at * moments:
                images = list(moment.images(4, seed=number))
                shutil.rmtree(root)
                lay_out(images[number % len(images)], self.scratch)
                if not moment.marks:
                    self.acknowledged = before
                    self.open.add(step)
                break
        forget_this_process()

    @rule(pick=st.integers(0, 10**6), bit=st.integers(0, 7))
    def damage(self, pick: int, bit: int) -> None:
        """A bit flips in a data file; it is mended from the mirror, or by hand, later or never."""
        keys = self.plain.names("data")
        if len(keys) < 2 or self.damaged:
            return
        key = keys[pick % len(keys)]
        raw = bytearray(self.plain.read(key))
        raw[pick % len(raw)] ^= 1 << bit
        run = Run(self.plain, time=self.clock)
        hit = {s for s in run.steps if key in run[s].manifest.file_keys}
        if len(hit) == len(run.steps):
            return  # so that there is something to go on from
        self.plain.replace(key, bytes(raw))
        self.damaged |= hit
        self.acknowledged -= hit

    @rule()
    def remove_damaged(self) -> None:
        if self.damaged:
            run = Run(self.plain, time=self.clock)
            run.remove([s for s in self.damaged if s in run.steps], force=True, grace=0)
            self.saved -= self.damaged
            self.damaged = set()

    @rule()
    def rival_is_refused(self) -> None:
        """A second client, on another machine, while the first holds the run."""
        session = Session(self.plain, self.clock)
        try:
            with mock.patch.object(lease, "namespace", return_value="another machine"):
                try:
                    self.save(self.plain)
                except holdfast.HoldfastError:
                    self.open.discard(self.next - 1)
                    self.saved.discard(self.next - 1)
                else:
                    raise Broken("I7", "a second writer got the run while the first held it")
        finally:
            session.close()

    @rule()
    def rival_takes_over(self) -> None:
        """The first sleeps past its lease; a second saves; the first's late save is refused."""
        first = Session(self.plain, self.clock)
        self.clock.advance(lease.LEASE_SECONDS + 1)
        with mock.patch.object(lease, "namespace", return_value="another machine"):
            self.save(self.plain)
        late = self.next
        image = take_snapshot(state(late), Arena(), rng=False).image
        try:
            first.persist(image, SaveOrder(Clock(step=late), {}, ("asked for",)))
        except HoldfastError:
            pass
        else:
            raise Broken("I7", "a late save was acknowledged")
        finally:
            self.saved.add(late)
            self.open.add(late)
            self.next += 1
            with contextlib.suppress(HoldfastError):
                first.close()

    @rule(seconds=st.sampled_from([-7200.0, -1.0, 1.0, 59.0, 61.0, 7200.0, 90_000.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.clock.time += seconds

    @rule()
    def mirror_goes_or_comes(self) -> None:
        self.down = not self.down

    @rule()
    def reconcile(self) -> None:
        run = Run(self.plain, time=self.clock)
        fault = [Fault("timeout", call="*", times=None)] if self.down else []
        target = FaultStore(self.mirror, FaultPlan(*fault))
        with contextlib.suppress(HoldfastError):
            Reconciler(target, Goal(), self.clock).run(look(run.history, run.id))

    # ---- promises -----------------------------------------------------------------------------------------------------

    @invariant()
    def promises(self) -> None:
        global steps_tried
        steps_tried += 1
        invariants.old_stays_readable(self.plain, {s: state(s) for s in self.acknowledged})
        run = Run(self.plain, time=self.clock)
        for step in run.steps:
            try:
                found = holdfast.load(self.plain, step=step, as_="numpy")
            except IntegrityError:
                if step not in self.damaged:
                    raise Broken("I2", f"step {step} is listed and half, and nobody damaged it") from None
                continue
            if step not in self.saved or not invariants.same(found, state(step)):
                raise Broken("I4", f"step {step} gives values that nobody saved")
        with contextlib.suppress(holdfast.HoldfastError):
            mirrored = Run(self.mirror, time=self.clock)
            for step in mirrored.steps:
                if not invariants.same(holdfast.load(self.mirror, step=step, as_="numpy"), state(step)):
                    raise Broken("I12", f"the mirror gives other values for step {step}")
            if mirrored.steps:
                invariants.replicas_agree(self.plain, self.mirror)


def check(place: str) -> None:
    global steps_tried
    steps_tried = 0
    machine = type(f"HistoriesIn{place.title()}", (Histories,), {"place": place})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=ledger.budget(12, 100),
            stateful_step_count=ledger.budget(14, 30),
            deadline=None,
            derandomize=not ledger.LONG,
            database=None,
            print_blob=True,
        ),
    )
    ledger.count(ROW, place, steps_tried)


def test_in_memory() -> None:
    check("memory")


def test_in_an_object_store() -> None:
    check("objects")


def test_on_a_disk() -> None:
    with mock.patch.object(tidiness, "MARK_FROM", 0):
        check("disk")
