"""Our own stores keep what every store must promise."""

from __future__ import annotations

import pathlib

import pytest

from holdfast.stores import LocalStore, MemoryStore, Store, open_store
from holdfast.testing.stores import StoreTests


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
