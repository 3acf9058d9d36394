"""The model of an object store is one, and clients that take turns can be repeated."""

from __future__ import annotations

import contextlib

import pytest

from holdfast.core.errors import AlreadyExists, StoreError
from holdfast.stores import MemoryStore, Store, Stream
from holdfast.testing import Crash, Fault, FaultPlan, MockClock, ModelService, ModelStore, StoreTests, Turns


class TestModelStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return ModelStore(part_bytes=1 << 20)


def large(store: Store) -> None:
    store.write_streams([Stream("d/1", 4, [b"x" * 50, b"y" * 50], lambda: b"head")])


def test_an_upload_that_is_killed_shows_nothing_and_is_swept_when_it_is_old() -> None:
    clock = MockClock()
    for request in ("begin", "part", "complete"):
        service = ModelService(time=clock)
        with pytest.raises(Crash):
            large(ModelStore(service, FaultPlan(Fault("kill", when="after" if request == "begin" else "before", call=request)), part_bytes=20))  # fmt: skip
        store = ModelStore(service)
        assert store.names("") == []
        assert len(service.uploads) == 1
        store.sweep(clock.now())
        assert len(service.uploads) == 1, "it may be under way"
        clock.advance(10)
        store.sweep(clock.now())
        assert not service.uploads


def test_an_upload_that_fails_is_aborted() -> None:
    service = ModelService()
    with pytest.raises(StoreError, match="503"):
        large(ModelStore(service, FaultPlan(Fault("503", 3, call="part")), part_bytes=20))
    assert not service.uploads
    assert not service.objects
    large(ModelStore(service, part_bytes=20))
    assert ModelStore(service).read("d/1") == b"head" + b"x" * 50 + b"y" * 50


def test_a_liar_lets_everyone_win() -> None:
    store = ModelStore(ModelService(honest=False))
    store.create("k", b"1")
    store.create("k", b"2")
    assert store.read("k") == b"2"


def rivals(turns: Turns) -> dict[str, object]:
    shared = MemoryStore()

    def act(name: str) -> str:
        store = turns.store(shared)
        for key in "abc":
            with contextlib.suppress(AlreadyExists):
                store.create(key, name.encode())
        return "".join(shared.read(key).decode() for key in "abc")

    return turns.run({name: lambda name=name: act(name) for name in ("1", "2")})  # type: ignore[misc]


def test_turns_are_a_matter_of_the_seed_and_can_be_repeated() -> None:
    found = {}
    for seed in range(20):
        turns = Turns(seed=seed)
        outcome = rivals(turns)
        found[str(outcome)] = turns.trace
        again = Turns(order=turns.trace)
        assert rivals(again) == outcome
        assert again.trace == turns.trace
    assert len(found) > 3


def test_an_order_decides_and_errors_are_outcomes() -> None:
    assert rivals(Turns(order=["2"] * 9 + ["1"] * 9)) == {"1": "222", "2": "222"}
    turns = Turns()
    store = turns.store(MemoryStore(), Fault("EIO"))
    outcome = turns.run({"a": lambda: store.create("k", b"")})
    assert isinstance(outcome["a"], StoreError)
