"""A plan does to a store and a disk what it says, once, where it says, and knows whether it did."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from holdfast.core.errors import AlreadyExists, OutOfSpace, PermissionDenied, StoreError
from holdfast.stores import LocalStore, MemoryStore, Store, Stream
from holdfast.testing import (
    Crash,
    CrashStore,
    Fault,
    FaultDisk,
    FaultPlan,
    FaultStore,
    StoreTests,
    every_call,
)


class TestAStoreWithoutFaults(StoreTests):
    """A plan of nothing changes nothing."""

    @pytest.fixture
    def store(self) -> Store:
        return FaultStore(MemoryStore(), FaultPlan())


def faulty(*faults: Fault, **how: object) -> tuple[FaultStore, MemoryStore]:
    inner = MemoryStore()
    return FaultStore(inner, FaultPlan(*faults, **how)), inner  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "raised"),
    [("EIO", StoreError), ("ENOSPC", OutOfSpace), ("EROFS", PermissionDenied), ("timeout", StoreError),
     ("409", StoreError), ("412", AlreadyExists), ("429", StoreError), ("500", StoreError), ("503", StoreError)],
)  # fmt: skip
def test_errors_are_those_of_a_store(kind: str, raised: type[StoreError]) -> None:
    store, inner = faulty(Fault(kind, at=2))
    store.create("a", b"1")
    with pytest.raises(raised, match="b: ") as caught:
        store.create("b", b"2")
    assert type(caught.value) is raised
    assert inner.names("") == ["a"]
    store.create("b", b"2")
    store.plan.check_fired()
    assert store.plan.calls == [("create", "a"), ("create", "b"), ("create", "b")]


def test_a_lost_answer_leaves_the_effect() -> None:
    store, inner = faulty(Fault("timeout", when="after", call="create"))
    with pytest.raises(StoreError) as caught:
        store.create("a", b"1")
    assert caught.value.errno == errno.ETIMEDOUT
    assert inner.read("a") == b"1"


def test_what_had_no_effect_has_no_answer_to_lose() -> None:
    store, _ = faulty(Fault("EIO", at=2, when="after"))
    store.create("a", b"1")
    with pytest.raises(AlreadyExists):
        store.create("a", b"2")


def test_after_a_crash_nothing_comes_through() -> None:
    store = CrashStore(MemoryStore(), 2, "after")
    store.create("a", b"1")
    with pytest.raises(Crash):
        store.create("b", b"2")
    for act in (lambda: store.delete(["a"]), lambda: store.read("a"), lambda: store.create("c", b"3")):
        with pytest.raises(Crash):
            act()
    assert store.inner.names("") == ["a", "b"]


@pytest.mark.parametrize("kind", ["kill", "EIO"])
def test_torn_writes(kind: str) -> None:
    raised = Crash if kind == "kill" else StoreError
    for call, act, left in [
        ("write", lambda s: s.write("k", [b"0123", b"4567"]), b"0123"),
        ("write_streams", lambda s: s.write_streams([Stream("k", 2, [b"0123", b"4567"], lambda: b"hh")]), b"\0\x000123"),
        ("append", lambda s: s.append("k", b"01234567"), b"0123"),
        ("create", lambda s: s.create("k", b"01234567"), None),
    ]:  # fmt: skip
        store, inner = faulty(Fault(kind, when="torn", call=call))
        with pytest.raises(raised):
            act(store)
        if kind == "EIO" and call.startswith("write"):
            left = None  # who is told of an error leaves nothing behind
        assert inner.names("") == ([] if left is None else ["k"]), call
        assert left is None or inner.read("k") == left


def test_keys_calls_and_times_choose(tmp_path: pathlib.Path) -> None:
    store, _ = faulty(Fault("EIO", 2, call="re*", key="data/*", times=None))
    for key in ("data/1", "log/1"):
        store.create(key, b"x")
    store.read("data/1")
    store.read("log/1")
    for _ in range(3):
        with pytest.raises(StoreError):
            store.read("data/1")
    with pytest.raises(StoreError):
        store.replace("data/1", b"y")
    assert store.read("log/1") == b"x"


def test_a_delay_is_slept_and_nothing_else() -> None:
    slept: list[float] = []
    store, inner = faulty(Fault("delay", seconds=3.0), sleep=slept.append)
    store.create("a", b"1")
    assert (slept, inner.names("")) == ([3.0], ["a"])


def test_what_never_happened_is_told() -> None:
    plan = FaultPlan(Fault("EIO", 7))
    FaultStore(MemoryStore(), plan).create("a", b"1")
    with pytest.raises(AssertionError, match="never happened"):
        plan.check_fired()
    with pytest.raises(ValueError, match="no such fault"):
        Fault("EVERYTHING")


def test_every_call_meets_each_once_and_ends_with_a_round_without() -> None:
    met, rounds = [], 0
    for plan in every_call("EIO"):
        rounds += 1
        store = FaultStore(MemoryStore(), plan)
        try:
            store.create("a", b"1")
            store.append("b", b"2")
            store.delete(["a"])
        except StoreError:
            met += [(r.call, r.key) for r in plan.fired]
    assert met == [("create", "a"), ("append", "b"), ("delete", "a")]
    assert rounds == 4


def test_a_disk_fails_at_the_call_it_is_told(tmp_path: pathlib.Path) -> None:
    for call, key in [
        ("fsync", "*.tmp-*"),
        ("fsync_dir", "*/a"),
        ("link", "*/k"),
        ("open", "*"),
        ("close", "*"),
    ]:
        disk = FaultDisk(FaultPlan(Fault("ENOSPC", call=call, key=key)))
        with pytest.raises(OutOfSpace):
            LocalStore(tmp_path / call, disk).create("a/k", b"x")
        disk.plan.check_fired()
    LocalStore(tmp_path).create("k", b"x")
    for call in ("open_read", "read", "stat"):
        with pytest.raises(StoreError):
            LocalStore(tmp_path, FaultDisk(FaultPlan(Fault("EIO", call=call)))).read("k")


KILLED = """
import sys
from holdfast.stores import LocalStore
from holdfast.testing import Fault, FaultDisk, FaultPlan, kill_process
disk = FaultDisk(FaultPlan(Fault("kill", call=sys.argv[2], when=sys.argv[3]), die=kill_process))
LocalStore(sys.argv[1], disk).append("k", b"0123456789")
"""


@pytest.mark.parametrize(("call", "when", "left"), [("write", "torn", b"01234"), ("write", "before", b""), ("fsync", "after", b"0123456789")])  # fmt: skip
def test_a_real_kill(tmp_path: pathlib.Path, call: str, when: str, left: bytes) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), call, when], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert (tmp_path / "k").read_bytes() == left


def test_the_tools_need_no_pytest() -> None:
    code = "import sys, holdfast.testing as t; t.FaultPlan(); assert 'pytest' not in sys.modules; t.StoreTests; assert 'pytest' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
