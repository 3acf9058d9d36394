"""Verifying a checkpoint: every object it stands on is read, and each thing that is wrong is named once."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.catalog.checkpoints import entries, read_entry
from holdfast.catalog.content import open_file
from holdfast.catalog.verify import verify_manifest
from holdfast.core.errors import StoreError
from holdfast.format.manifest import Manifest
from holdfast.format.values import TensorLeaf, encode_value
from holdfast.stores import MemoryStore

LARGE = np.arange(9000, dtype=np.float64)  # a block of its own
STATE = {
    "big": {"a": LARGE, "b": LARGE + 1},
    "small": {f"t{i}": np.full(10, i) for i in range(5)},
    "none": {"x": 1},
}


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    holdfast.save(store, STATE, step=1)
    holdfast.save(store, {**STATE, "big": {"a": LARGE, "b": LARGE + 2}}, step=2)
    return store


def manifest_of(store: MemoryStore, step: int) -> Manifest:
    return next(read_entry(store, e) for e in entries(store) if e.step == step)


def problems(store: MemoryStore, step: int) -> dict[str, str]:
    found = list(verify_manifest(store, manifest_of(store, step)))
    assert len({p.key for p in found}) == len(found)
    return {p.key: p.message for p in found}


def flip(store: MemoryStore, key: str, position: int) -> None:
    raw = bytearray(store.read(key))
    raw[position] ^= 1
    store.replace(key, bytes(raw))


def test_a_whole_checkpoint_has_no_problems_and_every_byte_is_counted(store: MemoryStore) -> None:
    read: list[int] = []
    for step in (1, 2):
        assert list(verify_manifest(store, manifest_of(store, step), read.append)) == []
    small = sum(a.nbytes for a in STATE["small"].values())
    assert sum(read) == 2 * (2 * LARGE.nbytes + small) + LARGE.nbytes, (
        "step 2 refers to step 1's whole file for one tensor"
    )


def test_a_byte_of_a_shared_file_is_a_problem_of_every_checkpoint_that_needs_it(store: MemoryStore) -> None:
    (key,) = manifest_of(store, 1).file_keys & manifest_of(store, 2).file_keys
    flip(store, key, 4096 + 8)
    for step in (1, 2):
        assert problems(store, step) == {key: problems(store, step)[key]}
        assert "'a'" in problems(store, step)[key]
        assert "bytes 4096 to 76096" in problems(store, step)[key]


def test_small_tensors_that_share_a_block_are_named_together(store: MemoryStore) -> None:
    key = next(k for k in manifest_of(store, 1).file_keys if "small" in k)
    flip(store, key, 4096 + 100)
    assert "5 small tensors, 't0' to 't4'" in problems(store, 1)[key]


@pytest.mark.parametrize("position", [0, 7, 8, 100, 4095])
def test_a_byte_of_a_header_is_a_problem(store: MemoryStore, position: int) -> None:
    key = max(manifest_of(store, 2).file_keys)
    flip(store, key, position)
    assert "header does not match" in problems(store, 2)[key]


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "gone"])
def test_a_file_of_another_size_is_a_problem(store: MemoryStore, change: str) -> None:
    key = max(manifest_of(store, 2).file_keys)
    raw = store.read(key)
    store.delete([key])
    if change != "gone":
        store.write(key, [{"shorter": raw[:-1], "longer": raw + b"\0", "empty": b""}[change]])
    assert list(problems(store, 2)) == [key]
    assert ("is gone" if change == "gone" else "were committed") in problems(store, 2)[key]


def test_a_tensor_that_no_file_holds_is_a_problem(store: MemoryStore) -> None:
    whole = manifest_of(store, 1)
    part = whole.parts["small"]
    tree = {
        "t0": TensorLeaf("small/t0", "numpy.ndarray"),
        "ghost": TensorLeaf("small/ghost", "numpy.ndarray"),
    }
    haunted = msgspec.structs.replace(part, tree=msgspec.Raw(msgspec.json.encode(encode_value(tree))))
    changed = msgspec.structs.replace(whole, parts={**whole.parts, "small": haunted})
    assert [p.key for p in verify_manifest(store, changed)] == ["small/ghost"]


def test_a_disk_that_cannot_read_is_a_problem_and_the_rest_is_still_looked_at(store: MemoryStore) -> None:
    class BadSector(MemoryStore):
        def read_into(self, key: str, start: int, target: memoryview) -> None:
            if "big" in key:
                raise StoreError(5, f"could not read {key}: Input/output error")
            super().read_into(key, start, target)

    bad = BadSector()
    bad._objects = store._objects
    small = next(k for k in manifest_of(store, 1).file_keys if "small" in k)
    flip(store, small, 4096)
    found = problems_by_key(bad, 1)
    assert set(found) == manifest_of(store, 1).file_keys
    assert any("Input/output error" in message for messages in found.values() for message in messages)


def test_what_cannot_be_read_beside_the_checkpoints_is_a_problem_too(store: MemoryStore) -> None:
    class BadSector(MemoryStore):
        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key in bad:
                raise StoreError(5, f"could not read {key}: Input/output error")
            return super().read(key, start, end)

    holdfast.Run(store).tag("mine", 1)
    hurt, bad = BadSector(), set[str]()
    hurt._objects = store._objects
    run = holdfast.Run(hurt)
    bad |= {"tags/mine.json", store.names("log")[0]}
    assert {p.key for p in run.verify_beside()} == bad
    assert all("Input/output error" in p.message for p in run.verify_beside())
    assert run.verify() == {1: [], 2: []}


def problems_by_key(store: MemoryStore, step: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in verify_manifest(store, manifest_of(store, step)):
        found.setdefault(problem.key, []).append(problem.message)
    return found


def test_blocks_are_found_by_the_bytes_they_cover(store: MemoryStore) -> None:
    entry = next(f for f in manifest_of(store, 1).parts["big"].files)
    file = open_file(store, entry)
    size = LARGE.nbytes
    assert [file.blocks_of(*r) for r in ((0, 1), (0, size), (size - 1, size + 1), (size, size), (size, 2 * size))] == [
        range(1), range(1), range(2), range(0), range(1, 2),
    ]  # fmt: skip
    assert bytes(file.read_block(1)) == (LARGE + 1).tobytes()
