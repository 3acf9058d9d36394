"""Our own stores keep what every store must promise."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from holdfast.stores import Cached, LocalStore, MemoryStore, Prefixed, Retrying, Store, Throttled, open_store
from holdfast.testing import MockClock
from holdfast.testing.stores import StoreTests
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
