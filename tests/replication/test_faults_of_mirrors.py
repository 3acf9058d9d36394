"""What may go wrong while a run comes back or its mirrors are fed: kills at every call, signals under a deadline."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import holdfast
from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.core.errors import NotReplicated, StoreError
from holdfast.replication.recovery import bring_back, mend
from holdfast.replication.replicas import Ack, Replicas
from holdfast.stores import LocalStore, MemoryStore, ObjectInfo
from holdfast.testing import Crash, FaultStore, MockClock, every_call
from patience import TIMEOUT, until
from replication.places import flip
from replication.runs import (
    assert_sound,
    attempts,
    copy_of,
    left_over,
    reconcile,
    roll_back,
    save,
    steps,
    train,
)


@pytest.fixture
def pair() -> tuple[MemoryStore, MemoryStore]:
    """A run with a mirror that holds all of it, and tags."""
    primary, mirror = MemoryStore("primary"), MemoryStore("mirror")
    train(primary, 3)
    holdfast.Run(primary).tag("good", 1)
    reconcile(primary, mirror)
    return primary, mirror


@pytest.mark.parametrize("ack", ["local", "all"])
def test_mirrors_that_cannot_be_told_of_a_checkpoint_are_not_waited_for(ack: Ack) -> None:
    class Away(MemoryStore):
        gone = False

        def names(self, prefix: str, after: str = "") -> list[str]:
            if self.gone:
                raise StoreError("no service answers")
            return super().names(prefix, after)

        def list(self, prefix: str) -> list[ObjectInfo]:
            self.names(prefix)
            return super().list(prefix)

    primary, clock = Away("primary"), MockClock()
    train(primary, 2)
    run = read_identity(primary).run
    replicas = Replicas(primary, [MemoryStore("mirror")], ack=ack, time=clock)
    replicas.tell(History(primary), run, 1)
    until(lambda: replicas.keepers[0].is_complete(1), "the mirror to have it")
    primary.gone = True
    replicas.tell(History(primary), run, 1)
    before = clock.monotonic()
    with pytest.raises(NotReplicated) if ack == "all" else contextlib.nullcontext():
        replicas.catch_up()
    assert clock.monotonic() == before
    primary.gone = False
    replicas.tell(History(primary), run, 1)
    until(lambda: replicas.keepers[0].is_complete(3), "the mirror to have all")
    replicas.catch_up()
    replicas.stop()


@pytest.mark.parametrize("when", ["before", "after", "torn"])
@pytest.mark.parametrize("lost", ["everything", "the newest"])
def test_a_coming_back_that_is_killed_anywhere_is_done_by_the_next(
    pair: tuple[MemoryStore, MemoryStore], when: str, lost: str
) -> None:
    primary, mirror = pair
    if lost == "everything":
        start = MemoryStore("primary")
    else:
        start = copy_of(primary)
        gone = [k for k in start.names("") if "000000000003" in k and not k.startswith("log")]
        start.delete(gone)
    before = {o.key: mirror.read(o.key) for o in mirror.list("")}
    killed = 0
    for plan in every_call("kill", when):  # type: ignore[arg-type]
        store = copy_of(start)
        try:
            bring_back(FaultStore(store, plan), [mirror], MockClock())
        except Crash:
            killed += 1
        brought = bring_back(store, [mirror], MockClock())
        assert max(steps(store)) == 3
        assert brought.keys() <= {1, 3}
        assert attempts(store)[3] == attempts(primary)[3]
        assert holdfast.Run(store).tags == {"good": 1} or not plan.fired or lost == "everything"
        save(store, 4)  # the lease is free, the log has room
        assert_sound(store)
        assert not left_over(store)
    assert killed > 5
    assert {o.key: mirror.read(o.key) for o in mirror.list("")} == before, "a mirror is only read"


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "timeout"])
def test_a_mending_that_fails_anywhere_has_harmed_nothing(
    pair: tuple[MemoryStore, MemoryStore], kind: str
) -> None:
    primary, mirror = pair
    (bad,) = [k for k in primary.names("data") if "000000000003" in k and "/model." in k]
    whole = primary.read(bad)
    key = "checkpoints/000000000003.json"
    for plan in every_call(kind):
        store = copy_of(primary)
        flip(store, bad, len(whole) - 3)
        damaged = {o.key: store.read(o.key) for o in store.list("data")}
        done = mend(FaultStore(store, plan), key, [mirror])
        after = {o.key: store.read(o.key) for o in store.list("data")}
        assert after == (damaged if not done else {**damaged, bad: whole})
        assert mend(store, key, [mirror]) or done
        assert store.read(bad) == whole
        assert_sound(store)


def test_the_nearest_whole_copy_is_taken(tmp_path: pathlib.Path) -> None:
    primary = MemoryStore("primary")
    train(primary, 2)
    first, second = LocalStore(tmp_path / "first"), LocalStore(tmp_path / "second")
    for mirror in (first, second):
        reconcile(primary, mirror)
    (bad,) = [k for k in first.names("data") if "000000000002" in k and "/model." in k]
    flip(first, bad, first.info(bad).size - 3)
    store = MemoryStore("new")
    assert bring_back(store, [first, second], MockClock()) == {2: second.url}
    assert_sound(store)


def test_two_mirrors_that_differ_bring_the_newest_of_both(tmp_path: pathlib.Path) -> None:
    primary = MemoryStore("primary")
    train(primary, 2)
    behind, ahead = LocalStore(tmp_path / "behind"), LocalStore(tmp_path / "ahead")
    reconcile(primary, behind)
    train(primary, 4)
    reconcile(primary, ahead)
    store = MemoryStore("new")
    assert bring_back(store, [behind, ahead], MockClock()) == {4: ahead.url}


def test_a_mirror_that_missed_a_rollback_brings_nothing_of_it(tmp_path: pathlib.Path) -> None:
    primary = MemoryStore("primary")
    train(primary, 4)
    stale, fresh = LocalStore(tmp_path / "stale"), LocalStore(tmp_path / "fresh")
    reconcile(primary, stale)
    roll_back(primary, 1, 2)
    reconcile(primary, fresh)
    assert bring_back(primary, [stale, fresh], MockClock()) == {}
    assert steps(primary) == [1, 2]


TRAINER = """
import sys, time
import numpy as np
from holdfast import Checkpointer, every
from holdfast.replication.replicas import Replicas
from holdfast.stores import LocalStore

catch_up = Replicas.catch_up
def sooner(self, seconds=None):
    print("may wait", seconds, flush=True)
    catch_up(self, seconds / 60)
Replicas.catch_up = sooner

class Stuck(LocalStore):
    "A mirror whose disk hangs."
    def write_streams(self, streams):
        print("stuck", flush=True)
        time.sleep(1000)

held = {"w": np.zeros(50)}
ckpt = Checkpointer(sys.argv[1], held, mirrors=[Stuck(sys.argv[2])], save=every(steps=5), deadline_seconds=60,
                    writer=sys.argv[3])
for step in ckpt.steps(10**6):
    held["w"][:] = step
    print("step", step, flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_stuck_mirror_holds_up_neither_training_nor_the_end(tmp_path: pathlib.Path, writer: str) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(run), str(tmp_path / "mirror"), writer],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    )  # fmt: skip
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if any("stuck" in one for one in seen) and len(seen) > 40:  # two threads print, perhaps in one line
            break
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM, errors
    [seconds] = re.findall(r"may wait (\S+)", said)
    assert 0 < float(seconds) < 60, "what is left of the deadline"
    assert "no new checkpoint" not in errors
    assert steps(LocalStore(run))[-1] >= 30


FORGETFUL = """
import sys
import numpy as np
from holdfast import Checkpointer, every
from holdfast.replication import Mirror
held = {"w": np.zeros(200_000)}
ckpt = Checkpointer(sys.argv[1], held, mirrors=[Mirror(sys.argv[2], compress=True, verify=True)], ack="all")
held["w"][:] = 1
ckpt.save()
"""


def test_a_program_that_forgets_close_ends_when_its_mirrors_hold_it(tmp_path: pathlib.Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    subprocess.run([sys.executable, "-c", FORGETFUL, str(run), str(mirror)], check=True, timeout=120)
    assert attempts(LocalStore(mirror)) == attempts(LocalStore(run)) != {}
    assert_sound(LocalStore(mirror))


@pytest.mark.parametrize("known_by", ["the log", "its own bytes"])
def test_what_training_has_given_up_takes_no_place_of_what_is_damaged(
    pair: tuple[MemoryStore, MemoryStore], known_by: str
) -> None:
    primary, behind = pair
    key = "checkpoints/000000000003.json"
    roll_back(primary, 1, 3)
    assert behind.names("checkpoints", after=key) == primary.names("checkpoints", after=key)
    raw = primary.read(key)
    assert behind.read(key) != raw
    if known_by == "the log":
        primary.replace(key, b"")
    else:
        flip(primary, key, len(raw) // 2)
        primary.delete([*primary.names("log"), *primary.names("trash")])
    damaged = {o.key: primary.read(o.key) for o in primary.list("")}
    assert mend(primary, key, [behind]) == []
    assert {o.key: primary.read(o.key) for o in primary.list("")} == damaged
    ahead = copy_of(behind)
    ahead.replace(key, raw)
    for data in copy_of(primary).names("data"):
        ahead.replace(data, primary.read(data))
    assert mend(primary, key, [behind, ahead])
    assert primary.read(key) == raw
