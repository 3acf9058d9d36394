"""Reading a checkpoint: every tensor whole, only what is needed, and nothing that does not verify."""

from __future__ import annotations

import contextlib
import gc
import itertools
import pathlib
import random
from collections.abc import Callable

import numpy as np
import pytest

import holdfast
from holdfast import Run
from holdfast.catalog.content import DataFile, open_file
from holdfast.core.errors import DigestMismatch, IntegrityError, StateError
from holdfast.restoring import staging
from holdfast.restoring.reader import Reader
from holdfast.stores import LocalStore, MemoryStore, OsDisk

KIB, MIB = 1 << 10, 1 << 20


class Counted(MemoryStore):
    """Keeps which bytes of data files were read as tensors."""

    def __init__(self) -> None:
        super().__init__("counted")
        self.spans: list[tuple[str, int, int]] = []

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self.spans.append((key, start, start + len(target)))
        super().read_into(key, start, target)

    @property
    def bytes_read(self) -> int:
        return sum(end - start for _, start, end in self.spans)


def arrays(sizes: list[int]) -> dict[str, np.ndarray]:
    """Arrays of these sizes in bytes, of several element types, with content of their own."""
    rng, types = np.random.default_rng(len(sizes)), ("u1", "f4", "f2", "f8")
    found = {}
    for i, size in enumerate(sizes):
        dtype = np.dtype(types[i % 4])
        found[f"t{i:03d}"] = rng.integers(0, 256, size // dtype.itemsize * dtype.itemsize, np.uint8).view(
            dtype
        )
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].tobytes() == b[k].tobytes() and a[k].dtype == b[k].dtype for k in a
    )


SIZES = {
    "nothing": [],
    "empty": [0, 0, 0],
    "smaller than a page": [10, 0, 8, 16],
    "many small": [random.Random(i).randrange(3000) for i in range(700)],
    "around the size of own blocks": [64 * KIB - 8, 64 * KIB, 64 * KIB + 8, 0, 8, 65 * KIB],
    "mixed": [8, 70 * KIB, 0, 16, 300 * KIB + 8, 5, 5, 5, 200 * KIB, 1200 * KIB, 24],
}


@pytest.fixture(params=["as it is", "small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small pieces: blocks begin and end in the middle of what is read at once, and slabs are many."""
    if request.param == "small pieces":
        monkeypatch.setattr(staging, "CHUNK_BYTES", 8 * KIB)
        monkeypatch.setattr(staging, "SLAB_BYTES", 100 * KIB)
        monkeypatch.setattr(staging, "GAP_BYTES", 10)


class Without(OsDisk):
    def set_direct(self, fd: int, *, on: bool) -> bool:
        return False


class Past(OsDisk):
    """Nothing is in its page cache, so that all reads that can go past it do."""

    def is_cached(self, fd: int, offset: int, size: int) -> bool:
        return False


STORES: dict[str, Callable[[pathlib.Path], MemoryStore | LocalStore]] = {
    "memory": lambda root: MemoryStore("reading"),
    "past the cache": lambda root: LocalStore(root, Past()),
    "through the cache": lambda root: LocalStore(root, Without()),
}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("where", STORES)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_tensor_comes_back_whole(tmp_path: pathlib.Path, sizes: str, where: str) -> None:
    store, state = STORES[where](tmp_path), arrays(SIZES[sizes])
    holdfast.save(store, {"m": state, "n": {"x": np.arange(5)}})
    assert same(holdfast.load(store, as_="numpy")["m"], state)  # type: ignore[arg-type]
    live = {k: np.zeros_like(v) for k, v in state.items()}
    holdfast.load(store, into={"m": live}, unexpected=["n"])
    assert same(live, state)
    for name, a in list(state.items())[::50]:
        view = holdfast.open(store)[f"m/{name}"]
        assert view[len(a) // 3 : len(a) // 2].tobytes() == a[len(a) // 3 : len(a) // 2].tobytes()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("where", STORES)
def test_a_changed_byte_in_any_block_is_refused_and_nothing_live_changes(
    tmp_path: pathlib.Path, where: str
) -> None:
    store, state = (
        STORES[where](tmp_path),
        arrays([8, 70 * KIB, 16, 2 * MIB + 8, 300 * KIB + 8, 5, 5, 1200 * KIB, 24]),
    )
    manifest = holdfast.save(store, {"m": state}).manifest
    (entry,) = manifest.parts["m"].files
    file = open_file(store, entry)
    whole = store.read(entry.key)
    assert len(file.header.blocks) > 4
    for block in file.header.blocks:
        for position in {block.start, block.end - 1, (block.start + block.end) // 2}:
            changed = bytearray(whole)
            changed[file.header.data_start + position] ^= 4
            store.replace(entry.key, bytes(changed))
            live = {k: np.zeros_like(v) for k, v in state.items()}
            with pytest.raises(DigestMismatch, match=entry.key):
                holdfast.load(store, into={"m": live}, step=0)
            assert all(not a.any() for a in live.values())
            with pytest.raises(DigestMismatch, match=entry.key):
                holdfast.load(store)
            assert [p.key for p in Run(store).verify([0])[0]] == [entry.key]
    store.replace(entry.key, whole[:-1])
    with pytest.raises(IntegrityError, match=f"{len(whole) - 1} bytes"):
        holdfast.load(store, into={"m": live}, step=0)


def read(sizes: list[int], names: list[str]) -> tuple[Counted, DataFile, dict[str, np.ndarray]]:
    """Save float32 arrays of these sizes and read some; the store says what was read."""
    store = Counted()
    state = {f"t{i}": np.full(size // 4, i + 1, np.float32) for i, size in enumerate(sizes)}
    manifest = holdfast.save(store, {"m": state}).manifest
    reader = Reader(store, manifest)
    store.spans.clear()
    found = reader.read([f"m/{n}" for n in names])
    assert all(bytes(found[f"m/{n}"].data) == state[n].tobytes() for n in names)
    return store, reader.pieces("m/t0")[0].file, state


def test_only_the_blocks_of_what_is_wanted_are_read() -> None:
    store, _, _ = read([8 * MIB] * 5, ["t1", "t4"])
    assert store.bytes_read == 16 * MIB
    store, _, _ = read([100 * KIB] * 5 + [8 * MIB], ["t0"])
    assert store.bytes_read == 100 * KIB
    store, _, _ = read([8] * 100 + [8 * MIB], ["t3", "t90"])
    assert store.bytes_read == 4 * KIB  # the block they share, and nothing behind its page


def test_a_small_gap_is_read_over_and_a_large_one_is_not() -> None:
    store, _, _ = read([4 * MIB, MIB, 4 * MIB], ["t0", "t2"])
    assert store.spans == [(store.spans[0][0], 4 * KIB, 4 * KIB + 9 * MIB)]
    store, _, _ = read([4 * MIB, MIB + 64, 4 * MIB], ["t0", "t2"])
    assert store.bytes_read <= 8 * MIB + 8 * KIB
    assert len(store.spans) == 2


def test_what_nobody_wants_need_not_verify() -> None:
    store = Counted()
    manifest = holdfast.save(
        store, {"m": {n: np.full(MIB, i, np.uint8) for i, n in enumerate("abc")}}
    ).manifest
    (entry,) = manifest.parts["m"].files
    raw = bytearray(store.read(entry.key))
    raw[entry.header_size + MIB + 5] ^= 1  # in b, which is read over
    store.replace(entry.key, bytes(raw))
    live = {n: np.ones(MIB, np.uint8) for n in "abc"}
    holdfast.load(store, into={"m": live}, only=["m/a", "m/c"])
    assert live["a"].tolist() == [0] * MIB
    assert live["b"].all()
    assert set(live["c"].tolist()) == {2}


def test_empty_tensors_cost_no_read() -> None:
    store = Counted()
    state = {"a": np.ones(5), "none": np.ones((0, 3)), "b": np.ones(5)}
    reader = Reader(store, holdfast.save(store, {"m": state}).manifest)
    store.spans.clear()
    assert reader.read(["m/none"])["m/none"].spec.shape == (0, 3)
    assert not store.spans


def test_rows_are_read_without_the_blocks_beside_them() -> None:
    store = Counted()
    rows = np.arange(40 * MIB, dtype=np.float32).reshape(-1, MIB)  # each row a block of 4 MiB
    holdfast.save(store, {"m": {"w": rows}})
    view = holdfast.open(store)["m/w"]
    store.spans.clear()
    assert np.array_equal(view[17:19], rows[17:19])
    assert store.bytes_read == 8 * MIB
    assert view[3:3].shape == (0, MIB)


def test_pages_that_two_pieces_touch_are_read_once() -> None:
    # What is verified must be what is used: a second read of a page could bring other bytes.
    store, _, _ = read([20 * MIB + 4, 20 * MIB + 4, 40 * MIB + 4], ["t0", "t1", "t2"])
    keys = {key for key, _, _ in store.spans}
    spans = sorted((start, end) for _, start, end in store.spans)
    assert len(keys) == 1
    overlapping = [(a, b) for a, b in itertools.pairwise(spans) if b[0] < a[1]]
    # Only where memory of its own begins may a page be read again, into that memory.
    assert all(a[1] - b[0] == 4 * KIB for a, b in overlapping)
    assert len(overlapping) <= 2


def test_large_tensors_do_not_keep_each_other_in_memory() -> None:
    store = Counted()
    state = {n: np.zeros(40 * MIB, np.uint8) for n in "ab"} | {
        f"s{i}": np.zeros(MIB, np.uint8) for i in range(40)
    }
    reader = Reader(store, holdfast.save(store, {"m": state}).manifest)
    found = reader.read(reader.specs)
    memories = {id(h.memory): len(h.memory) for h in found.values()}
    assert found["m/a"].memory is not found["m/b"].memory
    assert max(memories[id(found[f"m/s{i}"].memory)] for i in range(40)) <= staging.SLAB_BYTES + 8 * KIB


@pytest.mark.parametrize("on", [True, False])
def test_the_cycle_collector_is_as_it_was(on: bool) -> None:
    store = MemoryStore("collector")
    holdfast.save(store, {"m": {"w": np.ones(3)}})
    try:
        (gc.enable if on else gc.disable)()
        for into in ({"m": {"w": np.ones(3)}}, {"m": {"w": np.ones(4)}}, None):
            with contextlib.suppress(StateError):
                holdfast.load(store, into=into) if into else holdfast.load(store)
            assert gc.isenabled() == on
    finally:
        gc.enable()
