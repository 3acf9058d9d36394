"""Copy, scrub and repair meet a fault at every call that changes the disk: nothing is ever worse, and the next run
finishes what this one began."""

from __future__ import annotations

import itertools
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import holdfast
from crash import ledger
from holdfast.core.errors import HoldfastError
from holdfast.replication.repair import repair
from holdfast.replication.scrub import scrub
from holdfast.replication.transfer import transfer
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import Crash, Fault, FaultDisk, FaultPlan
from replication.places import contents, files, flip, manifests

KINDS = {
    "kill before": ("kill", "before"), "kill after": ("kill", "after"), "torn": ("kill", "torn"),
    "EIO": ("EIO", "before"), "applied but error": ("EIO", "after"), "ENOSPC": ("ENOSPC", "before"),
}  # fmt: skip
STRIDE = ledger.budget(6, 1)  # every call in `make campaign`, every sixth in each run of the suite


def small_run(store: Store) -> None:
    for step in (1, 2, 3):
        model = {"w": np.full((60, 40), step, np.float64), "b": np.full(5, step, np.float32)}
        holdfast.save(
            store, {"frozen": {"x": np.arange(9000.0)}, "model": model}, step=step, tag=f"at-{step}"
        )


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    store = MemoryStore()
    small_run(store)
    return contents(store)


def put(objects: dict[str, bytes], store: Store) -> Store:
    for key, raw in objects.items():
        store.create(key, raw)
    return store


@pytest.fixture
def scratch() -> Iterator[pathlib.Path]:
    """A directory in memory, where there is one."""
    memory = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield pathlib.Path(made)


def try_every_call(
    name: str, fault: str, scratch: pathlib.Path, act: Callable[[Store], object],
    check: Callable[[LocalStore, FaultPlan], None],
) -> int:  # fmt: skip
    """Let the act meet the fault at each call in turn; `check` is asked after each. Return how many calls there were."""
    kind, when = KINDS[fault]
    for at in itertools.count(1 + sum(map(ord, name + fault)) % STRIDE, STRIDE):
        plan = FaultPlan(Fault(kind, at, when))  # type: ignore[arg-type]
        root = scratch / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(scratch / "base", root)
        try:
            act(LocalStore(root, FaultDisk(plan)))
        except (Crash, HoldfastError):
            assert plan.fired
        shutil.rmtree(root / "lease", ignore_errors=True)  # its holder is dead
        check(LocalStore(root), plan)
        ledger.count(fault, name, 1)
        if not plan.fired:
            return at
    raise AssertionError


def no_left_overs(store: LocalStore) -> None:
    store.sweep(time.time() + 1)
    assert not [p for p in pathlib.Path(store.root).rglob("*") if p.name.startswith(".tmp-")]


@pytest.mark.parametrize("fault", KINDS)
def test_repair(scratch: pathlib.Path, whole: dict[str, bytes], fault: str) -> None:
    good = put(whole, MemoryStore())
    base = LocalStore(scratch / "base")
    put(whole, base)
    _, two, three = manifests(base)
    data = sorted(f.key for f in files(base))
    flip(base, data[0], 5000)
    flip(base, data[1], 100)
    base.replace(data[2], base.read(data[2])[:-5])
    lost_with_three = [key for key in data if "000000000003" in key]
    flip(base, two, 60)
    base.delete([three, *lost_with_three, "tags/at-3.json"])
    flip(base, "tags/at-1.json", 12)
    flip(base, "log/g000000000002-000000.jsonl", 40)
    before = contents(base)

    def check(store: LocalStore, plan: FaultPlan) -> None:
        after = contents(store)
        for key, raw in whole.items():
            if before.get(key) == raw:
                assert after[key] == raw, f"{plan.fired}: {key} was whole"
            elif not key.startswith("log/"):
                assert after.get(key) in (before.get(key), raw), f"{plan.fired}: {key} is neither"
        assert after.keys() <= whole.keys()
        if three in after:
            assert all(after.get(key) == whole[key] for key in lost_with_three), (
                f"{plan.fired}: listed before its data"
            )
        assert repair(store, [good]).whole
        assert contents(store) == whole, plan.fired
        no_left_overs(store)

    assert try_every_call("repair", fault, scratch, lambda s: repair(s, [good]), check) > 20


@pytest.mark.parametrize("fault", KINDS)
def test_scrub(scratch: pathlib.Path, whole: dict[str, bytes], fault: str) -> None:
    base = LocalStore(scratch / "base")
    put(whole, base)
    bad = files(base)[0].key
    flip(base, bad, 5000)
    before = contents(base)

    def check(store: LocalStore, plan: FaultPlan) -> None:
        after = contents(store)
        assert {k: after[k] for k in before} == before, plan.fired
        assert all(key.startswith("log/o") for key in after.keys() - before.keys())
        report = scrub(store)
        assert [p.key for p in report.problems if not p.key.startswith("log/o")] == [bad]
        assert scrub(store).recorded
        run = holdfast.Run(store)
        assert {r.step for r in run.records() if r.verified} == set(report.verified)
        no_left_overs(store)

    assert try_every_call("scrub", fault, scratch, scrub, check) > 5


@pytest.mark.parametrize("fault", KINDS)
def test_cp(scratch: pathlib.Path, whole: dict[str, bytes], fault: str) -> None:
    source = put(whole, MemoryStore())
    (scratch / "base").mkdir()

    def check(store: LocalStore, plan: FaultPlan) -> None:
        found = contents(store)
        if manifests(store):
            run = holdfast.Run(store)
            assert not run.broken
            assert not any(run.verify().values()), plan.fired
        for key, raw in found.items():
            assert raw == whole[key] or (key.startswith("log/") and whole[key].startswith(raw)), plan.fired
        transfer(source, store)
        assert contents(store) == whole, plan.fired
        no_left_overs(store)

    assert try_every_call("cp", fault, scratch, lambda s: transfer(source, s), check) > 20
