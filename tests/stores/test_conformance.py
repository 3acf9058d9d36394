"""Our own stores keep what every store must promise."""

from __future__ import annotations

import contextlib
import pathlib
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest

from holdfast.stores import Cached, LocalStore, MemoryStore, Prefixed, Retrying, Store, Throttled, open_store
from holdfast.stores.peers.address import RingAddress
from holdfast.stores.peers.client import PeerStore
from holdfast.stores.peers.ring import RingStore
from holdfast.stores.peers.secret import Secret
from holdfast.stores.peers.service import PeerService
from holdfast.testing import MockClock
from holdfast.testing.stores import StoreTests
from patience import until
from servers.gcs import serving_gcs


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: pathlib.Path) -> Store:
        return LocalStore(tmp_path / "not yet" / "there")


class TestLocalStoreInADirectoryThatExists(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: pathlib.Path) -> Store:
        return open_store(tmp_path.as_uri())


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestS3(StoreTests):
    """moto's S3 server, a process of its own."""

    @pytest.fixture
    def store(self, s3_url: str) -> Store:
        return open_store(s3_url)


class TestS3WithoutAPrefix(StoreTests):
    @pytest.fixture
    def store(self, s3_url: str) -> Store:
        return open_store(s3_url.removesuffix("/runs/digits"))


class TestGoogleCloudStorage(StoreTests):
    """A fake that knows generations and their preconditions, and speaks what object_store speaks."""

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        with serving_gcs() as bucket:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.endpoint)
            yield open_store("gs://bucket/runs/digits")
            assert not bucket.uploads


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerService]:
    """A service in this process, reached over the loopback device."""
    with PeerService("127.0.0.1", 0, 256 << 20, secret=Secret("a secret of these tests")) as service:
        yield service


class TestPeerStore(StoreTests):
    @pytest.fixture
    def store(self, peer: PeerService) -> Iterator[Store]:
        store = PeerStore(peer.address, secret=Secret("a secret of these tests"))
        yield store
        store.delete(store.names(""))
        until(lambda: peer.shelf.used_bytes == 0, "its memory to be free")


class TestPeerStoreWithAPrefix(StoreTests):
    @pytest.fixture
    def store(self, peer: PeerService) -> Iterator[Store]:
        whole = PeerStore(peer.address, secret=Secret("a secret of these tests"))
        whole.create("runs/a-b/k", b"of a neighbour")
        whole.create("runs/z", b"of another")
        address = replace(peer.address, prefix="runs/a")
        yield PeerStore(address, secret=Secret("a secret of these tests"))
        assert [whole.read(key) for key in ("runs/a-b/k", "runs/z")] == [b"of a neighbour", b"of another"]
        whole.delete(whole.names(""))
        until(lambda: peer.shelf.used_bytes == 0, "its memory to be free")


@pytest.fixture(scope="module")
def ring() -> Iterator[list[PeerService]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                PeerService("127.0.0.1", 0, 256 << 20, secret=Secret("a secret of these tests"))
            )
            for _ in range(3)
        ]


def ring_of(services: list[PeerService]) -> RingStore:
    address = RingAddress(tuple(s.address for s in services), f"run-{uuid.uuid4().hex}")
    return RingStore(address, secret=Secret("a secret of these tests"))


class TestRingOfPeers(StoreTests):
    @pytest.fixture
    def store(self, ring: list[PeerService]) -> Store:
        return ring_of(ring)


class TestRingOfPeersOfWhichOneIsLost(StoreTests):
    @pytest.fixture
    def store(self, ring: list[PeerService]) -> Store:
        with PeerService("127.0.0.1", 0, 256 << 20, secret=Secret("a secret of these tests")) as lost:
            store = ring_of([ring[0], lost, ring[2]])
            assert store.names("") == []
        return store


class TestPrefixed(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        inner = MemoryStore("whole")
        inner.create("runs/a-b/k", b"of a neighbour")
        inner.create("runs/z", b"of another")
        return Prefixed(inner, "runs/a")


class TestPrefixedDirectory(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: pathlib.Path) -> Store:
        return Prefixed(LocalStore(tmp_path), "runs/a")


class TestRetrying(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return Retrying(MemoryStore(), time=MockClock())


class TestThrottled(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return Throttled(MemoryStore(), 1e6, time=MockClock())


class TestCached(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: pathlib.Path) -> Store:
        return Cached(MemoryStore(), tmp_path)
