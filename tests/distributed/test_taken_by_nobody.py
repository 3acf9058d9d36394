"""What is stored and taken by no rank is an error on every rank, whoever had it; what one of them takes is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from distributed.side_by_side import End, side_by_side, values
from holdfast import every
from holdfast.catalog.ranks import View, view_of
from holdfast.core.errors import RanksDisagree
from holdfast.format.manifest import Manifest
from holdfast.loop import resume, untaken
from holdfast.stores import Store

State = dict[str, Any]
Options = dict[str, Any]
SECONDS = 100.0
STRICT: Options = {}


def launch(run: Path, steps: int, states: Sequence[State], options: Sequence[Options] = ()) -> list[End]:
    """Run as many ranks as there are states up to a step; each returns its state as it was restored, or is saved."""

    def body(rank: int) -> State:
        how = options[rank] if options else STRICT
        ranks = (rank, len(states), SECONDS)
        with holdfast.Checkpointer(
            str(run), states[rank], ranks=ranks, writer="thread", save=every(steps=1), **how
        ) as ckpt:
            list(ckpt.steps(steps))
        return states[rank]

    return side_by_side(len(states), body)


def state(rank: float, **more: object) -> State:
    return {"own": {"v": np.full(3, float(rank))}} | more


def refused(ends: list[End], what: str) -> None:
    for end in ends:
        assert isinstance(end.error, RanksDisagree), end
        assert f"no rank has anything that takes {what} of the checkpoint" in str(end.error)
        assert end.seconds < SECONDS / 2


@pytest.fixture
def module() -> Callable[..., object]:
    """What makes a thing that has a place for what it was made with, and for nothing else."""
    torch = pytest.importorskip("torch")

    def made(**buffers: float) -> object:
        found = torch.nn.Module()
        for name, value in buffers.items():
            found.register_buffer(name, torch.full((2,), value))
        return found

    return made


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("more", [{"t": np.ones(3)}, {"n": 5}, 5])
def test_what_one_rank_had_and_none_has_is_refused(tmp_path: Path, who: int, more: object) -> None:
    values(launch(tmp_path, 1, [state(r, **({"more": more} if r == who else {})) for r in range(3)]))
    refused(launch(tmp_path, 2, [state(r) for r in range(3)]), "more")
    assert holdfast.Run(str(tmp_path)).steps == [1]


def test_what_one_rank_had_and_another_has_is_taken(tmp_path: Path) -> None:
    values(launch(tmp_path, 1, [state(0), state(1, more={"n": 5}), state(2)]))
    found = values(launch(tmp_path, 1, [state(7), state(7), state(7, more={"n": 0})]))
    assert [s["own"]["v"][0] for s in found] == [0, 1, 2]
    assert found[2]["more"] == {"n": 5}


def test_what_two_ranks_had_and_one_has_is_taken(tmp_path: Path) -> None:
    values(launch(tmp_path, 1, [state(0), state(1, more={"n": 5}), state(2, more={"n": 6})]))
    found = values(launch(tmp_path, 1, [state(7), state(7), state(7, more={"n": 0})]))
    assert found[2]["more"] == {"n": 6}


@pytest.mark.parametrize("who", [(1,), (0, 1, 2)])
def test_who_has_it_may_ignore_it(tmp_path: Path, who: tuple[int, ...]) -> None:
    values(launch(tmp_path, 1, [state(0), state(1, more=5), state(2)]))
    options = [{"unexpected": ["more"]} if r in who else STRICT for r in range(3)]
    found = values(launch(tmp_path, 1, [state(7) for _ in range(3)], options))
    assert [s["own"]["v"][0] for s in found] == [0, 1, 2]


def test_what_is_not_asked_for_is_missed_by_nobody(tmp_path: Path) -> None:
    values(launch(tmp_path, 1, [state(0), state(1, more=5)]))

    def body(rank: int) -> object:
        mine = state(7)
        with holdfast.Checkpointer(
            str(tmp_path), mine, ranks=(rank, 2, SECONDS), writer="thread", save=every(steps=1)
        ) as ckpt:
            ckpt.restore(1, only=["own/**"])
        return mine["own"]["v"][0]

    assert values(side_by_side(2, body)) == [0, 1]


def test_a_part_of_it_that_another_rank_has_does_not_hide_the_rest(
    tmp_path: Path, module: Callable[..., object]
) -> None:
    had = [state(0), state(1, more=module(a=1, z=1)), state(2, more=module(a=2))]
    values(launch(tmp_path, 1, had))
    refused(launch(tmp_path, 2, [state(0), state(1), state(2, more=module(a=0))]), "more")


def test_ranks_that_lack_more_and_less_of_it_miss_the_same(
    tmp_path: Path, module: Callable[..., object]
) -> None:
    """At another number of ranks than saved it, and laid out otherwise at the same."""
    values(launch(tmp_path, 1, [state(0, more=module(a=1, z=1)), state(1)]))
    refused(launch(tmp_path, 2, [state(0), state(1, more=module(a=0)), state(2)]), "more/z")
    refused(launch(tmp_path, 2, [state(0), state(1, more=module(a=0))]), "more/z")
    found = values(launch(tmp_path, 1, [state(0), state(1, more=module(a=0, z=0)), state(2)]))
    assert found[1]["more"].z.tolist() == [1, 1]


@pytest.mark.parametrize(("had", "has"), [(0, 0), (1, 1), (0, 2)])
def test_who_lacks_nothing_gets_what_was_its_own_and_no_more(tmp_path: Path, had: int, has: int) -> None:
    """Where one rank has something that the others have not, or left it to another."""

    def states(full: bool, log: int) -> list[State]:
        own = [{f"v{r}": np.full(3, float(r)), "seen": [r] * r} if full else {} for r in range(3)]
        return [{"own": own[r]} | ({"log": {"n": 5 * full}} if r == log else {}) for r in range(3)]

    values(launch(tmp_path, 1, states(True, had)))
    for rank, found in enumerate(values(launch(tmp_path, 1, states(False, has)))):
        assert list(found["own"]) == [f"v{rank}", "seen"]
        assert found["own"][f"v{rank}"].tolist() == [rank] * 3
        assert found["own"]["seen"] == [rank] * rank
        assert found.get("log") == ({"n": 5} if rank == has else None)


def test_who_resumes_as_it_saved_reads_nothing_of_other_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> list[State]:
        return [state(0, log={"n": 5}), state(1), state(2)]

    values(launch(tmp_path, 1, states()))
    looked: list[tuple[int, bool]] = []

    def looks(store: Store, manifest: Manifest, rank: int, world: int, *, wide: bool = False) -> View:
        looked.append((rank, wide))
        return view_of(store, manifest, rank, world, wide=wide)

    monkeypatch.setattr(resume, "view_of", looks)
    monkeypatch.setattr(untaken, "view_of", looks)
    values(launch(tmp_path, 1, states()))
    assert sorted(looked) == [(0, False), (1, False), (2, False)]


@pytest.mark.parametrize("now", ["acb", "cba", "bca"])
def test_stages_that_some_ranks_exchange(tmp_path: Path, module: Callable[..., Any], now: str) -> None:
    values(launch(tmp_path, 1, [{"model": module(**{name: i})} for i, name in enumerate("abc")]))
    found = values(launch(tmp_path, 1, [{"model": module(**{name: 9})} for name in now]))
    for name, mine in zip(now, found, strict=True):
        assert getattr(mine["model"], name).tolist() == ["abc".index(name)] * 2


@pytest.mark.parametrize(("now", "left"), [("abb", "c"), ("caa", "b"), ("cbb", "a")])
def test_a_stage_that_no_rank_has_any_more(
    tmp_path: Path, module: Callable[..., Any], now: str, left: str
) -> None:
    values(launch(tmp_path, 1, [{"model": module(**{name: 1})} for name in "abc"]))
    refused(launch(tmp_path, 1, [{"model": module(**{name: 9})} for name in now]), f"model/{left}")
