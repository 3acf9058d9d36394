"""What each wrapper is for, beyond being a store."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, InvalidFormat, NotFound, OutOfSpace, PolicyError, StoreError
from holdfast.stores import (
    Cached,
    Delegating,
    LocalStore,
    MemoryStore,
    ObjectInfo,
    Prefixed,
    Retrying,
    Store,
    Stream,
    Throttled,
    is_reopenable,
    open_store,
    place_below,
)
from holdfast.stores.wrappers import cache
from holdfast.testing import MockClock


class Failing(Delegating):
    """Counts calls; the next ones of a name fail, before they have an effect or after."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.failures: list[tuple[str, str, type[StoreError]]] = []

    def _act(self, name: str, act):
        self.calls[name] += 1
        if self.failures and self.failures[0][0] == name:
            _, when, kind = self.failures.pop(0)
            if when == "after":
                act()
            raise kind(f"{name}: made to fail")
        return act()

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self._act("write", lambda: self.inner.write(key, data))

    def create(self, key: str, data: Buffer) -> None:
        self._act("create", lambda: self.inner.create(key, data))

    def append(self, key: str, data: Buffer) -> None:
        self._act("append", lambda: self.inner.append(key, data))

    def replace(self, key: str, data: Buffer) -> None:
        self._act("replace", lambda: self.inner.replace(key, data))

    def write_streams(self, streams) -> None:
        self._act("write_streams", lambda: self.inner.write_streams(streams))

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._act("read", lambda: self.inner.read(key, start, end))

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self._act("read_into", lambda: self.inner.read_into(key, start, target))

    def info(self, key: str) -> ObjectInfo:
        return self._act("info", lambda: self.inner.info(key))

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._act("list", lambda: self.inner.list(prefix))

    def names(self, prefix: str, after: str = "") -> list[str]:
        return self._act("names", lambda: self.inner.names(prefix, after))

    def delete(self, keys: Sequence[str]) -> None:
        self._act("delete", lambda: self.inner.delete(keys))


# ---- retry -----------------------------------------------------------------------------------------------------------

SAFE = {
    "replace": lambda s: s.replace("k", b"new"),
    "read": lambda s: s.read("k"),
    "read_into": lambda s: s.read_into("k", 0, memoryview(bytearray(3))),
    "info": lambda s: s.info("k"),
    "list": lambda s: s.list(""),
    "names": lambda s: s.names(""),
    "delete": lambda s: s.delete(["k"]),
    "write": lambda s: s.write("free", [b"new"]),
}


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_safe_is_tried_again_with_growing_pauses(name: str, when: str) -> None:
    store, clock = Failing(MemoryStore()), MockClock()
    store.inner.create("k", b"old")
    store.failures = [(name, when, StoreError)] + [(name, "before", StoreError)] * 2
    began = clock.now()
    SAFE[name](Retrying(store, attempts=4, time=clock))
    assert store.calls[name] == 4
    assert 0.5 * (0.1 + 0.2 + 0.4) <= clock.now() - began <= 0.1 + 0.2 + 0.4


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("create", lambda s: s.create("k", b"mine")),
        ("append", lambda s: s.append("k", b"mine")),
        ("write_streams", lambda s: s.write_streams([Stream("k", 0, [b"mine"], bytes)])),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_may_have_been_carried_out_is_never_tried_again(name: str, act, when: str) -> None:
    store = Failing(MemoryStore())
    store.failures = [(name, when, StoreError)]
    with pytest.raises(StoreError, match="made to fail"):
        act(Retrying(store, time=MockClock()))
    assert store.calls[name] == 1
    assert store.inner.names("") == (["k"] if when == "after" else [])


@pytest.mark.parametrize("kind", [NotFound, AlreadyExists, OutOfSpace])
def test_what_will_not_pass_is_raised_at_once(kind: type[StoreError]) -> None:
    store = Failing(MemoryStore())
    store.failures = [("read", "before", kind)] * 3
    with pytest.raises(kind):
        Retrying(store, time=MockClock()).read("k")
    assert store.calls["read"] == 1


def test_at_last_the_failure_is_raised() -> None:
    store, clock = Failing(MemoryStore()), MockClock()
    store.failures = [("read", "before", StoreError)] * 10
    with pytest.raises(StoreError, match="made to fail"):
        Retrying(store, attempts=3, time=clock).read("k")
    assert store.calls["read"] == 3


def test_a_second_write_that_finds_other_bytes_is_refused() -> None:
    store = Failing(MemoryStore())
    store.inner.create("k", b"somebody else's")
    store.failures = [("write", "before", StoreError)]
    with pytest.raises(AlreadyExists):
        Retrying(store, time=MockClock()).write("k", [b"mine"])
    assert store.inner.read("k") == b"somebody else's"


# ---- throttle --------------------------------------------------------------------------------------------------------


def seconds(act, rate: float = 1000.0, store: Store | None = None) -> float:
    clock = MockClock()
    throttled = Throttled(store or MemoryStore(), rate, time=clock)
    began = clock.now()
    act(throttled)
    throttled.replace("last", b"")  # what was bought before is waited for by whoever comes next
    return clock.now() - began


@pytest.mark.parametrize(
    "act",
    [
        lambda s: s.write("k", [b"x" * 300_000, b"y" * 700_000]),
        lambda s: s.write_streams([Stream("k", 10, (b"x" * 99_999 for _ in range(10)), lambda: b"h" * 10)]),
        lambda s: [s.create(f"k{i}", b"x" * 100_000) for i in range(10)],
        lambda s: [s.replace("k", b"x" * 100_000) for i in range(10)],
        lambda s: [s.append("k", b"x" * 100_000) for i in range(10)],
        lambda s: s.read_into("million", 0, memoryview(bytearray(1_000_000))),
        lambda s: s.read("million"),
        lambda s: s.read("million", 0, 1_000_000),
    ],
)
def test_a_million_bytes_take_their_time(act) -> None:
    store = MemoryStore()
    store.create("million", bytes(1_000_000))
    assert seconds(act, 1e5, store) == pytest.approx(10.0, rel=1e-3)


def test_a_body_is_slowed_as_it_goes_and_not_all_at_once() -> None:
    clock, store, times = MockClock(), MemoryStore(), list[float]()

    class Watching(Delegating):
        appendable = False

        def write_streams(self, streams) -> None:
            for stream in streams:
                assert stream.head_bytes == 0
                for _ in stream.body:
                    times.append(clock.now())

    watching = Watching(store)
    watching.appendable = False
    began = clock.now()
    Throttled(watching, 1e6, time=clock).write_streams([Stream("k", 4, [bytes(2_000_000)], lambda: b"head")])
    assert len(times) >= 8
    assert max(b - a for a, b in zip([began, *times], times, strict=False)) <= 0.26


def test_an_object_store_is_sent_what_was_paid_for(s3_url: str) -> None:
    clock, data = MockClock(), bytes(range(256)) * (40 << 10)
    throttled = Throttled(open_store(s3_url), 1e6, time=clock)
    began = clock.now()
    throttled.write_streams([Stream("d/k", 256, [data[256:]], lambda: data[:256], over=True)])
    throttled.replace("k", b"")
    assert clock.now() - began == pytest.approx(len(data) / 1e6)
    target = bytearray(len(data))
    throttled.read_into("d/k", 0, memoryview(target))
    assert target == data


def test_listing_is_free() -> None:
    assert seconds(lambda s: [s.list(""), s.names(""), s.delete(["k"])] * 10) == 0


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_rate_that_moves_nothing_is_refused(rate: float) -> None:
    with pytest.raises(PolicyError, match="bytes_per_second"):
        Throttled(MemoryStore(), rate)


# ---- cache -----------------------------------------------------------------------------------------------------------

DATA = "data/000000000001-ab/m.safetensors"


@pytest.fixture
def remote() -> Failing:
    store = Failing(MemoryStore("remote"))
    store.inner.create(DATA, bytes(range(256)) * 100)
    store.inner.create("run.json", b"one")
    return store


def test_data_is_read_from_afar_once(remote: Failing, tmp_path: Path) -> None:
    for _ in range(3):
        cached = Cached(remote, tmp_path)  # as a new process would
        for _ in range(3):
            assert cached.read(DATA, 300, 303) == bytes([44, 45, 46])
            target = bytearray(4)
            cached.read_into(DATA, 255, memoryview(target))
            assert target == bytes([255, 0, 1, 2])
    assert remote.calls["read_into"] == 1
    assert remote.calls["read"] == 0
    assert remote.calls["info"] == 3  # each looks once whether the copy is as long as its object


def test_what_may_change_is_not_kept(remote: Failing, tmp_path: Path) -> None:
    cached = Cached(remote, tmp_path)
    assert cached.read("run.json") == b"one"
    remote.inner.replace("run.json", b"two")
    assert cached.read("run.json") == b"two"


def test_a_copy_that_is_not_whole_is_made_anew(remote: Failing, tmp_path: Path) -> None:
    Cached(remote, tmp_path).read(DATA, 0, 1)
    (copy,) = tmp_path.rglob("*.safetensors")
    copy.write_bytes(copy.read_bytes()[:-1])
    assert Cached(remote, tmp_path).read(DATA, 255, 257) == bytes([255, 0])
    assert remote.calls["read_into"] == 2


def test_a_copy_that_another_process_makes_just_now_is_not_read_half_made(
    remote: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PIECE_BYTES", 10_000)
    whole = bytes(range(256)) * 100
    seen: list[bytes] = []

    class Slow(Delegating):
        """Another process reads the same in the middle of each copy."""

        def read_into(self, key: str, start: int, target: memoryview) -> None:
            seen.append(Cached(remote, tmp_path).read(key, 0, len(whole)))
            super().read_into(key, start, target)
            seen.append(Cached(remote, tmp_path).read(key, 0, len(whole)))

    assert Cached(Slow(remote), tmp_path).read(DATA, 0, len(whole)) == whole
    assert seen == [whole] * 6
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1


def test_what_a_process_that_died_had_copied_is_swept(remote: Failing, tmp_path: Path) -> None:
    Cached(remote, tmp_path).read(DATA, 0, 1)
    (copy,) = tmp_path.rglob("*.safetensors")
    half = copy.with_name(".tmp-0123456789ab")
    half.write_bytes(b"half")
    Cached(remote, tmp_path)
    assert half.exists()  # it may be under way
    os.utime(half, (0, 0))
    Cached(remote, tmp_path)
    assert not half.exists()
    assert copy.exists()


def test_the_copies_keep_to_their_limit(remote: Failing, tmp_path: Path) -> None:
    keys = [f"data/{i}/m.safetensors" for i in range(5)]
    for key in keys:
        remote.inner.create(key, bytes(1000))
    cached = Cached(remote, tmp_path, limit_bytes=2500)
    for key in keys:
        assert cached.read(key, 0, 10) == bytes(10)
        assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) <= 2500
    assert cached.read(DATA, 1, 2) == b"\1"  # too large to be kept
    assert remote.calls["read"] == 1


def test_what_was_deleted_is_gone_here_too(remote: Failing, tmp_path: Path) -> None:
    cached = Cached(remote, tmp_path)
    cached.read(DATA, 0, 1)
    cached.delete([DATA])
    with pytest.raises(NotFound):
        cached.read(DATA, 0, 1)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_what_was_mended_afar_is_copied_anew(remote: Failing, tmp_path: Path) -> None:
    cached = Cached(remote, tmp_path)
    assert cached.read(DATA, 1, 2) == b"\1"
    mended = bytes(remote.inner.info(DATA).size)
    cached.write_streams([Stream(DATA, 0, [mended], bytes, over=True)])
    assert cached.read(DATA, 1, 2) == b"\0"


# ---- urls ------------------------------------------------------------------------------------------------------------


def test_a_prefixed_store_can_be_opened_by_its_url(s3_url: str, tmp_path: Path) -> None:
    for inner in (LocalStore(tmp_path), open_store(s3_url), open_store(f"{s3_url}?single_writer=1")):
        part = Prefixed(inner, "runs/a")
        part.replace("k", b"x")
        assert is_reopenable(part)
        assert open_store(part.url).read("k") == b"x"
    assert not is_reopenable(Prefixed(MemoryStore("m"), "a"))
    assert not is_reopenable(Throttled(LocalStore(tmp_path), 1.0))  # another process would not know the rate


@pytest.mark.parametrize(
    ("place", "below"),
    [
        ("runs", os.path.join("runs", "a", "b")), (Path("/runs"), os.path.join("/runs", "a", "b")),
        ("s3://bucket?profile=p", "s3://bucket/a/b?profile=p"), ("gs://bucket/x/", "gs://bucket/x/a/b"),
        ("peers://h1,h2:80,h3/run?copies=3", "peers://h1,h2:80,h3/run/a/b?copies=3"), ("memory://m", "memory://m/a/b"),
        ("file:///runs", "file:///runs/a/b"),
    ],
)  # fmt: skip
def test_a_place_below_another(place: str | Path, below: str) -> None:
    assert place_below(place, "a/b") == below
    inner = MemoryStore("m")
    part = place_below(inner, "a")
    assert isinstance(part, Prefixed)
    assert (part.inner, part.url) == (inner, "memory://m/a")
    for name in ("", "..", "a//b", "/a"):
        with pytest.raises(InvalidFormat):
            place_below(place, name)


def test_bodies_are_taken_in_the_calling_thread_and_piece_by_piece(s3_url: str) -> None:
    import threading

    held, most, threads = [0], [0], set()

    class Piece(bytearray):
        def __del__(self) -> None:
            held[0] -= 1

    def body() -> Iterator[memoryview]:
        for _ in range(160):
            threads.add(threading.get_ident())
            held[0] += 1
            most[0] = max(most[0], held[0])
            yield memoryview(Piece(1 << 20))

    open_store(s3_url).write_streams([Stream("d/k", 0, body(), bytes)])
    assert threads == {threading.get_ident()}
    assert most[0] < 120, "an upload holds what is under way, and not the whole body"
