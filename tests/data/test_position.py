"""The sampler's position: one global number that any rank, batch size and process continues from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import StateError
from holdfast.state.sampler import ResumableSampler, epoch_order


def resumed(state: dict[str, Any], length: int, **options: Any) -> ResumableSampler:
    sampler = ResumableSampler(length, **options)
    sampler.load_state_dict(state)
    return sampler


def ranks(length: int, world_size: int, **options: Any) -> list[ResumableSampler]:
    return [ResumableSampler(length, rank=r, world_size=world_size, **options) for r in range(world_size)]


def global_batches(samplers: list[ResumableSampler], steps: int | None = None) -> list[list[int]]:
    """Step all ranks together; each step gives one global batch."""
    iterators = [iter(sampler) for sampler in samplers]
    batches: list[list[int]] = []
    while steps is None or len(batches) < steps:
        parts = [next(iterator, None) for iterator in iterators]
        if None in parts:
            assert parts == [None] * len(parts)  # every rank ends at the same step
            break
        assert len({len(part) for part in parts if part is not None}) == 1
        batches.append([int(index) for part in parts for index in part or []])
    return batches


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_index_once_per_epoch(world_size: int, shuffle: bool, drop_last: bool) -> None:
    samplers = ranks(50, world_size, batch_size=4, seed=3, shuffle=shuffle, drop_last=drop_last)
    for epoch in range(3):
        order = epoch_order(3, epoch, 50).tolist() if shuffle else list(range(50))
        batches = global_batches(samplers)
        drawn = [index for batch in batches for index in batch]
        assert len(batches) == len(samplers[0])
        if drop_last:
            assert drawn == order[: len(batches) * 4 * world_size]
        else:
            assert drawn[:50] == order
            assert drawn[50:] == order[: len(drawn) - 50]  # padding wraps to the epoch's start
            assert len(drawn) - 50 < world_size


def test_padding_is_a_draw_of_its_own() -> None:
    last = [list(sampler)[-1] for sampler in ranks(5, 3, batch_size=4, shuffle=False)]
    assert [[int(i) for i in batch] for batch in last] == [[0, 1], [2, 3], [4, 0]]
    assert last[2][1].position == 5  # type: ignore[attr-defined]


def test_resume_at_every_batch_gives_the_tail_and_the_next_epoch() -> None:
    for drop_last in (False, True):
        options: dict[str, Any] = {"batch_size": 4, "seed": 11, "drop_last": drop_last}
        reference = ResumableSampler(23, **options)
        states, first = [reference.state_dict()], []
        for batch in reference:
            first.append(batch)
            states.append(reference.state_dict())
        second = list(reference)
        for done, state in enumerate(states):
            sampler = resumed(state, 23, **options)
            assert sampler.remaining == len(first) - done
            assert len(sampler) == len(first)
            assert list(sampler) == first[done:]
            assert list(sampler) == second


def test_state_at_an_epochs_end() -> None:
    sampler = ResumableSampler(8, batch_size=4)
    epochs = []
    for epoch in range(2):
        for batch in sampler:
            at_last = sampler.state_dict()
            epochs.append((epoch, batch))
        after = sampler.state_dict()
    assert (at_last["epoch"], at_last["position"]) == (1, 8)
    assert (after["epoch"], after["position"]) == (2, 0)

    inside, outside = resumed(at_last, 8, batch_size=4), resumed(after, 8, batch_size=4)
    assert list(inside) == []  # the rest of epoch 1 is empty ...
    assert inside.state_dict() == after  # ... and then it is epoch 2
    assert list(inside) == list(outside) == list(sampler)


def test_two_resumes_in_one_epoch() -> None:
    whole = list(ResumableSampler(40, batch_size=3, seed=5))
    state, got = None, []
    for steps in (4, 3, 100):
        sampler = ResumableSampler(40, batch_size=3, seed=5)
        if state is not None:
            sampler.load_state_dict(state)
        for _, batch in zip(range(steps), sampler, strict=False):
            got.append(batch)
            state = sampler.state_dict()
    assert got == whole


@pytest.mark.parametrize("shuffle", [False, True])
def test_another_world_size_continues_the_global_order(shuffle: bool) -> None:
    options: dict[str, Any] = {"seed": 8, "shuffle": shuffle}
    order = epoch_order(8, 0, 60).tolist() if shuffle else list(range(60))
    drawn: list[int] = []
    state = None
    for world_size, batch_size, steps in ((1, 4, 3), (2, 3, 2), (3, 2, 2), (1, 7, None)):
        samplers = ranks(60, world_size, batch_size=batch_size, **options)
        for sampler in samplers if state is not None else []:
            sampler.load_state_dict(state)  # type: ignore[arg-type]
        drawn += [index for batch in global_batches(samplers, steps) for index in batch]
        states = [sampler.state_dict() for sampler in samplers]
        assert states == [states[0]] * world_size
        state = states[0]
    assert drawn == order


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_resume_continues_the_order(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 80), "length")
    batch, world = data.draw(st.integers(1, 9), "batch"), data.draw(st.integers(1, 4), "world")
    new_batch, new_world = (
        data.draw(st.integers(1, 9), "new batch"),
        data.draw(st.integers(1, 4), "new world"),
    )
    epoch, steps = data.draw(st.integers(0, 3), "epoch"), data.draw(st.integers(0, 12), "steps")
    before = ranks(length, world, batch_size=batch, seed=1)
    for sampler in before:
        sampler.set_epoch(epoch)
    head = global_batches(before, steps)
    state = before[0].state_dict()
    if state["epoch"] != epoch:  # the steps used the epoch up
        assert (state["epoch"], state["position"]) == (epoch + 1, 0)
        return
    after = ranks(length, new_world, batch_size=new_batch, seed=1)
    for sampler in after:
        sampler.load_state_dict(state)
    tail = global_batches(after)
    order = epoch_order(1, epoch, length).tolist()
    used = min(sum(map(len, head)), length)
    assert state["position"] == used
    assert ([i for b in head for i in b] + [i for b in tail for i in b])[:used] == order[:used]
    assert [i for b in tail for i in b][: length - used] == order[used:]
    assert {sampler.epoch for sampler in after} == {epoch + 1}


def test_a_broken_off_pass_is_followed_by_the_next_epoch() -> None:
    sampler = ResumableSampler(20, batch_size=4)
    next(iter(sampler))
    assert (sampler.epoch, sampler.position) == (0, 4)
    second = next(iter(sampler))
    assert (sampler.epoch, sampler.position) == (1, 4)
    assert second[0].epoch == 1  # type: ignore[attr-defined]


def test_an_iterator_that_gave_nothing_is_no_pass() -> None:
    sampler = ResumableSampler(20, batch_size=4)
    iter(sampler)
    iter(sampler)
    assert next(iter(sampler)) == epoch_order(0, 0, 20)[:4].tolist()


def test_set_epoch_keeps_a_restored_position_only_for_its_own_epoch() -> None:
    sampler = ResumableSampler(20, batch_size=4)
    sampler.set_epoch(2)
    next(iter(sampler))
    state = sampler.state_dict()

    same = resumed(state, 20, batch_size=4)
    same.set_epoch(2)
    same.set_epoch(2)
    assert [i for b in same for i in b] == epoch_order(0, 2, 20)[4:].tolist()

    next(iter(same))  # epoch 3, broken off; asked for again, it goes on as it would after a restore
    same.set_epoch(3)
    assert [i for b in same for i in b] == epoch_order(0, 3, 20)[4:].tolist()

    other = resumed(state, 20, batch_size=4)
    other.set_epoch(5)
    assert [i for b in other for i in b] == epoch_order(0, 5, 20).tolist()


def test_an_outdated_iterator_refuses() -> None:
    sampler = ResumableSampler(20, batch_size=4)
    state = sampler.state_dict()
    for move, name in (
        (lambda: sampler.load_state_dict(state), "load_state_dict"),
        (lambda: sampler.set_epoch(9), "set_epoch"),
        (lambda: iter(sampler), "newer iter"),
    ):
        stale = iter(sampler)
        next(stale)
        move()
        with pytest.raises(StateError, match=f"out of date.*{name}"):
            next(stale)
        sampler.load_state_dict(state)
    assert list(sampler) == list(resumed(state, 20, batch_size=4))


@pytest.mark.parametrize(
    ("mine", "found"),
    [
        ({"length": 21}, "length 21.*found 20.*dataset the checkpoint"),
        ({"seed": 1}, "seed 1.*found 0.*pass the same seed"),
        ({"shuffle": False}, "shuffle False.*found True.*pass the same shuffle"),
        ({"fingerprint": "v2"}, "fingerprint 'v2'.*found 'v1'"),
    ],
)
def test_refuses_a_position_in_another_order(mine: dict[str, Any], found: str) -> None:
    other = ResumableSampler(20, batch_size=4, fingerprint="v1")
    next(iter(other))
    options = {"length": 20, "batch_size": 4, "fingerprint": "v1", **mine}
    sampler = ResumableSampler(options.pop("length"), **options)
    with pytest.raises(StateError, match=f"{found}.*missing=.*unexpected="):
        sampler.load_state_dict(other.state_dict())
    assert (sampler.epoch, sampler.position) == (0, 0)


def test_a_fingerprint_may_be_added_later() -> None:
    state = ResumableSampler(20, batch_size=4).state_dict()
    ResumableSampler(20, batch_size=4, fingerprint="v1").load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"order": "quantum"},
        {"order": None},
        {"position": 21},
        {"position": -1},
        {"epoch": -1},
        {"epoch": "1"},
        {"position": 4.0},
    ],
)
def test_refuses_a_damaged_state(change: dict[str, Any]) -> None:
    sampler = ResumableSampler(20, batch_size=4)
    with pytest.raises(StateError, match="data position: expected"):
        sampler.load_state_dict({**sampler.state_dict(), **change})


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (0, {}),
        (3, {"drop_last": True}),
        (20, {"batch_size": 0}),
        (20, {"batch_size": 2.5}),
        (20, {"seed": 1.5}),
        (20, {"seed": -1}),
        (20, {"seed": 2**64}),
        (20, {"rank": 2, "world_size": 2}),
        (20, {"rank": 0}),
    ],
)
def test_refuses_arguments_that_make_no_sense(length: int, options: dict[str, Any]) -> None:
    with pytest.raises(StateError, match=r"expected .*found .*;"):
        ResumableSampler(length, **{"batch_size": 4, **options})


def test_refuses_what_has_no_length() -> None:
    with pytest.raises(StateError, match="StatefulDataLoader"):
        ResumableSampler(iter([1, 2]), batch_size=1)  # type: ignore[arg-type]


def test_state_is_plain_values() -> None:
    sampler = ResumableSampler(20, batch_size=4, rank=1, world_size=2, drop_last=True)
    next(iter(sampler))
    assert sampler.state_dict() == {
        "order": "philox4x64-sort",
        "epoch": 0,
        "position": 8,
        "length": 20,
        "seed": 0,
        "shuffle": True,
        "fingerprint": None,
        "batch_size": 4,
        "world_size": 2,
        "drop_last": True,
    }


def test_integers_of_numpy_are_as_good_as_others() -> None:
    """What they leave in a state is plain, and can be restored."""
    options = {
        "batch_size": np.int64(4),
        "seed": np.uint64(3),
        "rank": np.int32(0),
        "world_size": np.int64(1),
    }
    sampler = ResumableSampler(20, **options, drop_last=np.bool_(True))  # type: ignore[arg-type]
    next(iter(sampler))
    state = sampler.state_dict()
    assert {type(value) for value in state.values()} == {int, bool, str, type(None)}
    again = ResumableSampler(20, batch_size=4, seed=3)
    again.load_state_dict({**state, "position": np.int64(4)})  # as it was once stored
    assert again.state_dict() == {**state, "drop_last": False}
