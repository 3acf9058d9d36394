"""Rings of peers: what a majority decided stays, whoever is lost; without one nothing is decided."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from holdfast import Checkpointer, Run, every, last
from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, StoreError
from holdfast.replication import Mirror
from holdfast.stores import Stream, open_store
from holdfast.stores.peers import messages as m
from holdfast.stores.peers import quorum
from holdfast.stores.peers.address import PeerAddress, RingAddress, parse_ring
from holdfast.stores.peers.ring import RingStore
from holdfast.stores.peers.secret import Secret
from holdfast.stores.peers.service import PeerService
from holdfast.testing.stores import at_once
from patience import until

WORDS = "a secret of the rings here"
SECRET = Secret(WORDS)
LARGE = 600_000


class Hosts:
    """Services that can be lost, and started again at the same port, empty."""

    def __init__(self, count: int = 3, memory: int = 64 << 20) -> None:
        self._memory = memory
        self.services = [PeerService("127.0.0.1", 0, memory, secret=SECRET) for _ in range(count)]
        for service in self.services:
            service.start()

    def store(self, name: str = "run", copies: int = 2) -> RingStore:
        """Open the ring as another process would."""
        return RingStore(RingAddress(tuple(s.address for s in self.services), name, copies), secret=SECRET)

    def lose(self, index: int) -> None:
        self.services[index].stop()

    def restart(self, index: int) -> None:
        port = self.services[index].address.port
        self.services[index].stop()
        self.services[index] = PeerService("127.0.0.1", port, self._memory, secret=SECRET)
        self.services[index].start()

    def stop(self) -> None:
        for service in self.services:
            service.stop()


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    monkeypatch.setenv("HOLDFAST_PEER_SECRET", WORDS)
    found = Hosts()
    yield found
    found.stop()


def accept_at_one(store: RingStore, index: int, key: str, data: bytes, number: int = 1) -> None:
    """Do what a writer does that dies when all have promised and one service has accepted its value."""
    ring, ballot = store._quorum._id, m.Ballot(number, os.urandom(16))
    value = m.Value(os.urandom(16), False, len(data), 1.0, data)
    links = [one.link for one in store._stores]
    answers = [link.ask(m.Prepare("run", ring, key, ballot), "prepare") for link in links]
    answers.append(links[index].ask(m.Accept("run", ring, key, ballot, value), "accept"))
    assert all(isinstance(answer, m.Vote) and answer.granted for answer in answers)


@pytest.mark.parametrize("lost", range(3))
def test_any_one_host_may_be_lost_and_nothing_is(hosts: Hosts, lost: int) -> None:
    store = hosts.store()
    data = {f"k{n}": os.urandom(LARGE if n % 2 else 100) for n in range(6)}
    for key, raw in data.items():
        store.create(key, raw)
    hosts.lose(lost)
    for reader in (store, hosts.store()):
        assert {key: reader.read(key) for key in reader.names("")} == data
        for key in data:
            with pytest.raises(AlreadyExists):
                reader.create(key, b"another")
    store.create("after", b"x" * LARGE)
    store.replace("k1", b"new")
    store.delete(["k2"])
    again = hosts.store()
    assert again.read("after") == b"x" * LARGE
    assert again.read("k1") == b"new"
    with pytest.raises(NotFound):
        again.read("k2")


def test_without_a_majority_everything_is_refused(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("k", b"x")
    hosts.lose(0)
    hosts.lose(1)
    acts: list[Callable[[RingStore], object]] = [
        lambda s: s.create("n", b"x"), lambda s: s.replace("k", b"y"), lambda s: s.read("k"), lambda s: s.list(""), lambda s: s.delete(["k"]),
        lambda s: s.write_streams([Stream("d", 0, [b"x"], bytes)]),
    ]  # fmt: skip
    for reader in (store, hosts.store()):
        for act in acts:
            with pytest.raises(StoreError, match="majority") as raised:
                act(reader)
            assert not isinstance(raised.value, (AlreadyExists, NotFound))


def test_a_service_that_was_restarted_has_forgotten_how_it_voted_and_does_not_vote(hosts: Hosts) -> None:
    first = hosts.store()
    first.names("")
    first._quorum.set_aside(2, StoreError("cut off for a while"))
    first.create("manifest", b"the first writer's")  # is decided by 0 and 1
    hosts.restart(1)
    second = hosts.store()
    with pytest.raises(AlreadyExists):
        second.create("manifest", b"the second writer's")
    hosts.lose(0)  # 1 and 2 are two of three, and 1 has forgotten
    for store in (first, second, hosts.store()):
        with pytest.raises(StoreError, match="majority") as raised:
            store.create("another", b"the second writer's")
        assert not isinstance(raised.value, AlreadyExists)
        with pytest.raises(StoreError, match="majority"):
            store.read("manifest")


def test_a_ring_is_formed_anew_when_all_are_there_and_the_old_one_has_lost_its_majority(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("old", b"x" * LARGE)
    hosts.restart(0)
    hosts.lose(1)
    with pytest.raises(StoreError, match="formed when all of its services are there"):
        hosts.store().names("")
    hosts.restart(1)
    fresh = hosts.store()
    assert fresh.names("") == []
    fresh.create("new", b"x" * LARGE)
    assert hosts.store().names("") == ["new"]
    with pytest.raises(StoreError):
        store.read("old")
    with pytest.raises(StoreError):
        store.create("other", b"x")


def test_a_network_that_was_cut_for_a_moment_is_not_the_loss_of_a_majority(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("a/k", b"small")
    acts: list[Callable[[], object]] = [
        lambda: store.read("a/k") == b"small",
        lambda: store.names("a") == ["a/k"],
        lambda: store.write("b/large", [bytes(LARGE)]) is None,
        lambda: store.read("b/large") == bytes(LARGE),
        lambda: store.delete(["a/k"]) is None,
    ]
    for act in acts:
        for index in range(3):  # each failed just now
            store._quorum.set_aside(index, StoreError("cut off for a moment"))
        assert act()
    assert store.names("") == ["b/large"]


def test_a_ring_is_not_taken_apart_by_who_names_other_hosts(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("k", b"x")
    mine = [s.address for s in hosts.services]
    with PeerService("127.0.0.1", 0, 1 << 20, secret=SECRET) as other:
        for places in ([*mine[1:], other.address], [*mine, other.address], [mine[1], mine[0], mine[2]]):
            with pytest.raises(StoreError, match=r"with others|no such majority"):
                RingStore(RingAddress(tuple(places), "run"), secret=SECRET).create("n", b"x")
    assert hosts.store().names("") == store.names("") == ["k"]
    places = ",".join(a.place for a in reversed(mine))
    assert (
        open_store(f"peers://{places}/run").url
        == open_store(f"peers://{','.join(a.place for a in mine)}/run").url
    )


def test_one_that_is_restarted_alone_takes_no_part_and_the_others_go_on(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("k", b"x")
    hosts.restart(1)
    for reader in (store, hosts.store()):
        assert reader.read("k") == b"x"
    store.create("n", b"y" * LARGE)
    hosts.lose(0)
    with pytest.raises(StoreError, match=r"restarted|majority"):
        hosts.store().read("k")


@pytest.mark.parametrize("index", range(3))
def test_what_a_writer_that_died_had_accepted_by_one_is_completed_by_who_sees_it(
    hosts: Hosts, index: int
) -> None:
    store = hosts.store()
    store.names("")
    accept_at_one(store, index, "created", b"of the dead")
    accept_at_one(store, index, "read", b"of the dead")
    accept_at_one(store, index, "listed", b"of the dead")
    with pytest.raises(AlreadyExists):  # it is seen, so it is completed
        store.create("created", b"of the living")
    assert store.read("read") == b"of the dead"
    assert store.names("") == ["created", "listed", "read"]
    hosts.lose(index)
    again = hosts.store()
    assert {again.read(key) for key in ("created", "read", "listed")} == {b"of the dead"}


def test_what_one_lost_host_alone_had_accepted_is_not_there(hosts: Hosts) -> None:
    store = hosts.store()
    store.names("")
    accept_at_one(store, 0, "half", b"of the dead")
    hosts.lose(0)
    other = hosts.store()
    other.create("half", b"of the living")
    assert other.read("half") == b"of the living"


def test_rivals_never_both_win_while_a_host_is_lost(hosts: Hosts) -> None:
    for turn in range(3):
        if turn == 1:
            threading.Timer(0.03, hosts.lose, [turn]).start()
        stores = [hosts.store() for _ in range(4)]
        keys = [f"race/{turn}-{n}" for n in range(6)]
        for key in keys:
            outcomes = at_once([partial(s.create, key, b"%d" % i) for i, s in enumerate(stores)])
            winners = [i for i, outcome in enumerate(outcomes) if outcome is None]
            assert len(winners) <= 1, outcomes
            assert all(isinstance(o, StoreError) for o in outcomes if o is not None)
            read = hosts.store().read(key)
            assert not winners or read == b"%d" % winners[0]


def test_a_host_that_is_lost_in_the_middle_of_an_object_is_replaced_by_another(hosts: Hosts) -> None:
    store = hosts.store()
    store.names("")
    raw = random.Random(3).randbytes(9 << 20)
    order: list[int] = []

    def body() -> Iterator[bytes]:
        for at in range(0, len(raw), 1 << 20):
            if at == 4 << 20:
                used = [i for i, s in enumerate(hosts.services) if s.shelf.used_bytes > 1 << 20]
                order.extend(used)
                hosts.lose(used[0])
            yield raw[at : at + (1 << 20)]

    store.write_streams([Stream("d", 4, body(), lambda: b"head")])
    assert len(order) == 2
    assert store.read("d") == b"head" + raw
    assert sum(s.shelf.used_bytes > 9 << 20 for s in hosts.services) == 2


def test_bytes_of_what_is_no_object_any_more_are_freed(hosts: Hosts) -> None:
    store = hosts.store()
    for n in range(4):
        store.replace("k", bytes([n]) * LARGE)
    store.write_streams([Stream("s", 0, [b"x" * LARGE], bytes)])
    with pytest.raises(RuntimeError):
        store.write_streams([Stream("t", 0, _failing(), bytes)])
    with pytest.raises(AlreadyExists):
        store.create("k", b"y" * LARGE)
    store.delete(["k", "s"])
    until(lambda: max(s.shelf.used_bytes for s in hosts.services) < 10_000, "their memory to be free")


def _failing() -> Iterator[bytes]:
    yield b"x" * LARGE
    raise RuntimeError


def test_a_sweep_frees_what_was_sent_and_never_decided(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("k", b"x" * LARGE)
    store._stores[1].create("bulk/0123", b"y" * LARGE)
    store.sweep(2e10)
    assert store.read("k") == b"x" * LARGE
    until(lambda: sum(s.shelf.used_bytes for s in hosts.services) < 3 * LARGE, "what was swept to be free")


def test_what_a_full_ring_had_half_accepted_hinders_nobody(hosts: Hosts) -> None:
    store = hosts.store()
    before = bytes(200_000)
    for key in ("a/old", "a/other"):
        store.create(key, before)
    accept_at_one(store, 0, "a/new", bytes(200_000))
    accept_at_one(store, 0, "a/old", bytes(200_001), number=9)
    for service in hosts.services[1:]:
        service.shelf.limit_bytes = service.shelf.used_bytes
    with pytest.raises(OutOfSpace):
        store.create("a/further", before)
    for _ in range(2):
        assert [(o.key, o.size) for o in store.list("a")] == [("a/old", 200_000), ("a/other", 200_000)]
        assert store.read("a/old") == before
        with pytest.raises(NotFound):
            store.read("a/new")
    store.delete(["a/old"])
    store.create("a/new", before)  # in its room
    assert store.names("a") == ["a/new", "a/other"]


def test_what_a_full_ring_may_have_decided_is_not_given_up(hosts: Hosts) -> None:
    store = hosts.store()
    store.create("a/old", b"1")
    accept_at_one(store, 0, "a/new", bytes(200_000))
    shelf = hosts.services[1].shelf
    shelf.limit_bytes = shelf.used_bytes
    hosts.lose(2)  # which perhaps had accepted it too
    with pytest.raises(OutOfSpace):
        store.list("a")
    shelf.limit_bytes = 1 << 20
    assert store.read("a/new") == bytes(200_000)


def test_a_full_ring_says_so_and_can_be_emptied() -> None:
    found = Hosts(memory=2 << 20)
    try:
        store = found.store()
        with pytest.raises(OutOfSpace):
            for n in range(20):
                store.create(f"k{n}", b"x" * LARGE)
        store.delete(store.names(""))
        store.create("again", b"x" * LARGE)
    finally:
        found.stop()


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_run_in_a_ring_trains_on_when_a_host_is_lost_and_resumes_there(
    hosts: Hosts, tmp_path: object, writer: str
) -> None:
    url = hosts.store().url
    durable = Mirror(f"{tmp_path}/durable", interval="1h")

    def train(where: str, total: int, lose: int | None = None) -> float:
        state = {"w": np.zeros(100_000), "noise": np.random.default_rng(3)}
        with Checkpointer(
            where, state, save=every(steps=1), keep=last(2), mirrors=[durable], writer=writer  # type: ignore[arg-type]
        ) as ckpt:  # fmt: skip
            for step in ckpt.steps(total):
                if step == 3 and lose is not None:
                    hosts.lose(lose)
                state["w"] += state["noise"].standard_normal(100_000)  # type: ignore[attr-defined]
        return float(state["w"].sum())

    train(url, 6, lose=1)
    assert Run(url).latest.step == 6
    through = train(url, 8)
    hosts.lose(0)
    with pytest.raises(StoreError, match="majority"):
        train(url, 9)
    assert train(f"{tmp_path}/elsewhere", 8) == through  # what the durable mirror holds, which is all of it


def test_urls_of_rings() -> None:
    url = "peers://[::1]:3,a:1,b:2/runs/x?copies=3"
    assert parse_ring(url).url == url
    assert parse_ring("peers://a,b,c/x") == RingAddress(
        (PeerAddress("a", 7070), PeerAddress("b", 7070), PeerAddress("c", 7070)), "x", 2
    )
    for bad in ("peers://a,b/x", "peers://a,b,c", "peers://a,a,b/x", "peers://u:PLANTED@a,b,c/x", "peers://a,b,c/x?secret=PLANTED",
                "peers://a,b,c/../x", "peers://a,b,/x", "peers://a,b,c/x?copies=4", "peers://a,b,c/x#PLANTED"):  # fmt: skip
        with pytest.raises(StoreError) as raised:
            open_store(bad)
        assert "PLANTED" not in str(raised.value)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.suppress(AttributeError):
        monkeypatch.setattr(quorum, "DECIDE_SECONDS", 5.0)
