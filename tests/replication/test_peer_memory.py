"""A mirror in the memory of another machine: a real service, and runs that come back from it."""

from __future__ import annotations

import logging
import pathlib
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest

from holdfast import Checkpointer, Run, every, last
from holdfast.core.errors import NotReplicated, PolicyError, SaveFailed, StoreError
from holdfast.replication import Mirror
from holdfast.replication.mirror import MirrorLike
from holdfast.stores import open_store
from servers.peers import PEER_SECRET, Peer, serving_peer

ROWS = 125_000  # 1 MB in each of two arrays


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_PEER_SECRET", PEER_SECRET)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with serving_peer() as peer:
        yield peer


def learn(
    where: str | pathlib.Path, total: int, mirrors: list[MirrorLike], **options: object
) -> dict[str, object]:
    """Train on noise that comes from a captured generator; return the state. Every step waits for all copies."""
    held: dict[str, object] = {"w": np.zeros(ROWS), "m": np.zeros(ROWS), "noise": np.random.default_rng(7)}
    options = {"save": every(steps=1), "keep": last(2), "writer": "thread"} | options
    with Checkpointer(where, held, mirrors=mirrors, **options) as ckpt:  # type: ignore[arg-type]
        for _ in ckpt.steps(total):
            held["m"][:] = 0.9 * held["m"] + held["noise"].standard_normal(ROWS)  # type: ignore[index, operator, attr-defined]
            held["w"][:] -= 0.01 * held["m"]  # type: ignore[index, operator]
    return held


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    return all(np.array_equal(one[k], other[k]) for k in "wm")  # type: ignore[arg-type]


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_run_whose_disk_is_lost_goes_on_from_the_memory_of_a_peer(
    tmp_path: pathlib.Path, peer: Peer, writer: str
) -> None:
    mirrors: list[MirrorLike] = [Mirror(f"{peer.url}/run", keep=last(1))]
    learn(tmp_path / "run", 6, mirrors, writer=writer)
    shutil.rmtree(tmp_path / "run")
    again = learn(tmp_path / "elsewhere", 9, mirrors, writer=writer)
    assert same(again, learn(tmp_path / "whole", 9, []))
    assert Run(tmp_path / "elsewhere").latest.step == 9


def test_a_peer_keeps_the_newest_alone_within_its_memory(tmp_path: pathlib.Path) -> None:
    with serving_peer("7MB") as peer:  # of 2 MB each: the newest, and the one that is on its way
        learn(tmp_path / "run", 12, [Mirror(f"{peer.url}/run", keep=last(1))], ack="all")
        assert Run(f"{peer.url}/run").steps == [12]
        held = sum(o.size for o in open_store(f"{peer.url}/run").list(""))
        assert 2_000_000 <= held < 2_500_000


def test_a_peer_that_is_full_is_a_warning_and_training_goes_on(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_peer("1MB") as peer:
        held = learn(tmp_path / "run", 4, [Mirror(f"{peer.url}/run", keep=last(1))])
        assert "its memory is full" in caplog.text
        assert Run(tmp_path / "run").latest.step == 4
        assert same(held, learn(tmp_path / "whole", 4, []))
        with serving_peer() as larger:
            shutil.copytree(tmp_path / "run", tmp_path / "copy")
            learn(tmp_path / "copy", 5, [f"{larger.url}/run"])
            assert Run(f"{larger.url}/run").latest.step == 5


def test_a_peer_that_is_lost_and_started_again_is_filled_again(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer("64MB")
    bind = peer.url.removeprefix("peer://")
    try:
        held = {"w": np.zeros(ROWS)}
        with Checkpointer(
            tmp_path / "run", held, save=every(steps=1), mirrors=[f"{peer.url}/run"], ack="all"
        ) as ckpt:
            for step in ckpt.steps(6):
                held["w"] += 1
                if step == 2:
                    ckpt.wait()
                    peer.kill()
                    peer = Peer("64MB", bind)
        assert Run(f"{peer.url}/run").steps == [1, 2, 3, 4, 5, 6]
        assert not [r for r in caplog.records if r.levelno > logging.WARNING]
    finally:
        peer.kill()


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_run_in_the_memory_of_a_peer_goes_on_from_a_durable_mirror(
    tmp_path: pathlib.Path, writer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every step to memory, every third to the disk, as GEMINI does; then the memory is gone."""
    durable = Mirror(str(tmp_path / "durable"), keep=every(steps=3))
    with serving_peer() as peer:
        learn(f"{peer.url}/run", 7, [durable], writer=writer)
        assert Run(f"{peer.url}/run").steps == [6, 7]
        assert Run(tmp_path / "durable").steps == [3, 6, 7]
    with serving_peer() as fresh:
        again = learn(f"{fresh.url}/run", 9, [durable], writer=writer)
        assert "step 7 was brought back from the mirror" in caplog.text
        assert same(again, learn(tmp_path / "whole", 9, []))


def test_a_service_that_was_restarted_under_a_run_in_it_ends_the_training_and_not_silently(
    tmp_path: pathlib.Path,
) -> None:
    durable = Mirror(str(tmp_path / "durable"), keep=every(steps=2))
    peer = Peer("64MB")
    bind = peer.url.removeprefix("peer://")
    held = {"w": np.zeros(ROWS)}
    try:
        ckpt = Checkpointer(
            f"{peer.url}/run", held, save=every(steps=1), mirrors=[durable], ack="all", mirror_seconds=3
        )
        with pytest.raises((SaveFailed, StoreError), match="was restarted and has lost what it held"):
            for step in ckpt.steps(8):
                held["w"] += 1
                if step == 3:
                    ckpt.wait()
                    peer.kill()
                    peer = Peer("64MB", bind)
        with pytest.raises((SaveFailed, StoreError, NotReplicated)):
            ckpt.close()
        with Checkpointer(f"{peer.url}/run", held, save=every(steps=1), mirrors=[durable]) as ckpt:
            resumed = next(iter(ckpt.steps(8)))
        assert 2 <= resumed <= 4
        assert held["w"][0] == resumed
    finally:
        peer.kill()


def test_a_mirror_with_an_interval_rests_until_it_is_waited_for(tmp_path: pathlib.Path) -> None:
    held = {"w": np.zeros(10)}
    often, seldom = str(tmp_path / "often"), Mirror(str(tmp_path / "seldom"), interval="1h")
    ckpt = Checkpointer(tmp_path / "run", held, save=every(steps=1), mirrors=[often, seldom], ack=2)

    def newest() -> list[int | None]:
        return [status.newest for status in ckpt.mirrors]

    for step in ckpt.steps(6):
        held["w"] += 1
        while step == 1 and newest() != [1, 1]:  # the first copy comes at once
            time.sleep(0.01)
        while step > 1 and newest()[0] != step:
            time.sleep(0.01)
        if step == 5:
            assert newest() == [5, 1]
            while ckpt.mirrors[0].state != "ok":  # the pass ends after its newest checkpoint is there
                time.sleep(0.01)
            assert newest() == [5, 1]
            assert ckpt.mirrors[1].state == "behind"
    assert newest()[0] == 6
    ckpt.close()
    assert newest() == [6, 6]
    with pytest.raises(PolicyError):
        Mirror("x", interval="soon")
