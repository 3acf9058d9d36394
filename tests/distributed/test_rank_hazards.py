"""What a person at three in the morning would find: ranks that come to one step twice, go back, fail early, or leave."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from distributed.side_by_side import side_by_side, values
from holdfast import best, every
from holdfast.core.errors import NoCheckpoint, RanksDisagree, SaveFailed, UnsupportedValue

SECONDS = 100.0  # that a rank waits for others; who hears how things stand needs far less


def ranked(run: Path, state: dict[str, Any], rank: int, world: int = 2, **how: Any) -> holdfast.Checkpointer:
    return holdfast.Checkpointer(
        str(run),
        state,
        **{
            "ranks": (rank, world, SECONDS),
            "writer": "thread",
            "save": every(steps=2),
            "replicated": ["same/**"],
        }
        | how,
    )


def state_of(rank: int, size: int = 4) -> dict[str, Any]:
    return {"same": {"x": np.zeros(size)}, "own": {"rank": rank, "v": np.zeros(3) + rank}}


def sound(run: Path) -> list[int]:
    """Return the steps of a run, every one of which verifies."""
    found = holdfast.Run(str(run))
    for checkpoint in found:
        assert list(checkpoint.verify()) == []
    return found.steps


def test_an_epoch_that_ends_at_a_step_that_was_a_turn_is_another_turn(tmp_path: Path) -> None:
    def body(rank: int) -> object:
        state = state_of(rank)
        with ranked(tmp_path / "run", state, rank, save=every(steps=5) | every(epochs=1)) as ckpt:
            for epoch in ckpt.epochs(3):
                for _ in ckpt.steps(5 * (epoch + 1)):
                    state["same"]["x"] += 1
            return ckpt.step, ckpt.clock.epoch

    assert values(side_by_side(2, body)) == [(15, 3)] * 2
    assert sound(tmp_path / "run") == [5, 10, 15]
    assert holdfast.Run(str(tmp_path / "run")).latest.clock.epoch == 3


def test_steps_that_come_again_after_a_restore_do_not_touch_what_was_set_aside(tmp_path: Path) -> None:
    def body(rank: int) -> object:
        state = state_of(rank, 40_000)
        back = False
        with ranked(tmp_path / "run", state, rank) as ckpt:
            for _ in ckpt.steps(10):
                state["same"]["x"] += 100 if back else 1
                if ckpt.step == 7 and not back:
                    back = True
                    ckpt.wait()
                    ckpt.restore(2)
            return state["same"]["x"][0]

    assert values(side_by_side(2, body)) == [2 + 8 * 100] * 2
    assert sound(tmp_path / "run") == [2, 4, 6, 8, 10]
    run = holdfast.Run(str(tmp_path / "run"))
    kept = [json.loads(p.read_bytes()) for p in sorted((tmp_path / "run" / "trash").iterdir())]
    assert [t["manifest"]["step"] for t in kept] == [4, 6]
    for document in kept:  # and can be brought back
        for part in document["manifest"]["parts"].values():
            for file in part.get("files", []):
                assert (tmp_path / "run" / file["key"]).stat().st_size == file["size"]
    assert run[4].values(as_="numpy")["same"]["x"][0] == 202


class Unstorable:
    pass


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("memory", [None, 70_000])
def test_a_rank_that_cannot_even_begin_a_save_is_waited_for_by_nobody(
    tmp_path: Path, who: int, memory: int | None
) -> None:
    def body(rank: int) -> None:
        state = state_of(rank, 40_000)
        with ranked(tmp_path / "run", state, rank, memory=memory if rank == who else None) as ckpt:
            for step in ckpt.steps(9):
                state["same"]["x"] += 1
                if rank == who and step == 3:
                    state["own"]["bad"] = Unstorable()

    ends = side_by_side(2, body)
    assert isinstance(ends[who].error, UnsupportedValue)
    assert isinstance(ends[1 - who].error, SaveFailed)
    assert "own/bad" in str(ends[1 - who].error)
    assert f"rank {who}" in str(ends[1 - who].error)
    assert all(end.seconds < SECONDS / 2 for end in ends)
    assert sound(tmp_path / "run") == [2]
    assert {p.name[:12] for p in (tmp_path / "run/data").iterdir() if any(p.iterdir())} == {"000000000002"}


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_leaves_by_an_exception_is_waited_for_by_nobody(tmp_path: Path, who: int) -> None:
    def body(rank: int) -> None:
        state = state_of(rank)
        with ranked(tmp_path / "run", state, rank) as ckpt:
            for step in ckpt.steps(9):
                if rank == who and step == 3:
                    raise ZeroDivisionError

    ends = side_by_side(2, body)
    assert isinstance(ends[who].error, ZeroDivisionError)
    assert f"rank {who}" in str(ends[1 - who].error)
    assert all(end.seconds < SECONDS / 2 for end in ends)
    assert sound(tmp_path / "run") == [2]


def test_who_hears_nothing_of_a_save_names_who_is_late(tmp_path: Path) -> None:
    given_up = threading.Event()

    def body(rank: int) -> None:
        seconds = 2.0 if rank == 2 else SECONDS
        try:
            with ranked(tmp_path / "run", state_of(rank), rank, ranks=(rank, 3, seconds)) as ckpt:
                for _ in ckpt.steps(2):
                    if rank == 1:
                        given_up.wait(SECONDS)
        finally:
            if rank == 2:
                given_up.set()

    ends = side_by_side(3, body)
    assert isinstance(ends[2].error, SaveFailed)
    assert "rank 1 left no record" in str(ends[2].error)


def test_what_a_rank_had_for_itself_and_shares_now_is_not_found_among_its_own(tmp_path: Path) -> None:
    def launch(step: int, value: float, replicated: list[str], memory: int | None = None) -> list[object]:
        def body(rank: int) -> object:
            # `u` never changes, so the file that holds it, and an old `t`, stays.
            state = {"m": {"t": np.full(20_000, -1.0)}, "o": {"u": np.full(20_000, 7.0 + rank)}}
            how = {"replicated": replicated, "save": every(steps=1), "memory": memory}
            with ranked(tmp_path / "run", state, rank, **how) as ckpt:
                found = state["m"]["t"][0] if step == ckpt.step else None
                for _ in ckpt.steps(step):
                    found = state["m"]["t"][0]
                    state["m"]["t"][:] = value
                return found if found is not None else state["m"]["t"][0], state["o"]["u"][0]

        return values(side_by_side(2, body))

    launch(1, 1.0, [])
    launch(2, 2.0, ["m/**"])
    newest = holdfast.Run(str(tmp_path / "run")).latest.manifest.parts["~1"]
    assert any("/000000000001-" in file.key for file in newest.files)  # it is still referred to
    assert launch(2, 0.0, ["m/**"]) == [(2.0, 7.0), (2.0, 8.0)]
    assert launch(3, 3.0, ["m/**"], memory=170_000) == [(2.0, 7.0), (2.0, 8.0)]  # in waves
    assert launch(4, 4.0, []) == [(3.0, 7.0), (3.0, 8.0)]
    assert launch(4, 0.0, []) == [(4.0, 7.0), (4.0, 8.0)]
    assert sound(tmp_path / "run") == [1, 2, 3, 4]


def test_a_tensor_that_goes_to_another_owner_and_back_has_its_newest_value(tmp_path: Path) -> None:
    """Rank 1 has `t` in step 1, rank 0 in step 2, where `k` becomes what it stays, and rank 1 again in step 3, with the
    value of step 1."""

    def launch(step: int, value: float) -> list[object]:
        def body(rank: int) -> object:
            tensors = {"a": np.full(30_000, 5.0), "b": np.full(29_000, 6.0)}
            tensors |= {"t": np.full(20_000, value), "k": np.zeros(10_000)}
            state = {"m": tensors | ({"more": np.full(29_500, 9.0)} if step == 2 else {})}
            how = {"replicated": ["**"], "save": every(steps=1), "missing": ["**"], "unexpected": ["**"]}
            with ranked(tmp_path / "run", state, rank, **how) as ckpt:
                for _ in ckpt.steps(step):
                    state["m"]["t"][:] = value
                    state["m"]["k"][:] = 3.0 if step > 1 else 0.0
                    if step != 2:
                        state["m"].pop("more", None)
                return state["m"]["t"][0], ckpt.step

        return values(side_by_side(2, body))

    for step, value in ((1, 1.0), (2, 2.0), (3, 1.0)):
        assert launch(step, value) == [(value, step)] * 2
    parts = [c.manifest.parts["m"].files for c in holdfast.Run(str(tmp_path / "run"))]
    assert any(file in parts[2] for file in parts[1] if "-00000-of" in file.key)  # rank 0 still needs it
    assert launch(3, 0.0) == [(1.0, 3)] * 2
    assert sound(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_who_does_not_come_is_named_by_all_who_did(tmp_path: Path, writer: str) -> None:
    def body(rank: int) -> None:
        if rank != 2:
            ranked(tmp_path / "run", state_of(rank), rank, ranks=(rank, 4, 1.5), writer=writer)

    ends = side_by_side(4, body)
    for rank in (0, 1, 3):
        assert isinstance(ends[rank].error, RanksDisagree)
        assert "rank 2 did not come" in str(ends[rank].error)


def test_saves_with_gradients_and_without_follow_each_other(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def body(rank: int) -> object:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = {"model": model, "optimizer": optimizer, "own": {"v": np.zeros(3) + rank}}
        with ranked(tmp_path / "run", state, rank, save=every(steps=1)) as ckpt:
            for step in ckpt.steps(5):
                model(torch.ones(1, 3)).sum().backward()
                if step % 2 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        return model.weight.tolist()

    one, other = values(side_by_side(2, body))
    found = holdfast.Run(str(tmp_path / "run"))
    assert ["model/weight.grad" in c.tensors for c in found] == [False, True, False, True, False]
    assert sound(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert found.latest.tensors["model/weight"][...].tolist() == one != other


def test_where_there_is_no_checkpoint_all_ranks_hear_the_same_error(tmp_path: Path) -> None:
    def body(rank: int) -> object:
        state = state_of(rank)
        with ranked(tmp_path / "run", state, rank) as ckpt:
            with pytest.raises(NoCheckpoint):
                ckpt.restore()
            for _ in range(3):
                ckpt.step_end()
            with pytest.raises(NoCheckpoint):
                ckpt.restore("nowhere")
            with pytest.raises(NoCheckpoint):
                ckpt.restore(7)
            return ckpt.restore(2) is not None

    assert values(side_by_side(2, body)) == [True] * 2


def test_damage_in_what_is_another_ranks_own_is_mended_from_a_mirror(tmp_path: Path) -> None:
    steps = 4

    def body(rank: int) -> object:
        state = state_of(rank)
        state["own"]["v"] += 1
        with ranked(tmp_path / "run", state, rank, mirrors=[tmp_path / "mirror"]) as ckpt:
            done = list(ckpt.steps(steps))
            return done, state["own"]["v"][0], ckpt.restore_report.notes if ckpt.restore_report else []

    assert [v[0] for v in values(side_by_side(2, body))] == [[0, 1, 2, 3]] * 2
    newest = holdfast.Run(str(tmp_path / "run")).latest
    path = tmp_path / "run" / newest.manifest.parts["~1"].files[0].key
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    steps = 6
    found = values(side_by_side(2, body))
    assert [(v[0], v[1]) for v in found] == [([4, 5], 1.0), ([4, 5], 2.0)]
    assert any("mirror" in note for note in found[0][2])
    assert sound(tmp_path / "run") == [2, 4, 6]


def test_a_rank_that_is_too_far_behind_to_hear_what_was_decided_says_so(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        how = {"save": best("loss", mode="min") & every(steps=10**6)}
        with ranked(tmp_path / "run", state_of(rank), rank, **how) as ckpt:
            for step in ckpt.steps(150):
                ckpt.log(loss=1.0)
                while rank == 1 and step == 2 and not (tmp_path / "far ahead").exists():
                    time.sleep(0.05)
                if rank == 0 and step == 120:
                    (tmp_path / "far ahead").touch()

    ends = side_by_side(2, body)
    assert isinstance(ends[1].error, RanksDisagree)
    assert "64 times since" in str(ends[1].error)
    assert isinstance(ends[0].error, SaveFailed)
    assert "rank 1" in str(ends[0].error)
    assert all(end.seconds < SECONDS / 2 for end in ends)
