"""A run of three checkpoints, and a place for copies of it."""

from __future__ import annotations

import pathlib

import pytest

from holdfast.stores import LocalStore, MemoryStore, Store
from replication.places import make_run


@pytest.fixture
def source(tmp_path: pathlib.Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    make_run(store)
    return store


@pytest.fixture(params=["local", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    return LocalStore(tmp_path / "target") if request.param == "local" else MemoryStore()
