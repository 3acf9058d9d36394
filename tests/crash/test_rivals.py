"""Several processes at one run, in every order of their store calls that a seed makes: never two winners, never a
reachable byte lost. Each has a lease of its own, from another machine, and the clock may jump past it at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import holdfast
from crash import ledger
from crash.operations import state, truth, two_checkpoints
from holdfast import Run, last
from holdfast.catalog import lease
from holdfast.core.clock import Clock
from holdfast.core.errors import CommitConflict, CommitUnknown, HoldfastError, LeaseHeld, LeaseLost
from holdfast.loop.session import SaveOrder, Session
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import MockClock, ModelService, ModelStore, Turns, forget_this_process, invariants

LOST = (LeaseHeld, LeaseLost, CommitConflict)
SHARED: dict[str, Callable[[Path], Store]] = {
    "memory": lambda root: MemoryStore(),
    "objects": lambda root: ModelStore(ModelService()),
    "disk": LocalStore,
}


class Rivals:
    """Clients of one run that take turns; `believed` is what each was told that it committed."""

    def __init__(self, plain: Store, seed: int, order: list[str] | None = None) -> None:
        self.plain = plain
        self.clock = MockClock(now=2_000_000_000.0)
        self.turns = Turns(seed=seed, order=order or ())
        self._pauses = random.Random(seed).choices((1, 5, 15, 40), k=2)
        self.believed: dict[str, list[tuple[str, str]]] = {}
        self.outcomes: dict[str, object] = {}

    def write(self, name: str, steps: list[int]) -> Callable[[], None]:
        def act() -> None:
            told = self.believed.setdefault(name, [])
            session = Session(self.turns.store(self.plain), self.clock)
            try:
                for step in steps:
                    image = take_snapshot(state(step), Arena(), rng=False).image
                    manifest = session.persist(image, SaveOrder(Clock(step=step), {}, ("asked for",)))
                    told.append((session.history.entry(step).key, manifest.attempt))
            finally:
                session.close()

        return act

    def collect(self) -> None:
        Run(self.turns.store(self.plain), time=self.clock).prune(last(1))

    def jump(self) -> None:
        """Let every lease expire, after some calls of the others, and again."""
        for pauses in self._pauses:
            for _ in range(pauses):
                self.turns.pause()
            self.clock.advance(lease.LEASE_SECONDS + 1)

    def run(self, acts: dict[str, Callable[[], None]]) -> None:
        self.outcomes = self.turns.run(acts)
        for name, outcome in self.outcomes.items():
            if isinstance(outcome, BaseException) and not isinstance(outcome, LOST):
                # A rival may have removed what is read right now; nothing else may go wrong.
                assert isinstance(outcome, HoldfastError), f"{name}: {outcome!r}"
                assert not isinstance(outcome, CommitUnknown), f"{name}: {outcome!r}"


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client is on a machine of its own: nobody sees whether another's process lives."""
    monkeypatch.setattr(lease, "namespace", lambda: f"machine of {threading.current_thread().name}")


CASTS: dict[str, Callable[[Rivals], dict[str, Callable[[], None]]]] = {
    "two writers": lambda r: {"a": r.write("a", [3, 4]), "b": r.write("b", [3, 4])},
    "two collectors": lambda r: {"a": r.collect, "b": r.collect},
    "writer and collector": lambda r: {"a": r.write("a", [3, 4]), "b": r.collect},
    "two writers and a collector": lambda r: {"a": r.write("a", [3]), "b": r.write("b", [4]), "c": r.collect},
}
OPERATION_OF = {"two collectors": "prune", "writer and collector": "prune"}
PAUSED = ", one paused past its lease"
STOPPED = "owner stopped past its lease (SIGSTOP)"
CELLS = [(cast + paused, OPERATION_OF.get(cast, "save")) for cast in CASTS for paused in ("", PAUSED)] + [
    (STOPPED, "save")
]


@pytest.mark.parametrize("paused", [False, True], ids=["in time", "past the lease"])
@pytest.mark.parametrize("where", SHARED)
@pytest.mark.parametrize("cast", CASTS)
def test_rivals(cast: str, where: str, paused: bool, machines: None, tmp_path: Path) -> None:
    rounds = ledger.budget(15 if where != "disk" else 5, 300 if where != "disk" else 60)
    commits = 0
    for seed in range(rounds):
        plain = SHARED[where](tmp_path / str(seed))
        two_checkpoints(plain)
        rivals = Rivals(plain, seed)
        acts = CASTS[cast](rivals)
        if paused:
            acts["clock"] = rivals.jump
        try:
            rivals.run(acts)
            forget_this_process()
            check(rivals, cast)
        except BaseException:
            print(f"{cast} in {where}, seed {seed}: {rivals.outcomes}\n{rivals.turns.trace}")
            raise
        commits += sum(map(len, rivals.believed.values()))
    assert commits or "writer" not in cast
    ledger.count(cast + (PAUSED if paused else ""), OPERATION_OF.get(cast, "save"), rounds)


def check(rivals: Rivals, cast: str) -> None:
    plain = rivals.plain
    invariants.commits_once(rivals.believed, plain)
    steps = invariants.promises(plain, {}, truth(1, 2, 3, 4))
    kept = [int(key[12:24]) for told in rivals.believed.values() for key, _ in told]
    assert steps, "nothing is left"
    assert max(steps) >= max([2, *kept]), f"{steps} are left of {kept}"
    if cast == "two writers":
        assert {1, 2} <= set(steps)
    rivals.clock.advance(10 * lease.LEASE_SECONDS)
    session = Session(plain, rivals.clock)  # the next owner, when all leases have ended
    session.close()
    left = invariants.left_over(plain)
    assert not left, f"what the losers left is not freed: {left}"


# ---- real processes -----------------------------------------------------------------------------------------------------

OWNER = """
    import sys
    import numpy as np
    from holdfast.catalog import lease
    lease.LEASE_SECONDS = 1.0
    lease.namespace = lambda: sys.argv[2]  # another machine: only the lease's end tells that the owner is gone
    from holdfast import Checkpointer
    held = {"w": np.zeros(300_000), "who": 0}
    with Checkpointer(sys.argv[1], held, writer="inline") as ckpt:
        ckpt.restore() if ckpt._engine.session.history.steps else None
        print("holds it", flush=True)
        for line in sys.stdin:
            held["w"] += 1
            ckpt.state["who"] = int(line)
            ckpt.save()
            print("saved", flush=True)
"""


def owner(root: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), str(root), name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def told(process: subprocess.Popen[str], who: int | None = None) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if who is not None:
        process.stdin.write(f"{who}\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_an_owner_that_sleeps_past_its_lease_wakes_up_to_nothing(tmp_path: Path) -> None:
    """SIGSTOP, a take-over, SIGCONT: the first owner's next save is refused, and what the second saved stays."""
    first = owner(tmp_path, "first")
    second = None
    try:
        assert told(first) == "holds it"
        assert told(first, 1) == "saved"
        os.kill(first.pid, signal.SIGSTOP)
        second = owner(tmp_path, "second")  # it waits until the lease has ended
        assert told(second) == "holds it"
        assert told(second, 2) == "saved"
        before = holdfast.open(tmp_path).manifest.attempt
        os.kill(first.pid, signal.SIGCONT)
        assert told(first, 3) == "", "a late save was acknowledged"
        assert first.wait(60) != 0
        assert first.stderr is not None
        assert "LeaseLost" in first.stderr.read()
        assert holdfast.open(tmp_path).manifest.attempt == before
        assert told(second, 4) == "saved"
        assert holdfast.load(tmp_path)["who"] == 4
        np.testing.assert_array_equal(holdfast.load(tmp_path)["w"], np.full(300_000, 3.0))
        assert not any(Run(tmp_path).verify().values())
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()
    ledger.count(STOPPED, "save", 1)
