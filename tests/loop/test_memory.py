"""Memory for snapshots: a budget that is kept, waves beyond it, a second arena when a save is due amid another."""

from __future__ import annotations

import logging
import pathlib
import threading

import numpy as np
import pytest

from holdfast import Checkpointer, Run, every, last, load, save
from holdfast.catalog.content import open_file
from holdfast.core.machine import available_memory
from holdfast.errors import PolicyError
from holdfast.saving.arena import Arenas
from holdfast.saving.persist import persist_parts
from holdfast.stores import LocalStore, MemoryStore

SIZE = 30_000  # floats of 8 bytes: a tensor with digest blocks of its own


def state(seed: int = 0, count: int = 12) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    large = {f"w{i}": rng.random(SIZE + i) for i in range(count)}
    return {
        "model": {**large, "bias": rng.random(3).astype(np.float32), "step": seed},
        "head": {"one": rng.random(SIZE), "tied": large["w0"]},
        "words": {"text": f"seed {seed}"},
    }


def same(found: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(
            same(found[k], v) for k, v in expected.items()
        )  # fmt: skip
    return found.tobytes() == expected.tobytes() if isinstance(expected, np.ndarray) else found == expected


@pytest.mark.parametrize("writer", ["inline", "thread", "process"])
@pytest.mark.parametrize("memory", [SIZE * 8, 1_000_000, 2_900_000])
def test_a_state_that_is_larger_than_its_budget_goes_in_waves(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, writer: str, memory: int
) -> None:
    with (
        Checkpointer(tmp_path, state(), writer=writer, memory=memory) as ckpt,
        caplog.at_level(logging.WARNING),
    ):
        ckpt.save(tag="first")
        ckpt.wait()
        arena = ckpt._engine._saver._arenas.first.memory
        assert arena is not None
        assert len(arena) <= max(memory, 8 * SIZE + 3 * 4096 + 4096 * len(state()))
    assert "written piece by piece" in caplog.text
    assert len(list((tmp_path / "data").rglob("*.safetensors"))) > 2
    assert same(load(tmp_path), state())
    assert not any(Run(tmp_path).verify().values())
    held = state(1)
    with Checkpointer(tmp_path, held) as ckpt:
        ckpt.restore()
    assert same(held, state())
    assert held["head"]["tied"] is not held["model"]["w1"]


def test_waves_refer_to_what_did_not_change(tmp_path: pathlib.Path) -> None:
    held = state()
    with Checkpointer(tmp_path, held, memory=1_000_000, save=every(steps=1)) as ckpt:
        for step in ckpt.steps(3):
            if step == 1:
                held["model"]["w7"] += 1
                held["model"]["w0"][5] = -1.0
            if step == 2:
                held["model"]["w7"] += 1
                held["model"]["bias"] += 1
    run = Run(tmp_path)
    sizes = [record.new_bytes for record in run.records()]
    assert sizes[0] > 12 * 8 * SIZE
    assert 2 * 8 * SIZE <= sizes[1] < 3 * 8 * SIZE
    assert 8 * SIZE <= sizes[2] < 2 * 8 * SIZE
    assert same(load(tmp_path), ckpt.state)
    assert not any(run.verify().values())


def test_the_order_of_files_that_are_referred_to_survives_waves(tmp_path: pathlib.Path) -> None:
    """A tensor that changes to and fro stands in several older files; the newest of them must be met first."""
    held = state()
    with Checkpointer(tmp_path, held, memory=700_000, save=every(steps=1), keep=last(2)) as ckpt:
        for step in ckpt.steps(12):
            held["model"][f"w{step % 5}"] += 1
            held["model"][f"w{11 - step % 3}"] += 1
    for step in Run(tmp_path).steps:
        assert not Run(tmp_path).verify([step])[step]
    assert same(load(tmp_path), ckpt.state)


def test_a_wave_that_fails_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.errors import SaveFailed, StoreError
    from holdfast.saving import job

    def third_fails(*args: object, **more: object) -> object:
        if more["wave"] == 2:
            raise StoreError("could not write: the disk went away")
        return persist_parts(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "persist_parts", third_fails)
    with Checkpointer(tmp_path, state(), writer="thread", memory=700_000) as ckpt:
        with pytest.raises(SaveFailed, match="disk went away"):
            ckpt.save()
        assert not list((tmp_path / "data").rglob("*.safetensors"))
        monkeypatch.undo()
        ckpt.save()
    assert same(load(tmp_path), state())


def test_self_contained_checkpoints_refer_to_nothing(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, state(), save=every(steps=1), self_contained=True) as ckpt:
        for _ in ckpt.steps(3):
            pass
    first, second, third = (
        {f.key for p in Run(tmp_path)[s].manifest.parts.values() for f in p.files} for s in (1, 2, 3)
    )
    assert not first & second
    assert not second & third
    save(tmp_path, state(), step=9, self_contained=True)
    assert not {f.key for p in Run(tmp_path)[9].manifest.parts.values() for f in p.files} & third


class Slow(LocalStore):
    """A store whose data waits for the word."""

    def __init__(self, root: pathlib.Path) -> None:
        super().__init__(root)
        self.go = threading.Event()

    def write_streams(self, streams: object) -> None:  # type: ignore[override]
        assert self.go.wait(30)
        super().write_streams(streams)  # type: ignore[arg-type]


def test_a_save_that_is_due_amid_another_gets_a_second_arena(tmp_path: pathlib.Path) -> None:
    store, held = Slow(tmp_path), state()
    ckpt = Checkpointer(store, held, save=every(steps=1))
    for step in ckpt.steps(3):
        held["model"]["w1"][0] = step
        if step == 2:
            assert ckpt._engine._saver._arenas._second is not None, "two snapshots are in memory"
            store.go.set()
    ckpt.close()
    assert Run(tmp_path).steps == [1, 2, 3]
    for step in (1, 2, 3):
        assert load(tmp_path, step=step)["model"]["w1"][0] == step - 1


def test_skip_leaves_out_what_a_rule_asks_for_and_not_what_you_ask_for(tmp_path: pathlib.Path) -> None:
    store, held = Slow(tmp_path), state()
    ckpt = Checkpointer(store, held, save=every(steps=1), when_busy="skip")
    for step in ckpt.steps(5):
        if step == 2:
            ckpt.save(tag="asked")
        if step == 4:
            store.go.set()
            ckpt.wait()
    ckpt.close()
    assert Run(tmp_path).steps == [1, 3, 5]


def test_replace_keeps_the_newest_of_those_that_wait(tmp_path: pathlib.Path) -> None:
    store, held = Slow(tmp_path), state()
    ckpt = Checkpointer(store, held, save=every(steps=1), when_busy="replace")
    for step in ckpt.steps(5):
        held["model"]["w1"][0] = step
        if step == 4:
            store.go.set()
            ckpt.wait()
    ckpt.close()
    assert Run(tmp_path).steps == [1, 4, 5]
    assert load(tmp_path, step=4)["model"]["w1"][0] == 3


def test_replace_never_gives_up_what_was_asked_for(tmp_path: pathlib.Path) -> None:
    store = Slow(tmp_path)
    ckpt = Checkpointer(store, state(), save=every(steps=1), when_busy="replace")
    for step in ckpt.steps(4):
        if step == 1:
            ckpt.save(tag="asked")
            threading.Timer(0.3, store.go.set).start()
    ckpt.close()
    assert {1, 2, 4} <= set(Run(tmp_path).steps)
    assert Run(tmp_path).tags["asked"] == 2


def test_a_process_that_cannot_reach_the_store_is_refused() -> None:
    with pytest.raises(PolicyError, match=r'writer="process".*use writer="thread"'):
        Checkpointer("memory://nobody-else", state(), writer="process")


def test_without_memory_for_two_the_second_save_waits() -> None:
    arenas = Arenas(shared=False, budget_bytes=100_000)
    first = arenas.take()
    first.reserve([60_000])
    taken: list[object] = []
    second = threading.Thread(target=lambda: taken.append(arenas.take()))
    second.start()
    second.join(0.1)
    assert not taken
    arenas.give_back(first)
    second.join(10)
    assert taken == [first]


def test_words_that_mean_nothing_are_refused(tmp_path: pathlib.Path) -> None:
    for wrong in ({"writer": "fork"}, {"when_busy": "never"}, {"memory": "lots"}, {"memory": -1}):
        with pytest.raises(PolicyError):
            Checkpointer(tmp_path, state(), **wrong)


def test_a_control_group_is_believed_before_the_machine(tmp_path: pathlib.Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup/job/task"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/task\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (group.parent / "memory.max").write_text("5000000\n")
    (group.parent / "memory.current").write_text("3000000\n")
    (group.parent / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert available_memory(tmp_path) == 2_500_000
    old = tmp_path / "sys/fs/cgroup/memory/box"
    old.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/box\n")
    (old / "memory.limit_in_bytes").write_text("4000000\n")
    (old / "memory.usage_in_bytes").write_text("1000000\n")
    assert available_memory(tmp_path) == 3_000_000
    assert available_memory(tmp_path / "nothing") is None


def test_a_memory_store_keeps_working_with_waves() -> None:
    store = MemoryStore("waves")
    with Checkpointer(store, state(), memory=500_000) as ckpt:
        ckpt.save()
    entry = Run(store)[0].manifest.parts["model"].files[0]
    assert open_file(store, entry).header.tensors
    assert same(load(store), state())
