"""Let each call of an operation go wrong once, in turn, until a round passes; check every promise after each."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crash.operations import Operation, state
from holdfast import HoldfastError
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import (
    Crash,
    Fault,
    FaultDisk,
    FaultPlan,
    FaultStore,
    ModelService,
    ModelStore,
    forget_this_process,
    invariants,
)
from holdfast.testing.plan import Raised


@dataclass(frozen=True)
class FaultKind:
    """A row of the matrix: what happens, at which calls, for how long."""

    name: str
    kind: str
    when: str = "before"
    times: int | None = 1
    call: str = ""
    key: str = "*"

    def at(self, n: int, calls: str = "") -> Fault:
        return Fault(self.kind, n, self.when, self.call or calls, self.key, self.times)  # type: ignore[arg-type]


KILLED = [
    FaultKind("killed before a call", "kill"),
    FaultKind("killed after a call", "kill", "after"),
    FaultKind("killed amid a write", "kill", "torn"),
]
ERRORS = [
    FaultKind("EIO", "EIO"),
    FaultKind("applied, then an error", "EIO", "after"),
    FaultKind("torn write, then an error", "EIO", "torn"),
    FaultKind("disk full (ENOSPC)", "ENOSPC"),
    FaultKind("disk full from then on", "ENOSPC", times=None),
    FaultKind("read-only from then on (EROFS)", "EROFS", times=None),
]
ANSWERS = [
    FaultKind("timeout, not applied", "timeout"),
    FaultKind("answer lost, applied", "timeout", "after"),
    FaultKind("409 conflict", "409"),
    FaultKind("412 to our own request, applied", "412", "after", call="put"),
    FaultKind("429 too many requests", "429"),
    FaultKind("500", "500"),
    FaultKind("503 slow down, from then on", "503", times=None),
    FaultKind("killed between parts", "kill", call="[bpc][eao][rgm]*"),  # begin, part, complete
    FaultKind("a part of an upload fails", "503", call="part"),
    FaultKind("the end of an upload fails", "500", call="complete"),
    FaultKind("the end of an upload is applied, answer lost", "timeout", "after", call="complete"),
]
LEVELS = {"disk": KILLED + ERRORS, "store": KILLED + ERRORS, "requests": KILLED + ANSWERS}


class Level:
    """A place that can be set up afresh, as its users see it and with a plan of faults in between."""

    def __init__(self, name: str, scratch: Path, prepare: Callable[[Store], object]) -> None:
        self._name = name
        self._root = scratch / "run"
        self._base = scratch / "base"
        self._objects: dict[str, bytes] = {}
        base: Store = LocalStore(self._base) if name == "disk" else MemoryStore()
        if name == "requests":
            base = ModelStore()
        prepare(base)
        if name != "disk":
            self._objects = {key: base.read(key) for key in base.names("")}

    def fresh(self, plan: FaultPlan) -> tuple[Store, Store]:
        """Return a store with faults and the same without, holding what was prepared."""
        if self._name == "disk":
            shutil.rmtree(self._root, ignore_errors=True)
            shutil.copytree(self._base, self._root)
            return LocalStore(self._root, FaultDisk(plan)), LocalStore(self._root)
        plain: Store = MemoryStore()
        if self._name == "requests":
            service = ModelService()
            plain = ModelStore(service)
        for key, data in self._objects.items():
            plain.create(key, data)
        return (
            (FaultStore(plain, plan), plain)
            if self._name == "store"
            else (ModelStore(service, plan, part_bytes=2048), plain)
        )


@contextmanager
def _naming(operation: Operation, fault: Fault, plan: FaultPlan) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(f"operation {operation.name!r}, {fault}: fired {plan.fired}")
        print("calls:", *(f"{call} {key}" for call, key in plan.calls[-12:]), sep="\n    ")
        raise


def every_call(
    operation: Operation, kind: FaultKind, level: str, scratch: Path, *, stride: int = 1, offset: int = 0
) -> int:
    """Try a fault at each call (or at every `stride`-th, from `offset` on); return how many there were."""
    places = Level(level, scratch, operation.prepare)
    cases = 0
    at = 1 + offset % stride
    before = invariants.resources()
    while True:
        fault = kind.at(at, operation.calls)
        plan = FaultPlan(fault)
        store, plain = places.fresh(plan)
        with _naming(operation, fault, plan):
            error = outcome(operation, store)
            if not plan.fired:
                assert error is None, f"no fault, and it failed: {error}"
                break
            check(operation, plan, plain, error)
        cases += 1
        at += stride
    del store, error
    gc.collect()
    invariants.bounded_resources(before)
    if cases == 0 and stride > 1:
        return every_call(operation, kind, level, scratch)
    assert cases > 0, f"{kind.name} meets no call of {operation.name}"
    return cases


def outcome(operation: Operation, store: Store) -> BaseException | None:
    """Carry an operation out; return what it raised, none of its frames."""
    try:
        operation.act(store)
    except Crash as e:
        forget_this_process()
        return e.with_traceback(None)
    except HoldfastError as e:
        return e
    return None


def commit_is_open(fired: Raised) -> bool:
    """Return whether a fault left open whether a commit came about: on a disk, whether its name is durable."""
    if fired.call == "fsync_dir":
        return fired.key.endswith("/checkpoints")
    return (
        fired.fault.when == "after"
        and fired.call in ("create", "put", "link")
        and "checkpoints/" in fired.key
    )


def check(operation: Operation, plan: FaultPlan, plain: Store, error: BaseException | None) -> None:
    """Assert every promise after one fault."""
    steps = operation.promises(plain, operation.acknowledged, operation.truth)
    operation.after(steps)
    if operation.commits is not None and not isinstance(error, Crash):
        there = operation.commits in steps
        invariants.honest_outcome(
            error, committed=there, answer_lost=there and any(map(commit_is_open, plan.fired))
        )
    assert outcome(operation, plain) is None, "the next attempt fails"
    operation.promises(plain, operation.acknowledged, operation.truth)
    operation.settled(plain)
    invariants.recovers(plain, 9, state(9), temporary_at_most=operation.temporary)
