"""A rollback takes what still lies in the memory it was saved from, and what is read goes through that memory."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer
from holdfast.core.errors import IntegrityError, SaveFailed
from holdfast.saving.arena import Arenas
from holdfast.stores import LocalStore

torch = pytest.importorskip("torch")

Saved = tuple[Checkpointer, dict[str, Any], list[bytes]]


class Count:
    read = 0


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """The bytes of tensors that this process reads."""
    found = Count()
    original = LocalStore.read_into

    def counted(self: LocalStore, key: str, start: int, target: memoryview) -> None:
        found.read += len(target)
        original(self, key, start, target)

    monkeypatch.setattr(LocalStore, "read_into", counted)
    return found


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[Arenas]:
    """The arenas of every checkpointer that is made."""
    made: list[Arenas] = []
    original = Arenas.__init__

    def noted(self: Arenas, **kwargs: Any) -> None:
        original(self, **kwargs)
        made.append(self)

    monkeypatch.setattr(Arenas, "__init__", noted)
    return made


def training(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 600), torch.nn.BatchNorm1d(600), torch.nn.Linear(600, 64))
    return {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "extra": {"table": np.arange(40_000.0) + seed},
    }


def train(state: dict[str, Any]) -> None:
    state["model"](torch.randn(8, 64)).square().sum().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["extra"]["table"] += 1


def bytes_of(state: dict[str, Any]) -> list[bytes]:
    optimizer = state["optimizer"].state_dict()["state"]
    tensors = [*state["model"].state_dict().values(), *(v for of in optimizer.values() for v in of.values())]
    return [*(t.numpy().tobytes() for t in tensors), state["extra"]["table"].tobytes()]


def scribble(arenas: Arenas) -> None:
    with arenas.lent() as lent:
        memory = lent.spare()
        memory[:] = b"\xa5" * len(memory)
    assert len(memory)


@pytest.fixture(params=["process", "thread", "inline"])
def saved(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Saved]:
    """A checkpoint that was just saved, the state after another step, and what was saved."""
    state = training(1)
    with Checkpointer(tmp_path / "run", state, writer=request.param, save=holdfast.every(steps=100)) as ckpt:
        train(state)
        ckpt.save()
        ckpt.wait()
        wanted = bytes_of(state)
        train(state)
        assert bytes_of(state) != wanted
        yield ckpt, state, wanted


def test_a_rollback_reads_no_tensor(count: Count, saved: Saved) -> None:
    ckpt, state, wanted = saved
    for _ in range(2):
        ckpt.restore()
        assert bytes_of(state) == wanted
        train(state)
    assert count.read == 0


def test_the_disk_is_read_where_that_is_asked_for(count: Count, saved: Saved) -> None:
    ckpt, state, wanted = saved
    ckpt.restore(from_memory=False)
    assert bytes_of(state) == wanted
    assert count.read >= sum(map(len, wanted))
    train(state)
    ckpt.restore()  # what was read went through that memory: it is no snapshot any more
    assert bytes_of(state) == wanted


def test_memory_that_does_not_verify_is_not_taken(arenas: list[Arenas], count: Count, saved: Saved) -> None:
    """One flipped bit in the host's memory: the rest is taken from there, and what has the bit is read."""
    ckpt, state, wanted = saved
    for held in arenas:
        with held.lent() as lent:
            for arena in lent._arenas:
                assert arena.kept is not None
                part = arena.kept[1].parts["extra"]
                part.data[len(part.data) // 2] ^= 1
    ckpt.restore()
    assert bytes_of(state) == wanted
    assert state["extra"]["table"].nbytes <= count.read < state["extra"]["table"].nbytes + 16_384


def test_a_damaged_disk_does_not_hinder_a_rollback(tmp_path: pathlib.Path, saved: Saved) -> None:
    ckpt, state, wanted = saved
    paths = list(tmp_path.rglob("extra.safetensors"))
    assert paths
    for path in paths:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    ckpt.restore()
    assert bytes_of(state) == wanted
    with pytest.raises(IntegrityError):
        ckpt.restore(0, from_memory=False)


def test_an_overwritten_snapshot_is_forgotten(saved: Saved) -> None:
    """The next save is copied over the one before, of which one is read then."""
    ckpt, state, wanted = saved
    ckpt.step_end()
    ckpt.save()
    ckpt.wait()
    newer = bytes_of(state)
    ckpt.restore(0)
    assert bytes_of(state) == wanted
    ckpt.restore("latest")
    assert bytes_of(state) == newer


@pytest.mark.parametrize("from_memory", [True, False])
def test_nothing_restored_lies_in_that_memory(arenas: list[Arenas], saved: Saved, from_memory: bool) -> None:
    """Moments and arrays that a restore makes anew have memory of their own: the next snapshot is none of theirs."""
    ckpt, state, wanted = saved
    state["optimizer"].state.clear()
    state["extra"]["table"] = np.zeros(0)  # replaced by what is stored
    ckpt.restore(from_memory=from_memory)
    assert bytes_of(state) == wanted
    for held in arenas:
        scribble(held)
    assert bytes_of(state) == wanted


def test_of_a_state_in_waves_only_the_last_is_there(tmp_path: pathlib.Path, count: Count) -> None:
    """The memory held one wave after the other: what was overwritten is read."""
    state = {f"part{i}": np.random.default_rng(i).random(40_000) for i in range(6)}
    with Checkpointer(tmp_path / "run", state, save=holdfast.every(steps=100), memory="700 kB") as ckpt:
        ckpt.save()
        wanted = {name: part.copy() for name, part in state.items()}
        for part in state.values():
            part += 1
        ckpt.restore()
        assert all(np.array_equal(state[name], wanted[name]) for name in wanted)
    assert 3 * state["part0"].nbytes < count.read < 6 * state["part0"].nbytes


def test_a_save_that_failed_is_not_rolled_back_to(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"table": np.arange(40_000.0)}
    with Checkpointer(tmp_path / "run", state, save=holdfast.every(steps=100), writer="thread") as ckpt:
        ckpt.save()
        ckpt.wait()
        wanted = state["table"].copy()
        state["table"] += 1

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(LocalStore, "write_streams", full)
            ckpt.save()
            with pytest.raises(SaveFailed):
                ckpt.wait()
        ckpt.restore()
        assert np.array_equal(state["table"], wanted)


def test_a_resume_goes_through_memory_that_is_there(tmp_path: pathlib.Path, arenas: list[Arenas]) -> None:
    """What is copied into live tensors is staged in the arena; moments, which are new, are not."""
    state = training(1)
    train(state)
    with Checkpointer(tmp_path / "run", state, writer="thread", save=holdfast.every(steps=100)) as ckpt:
        ckpt.save()
    wanted = bytes_of(state)
    fresh = training(2)
    with Checkpointer(tmp_path / "run", fresh, writer="thread", save=holdfast.every(steps=100)) as ckpt:
        ckpt.restore()
        with arenas[-1].lent() as lent:
            staged = bytes(lent.spare())
        assert state["extra"]["table"].tobytes() in staged
        weight = state["model"][0].weight
        assert weight.detach().numpy().tobytes() in staged
        assert state["optimizer"].state[weight]["exp_avg"].numpy().tobytes() not in staged
        scribble(arenas[-1])
        assert bytes_of(fresh) == wanted
