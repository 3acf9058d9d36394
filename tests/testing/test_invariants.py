"""Each promise's function is silent where it holds and names it where it does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import holdfast
from holdfast.core.errors import CommitConflict, CommitUnknown, StoreError
from holdfast.stores import MemoryStore
from holdfast.testing import invariants
from holdfast.testing.invariants import Broken

TRUTH = {step: {"w": np.full(50, step), "plain": {"lr": 0.1, "seen": [1, (2, None)]}} for step in (1, 2)}


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    for step, state in TRUTH.items():
        holdfast.save(made, state, step=step, self_contained=True)
    return made


def data_of(store: MemoryStore, step: int) -> list[str]:
    return [k for k in store.names("data") if f"{step:012d}-" in k]


def manifest_of(store: MemoryStore, step: int) -> str:
    return next(k for k in store.names("checkpoints") if f"{step:012d}" in k)


def flip(store: MemoryStore, key: str) -> None:
    raw = bytearray(store.read(key))
    raw[-1] ^= 1
    store.replace(key, bytes(raw))


def test_all_hold_of_a_sound_run(store: MemoryStore) -> None:
    assert invariants.promises(store, TRUTH, TRUTH) == [1, 2]
    invariants.no_silent_corruption(store, TRUTH, ())
    invariants.recovers(store, 3, TRUTH[1])
    invariants.policy_is_pure(store, holdfast.last(1))
    invariants.replicas_agree(store, store)
    invariants.bounded_resources(invariants.resources())
    assert invariants.left_over(store) == set()


BREAKS: dict[str, tuple[Callable[[MemoryStore], object], Callable[[MemoryStore], object]]] = {
    "I1": (
        lambda s: s.delete([manifest_of(s, 1)]),
        lambda s: invariants.old_stays_readable(s, TRUTH),
    ),
    "I2": (
        lambda s: s.delete(data_of(s, 2)[:1]),
        lambda s: invariants.no_half_commit(s, TRUTH),
    ),
    "I3": (
        lambda s: s.delete(data_of(s, 2)),
        lambda s: invariants.old_stays_readable(s, TRUTH, id="I3"),
    ),
    "I4": (
        lambda s: flip(s, data_of(s, 2)[0]),
        lambda s: invariants.no_silent_corruption(s, TRUTH, ()),
    ),
    "I5": (
        lambda s: s.delete(data_of(s, 2)),
        invariants.needed_exists,
    ),
    "I6": (
        lambda s: s.delete(data_of(s, 1)),  # then what a dead one left is kept, for what needs it is unknown
        lambda s: (flip(s, manifest_of(s, 1)), s.write("data/000000000009-dead/w.safetensors", [b"x"]), s.delete([manifest_of(s, 2)]), invariants.recovers(s, 3, TRUTH[1])),
    ),
    "I12": (
        lambda s: flip(s, data_of(s, 1)[0]),
        lambda s: invariants.good_never_overwritten({data_of(s, 1)[0]: b"as it was"}, s, lambda key: True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("id", BREAKS)
def test_what_is_broken_is_said_by_name(store: MemoryStore, id: str) -> None:
    damage, check = BREAKS[id]
    damage(store)
    with pytest.raises((Broken, holdfast.HoldfastError)) as caught:
        check(store)
    assert id == "I6" or (isinstance(caught.value, Broken) and caught.value.id == id)


def test_other_values_are_no_restore(store: MemoryStore) -> None:
    wrong = {**TRUTH, 2: {"w": np.full(50, 3), "plain": TRUTH[2]["plain"]}}
    with pytest.raises(Broken, match="I1"):
        invariants.old_stays_readable(store, wrong)
    with pytest.raises(Broken, match="I2"):
        invariants.no_half_commit(store, wrong)
    with pytest.raises(Broken, match="I2"):
        invariants.no_half_commit(store, {1: TRUTH[1]})
    with pytest.raises(Broken, match="I4"):
        invariants.no_silent_corruption(store, wrong, ())


def test_of_two_winners_one_is_wrong(store: MemoryStore) -> None:
    key = manifest_of(store, 1)
    attempt = holdfast.open(store, 1).manifest.attempt
    invariants.commits_once({"a": [(key, attempt)], "b": []}, store)
    with pytest.raises(Broken, match="both a and b"):
        invariants.commits_once({"a": [(key, attempt)], "b": [(key, "other")]}, store)
    with pytest.raises(Broken, match="another's is there"):
        invariants.commits_once({"b": [(key, "other")]}, store)


def test_outcomes() -> None:
    unknown = StoreError("x")
    unknown.__cause__ = CommitUnknown("x")
    invariants.honest_outcome(None, committed=True, answer_lost=False)
    invariants.honest_outcome(unknown, committed=True, answer_lost=True)
    invariants.honest_outcome(StoreError("x"), committed=False, answer_lost=False)
    for error, committed, lost in [
        (None, False, False), (StoreError("x"), True, True), (unknown, False, False), (CommitConflict("x"), False, False),
    ]:  # fmt: skip
        with pytest.raises(Broken, match="I10"):
            invariants.honest_outcome(error, committed=committed, answer_lost=lost)


@pytest.mark.parametrize(
    ("a", "b"),
    [(1, 1.0), ([1], (1,)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (np.zeros(3), np.zeros(3, np.float32)), (0.0, None),
     (np.zeros(3), np.zeros((3, 1))), ({"a": [np.array([0.0])]}, {"a": [np.array([-0.0])]})],
)  # fmt: skip
def test_same_means_to_the_bit(a: object, b: object) -> None:
    assert invariants.same(a, a)
    assert not invariants.same(a, b)
    assert not invariants.same(b, a)
    assert invariants.same(float("nan"), float("nan"))
