"""Signatures go where their checkpoints go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import Run
from holdfast.catalog.keyfiles import write_key_pair
from holdfast.core.errors import Untrusted
from holdfast.format.signing import SigningKey
from holdfast.replication.copying import copy_beside, copy_checkpoint
from holdfast.stores import MemoryStore

KEY = "checkpoints/000000000001.json"


@pytest.fixture
def keys(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{name}.pem" for name in ("a", "b", "c")]
    for path in made:
        write_key_pair(path, SigningKey.generate())
    return made


@pytest.fixture
def source(keys: list[Path]) -> MemoryStore:
    store = MemoryStore("source")
    holdfast.save(store, {"w": np.arange(5.0)}, step=1, sign=keys[0])
    return store


def trusted_by(store: MemoryStore, key: Path) -> bool:
    try:
        return bool(Run(store, trusted=key.with_suffix(".pub"))[1])
    except Untrusted:
        return False


def test_a_copy_is_as_trusted_as_its_source(source: MemoryStore, keys: list[Path]) -> None:
    target = MemoryStore("target")
    copy_beside(source, target)
    assert copy_checkpoint(source, target, KEY).objects == 3  # data, signatures, manifest
    assert trusted_by(target, keys[0])
    assert not trusted_by(target, keys[1])
    assert copy_checkpoint(source, target, KEY).objects == 0


def test_later_signatures_are_added_and_none_is_lost(source: MemoryStore, keys: list[Path]) -> None:
    target = MemoryStore("target")
    copy_beside(source, target)
    copy_checkpoint(source, target, KEY)
    Run(source).sign(1, keys[1])
    Run(target).sign(1, keys[2])
    assert copy_checkpoint(source, target, KEY).objects == 1
    assert [trusted_by(target, k) for k in keys] == [True, True, True]
    assert [trusted_by(source, k) for k in keys] == [True, True, False]


def test_damaged_signatures_are_not_copied_and_are_mended(
    source: MemoryStore, keys: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    target = MemoryStore("target")
    copy_beside(source, target)
    copy_checkpoint(source, target, KEY)
    (name,) = [o.key for o in source.list("signatures")]
    sound = source.read(name)
    source.replace(name, sound[:-5])
    copy_checkpoint(source, target, KEY)
    assert target.read(name) == sound
    assert "are not copied" in caplog.text
    copy_checkpoint(target, source, KEY)
    assert source.read(name) == sound
