"""A tensor put together from parts in several files, as saves of few rows and several processes leave it behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.verify import verify_manifest
from holdfast.checkpoint import Checkpoint
from holdfast.core.errors import DigestMismatch, InvalidFormat, MissingObject
from holdfast.format.datafile import StoredTensor
from holdfast.format.manifest import FileEntry
from holdfast.restoring import assembling, staging
from holdfast.restoring.reader import Reader
from holdfast.stores import MemoryStore
from restoring.parts import Slices, file_of, manifest_of, part_of


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> Slices:
    firsts = [draw(st.integers(0, n)) for n in shape]
    return tuple(slice(a, draw(st.integers(a, n))) for a, n in zip(firsts, shape, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_parts_make_the_whole_and_the_first_listed_has_the_last_word(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    store, count = MemoryStore(), int(np.prod(shape))
    whole = np.arange(count, dtype=np.int32).reshape(shape)
    layers = data.draw(st.lists(cuts(shape), max_size=6))
    oldest = (StoredTensor("w", "int32", shape, None, 0, 0), whole.copy())
    files = [file_of(store, [oldest, (StoredTensor("small", "int8", (3,), None, 0, 0), np.ones(3, np.int8))])]
    for number, cut in enumerate(layers, 1):
        whole[cut] = number * 1000 + whole[cut] % 1000
        files.insert(0, file_of(store, [part_of("w", whole, cut)]))
    manifest = manifest_of(files, "w", "small")
    assert list(verify_manifest(store, manifest)) == []
    opened = Checkpoint(store, manifest)
    assert np.array_equal(opened["m/w"].read(), whole)
    assert opened["m/small"].read().tolist() == [1, 1, 1]
    first, end = sorted((data.draw(st.integers(0, shape[0])), data.draw(st.integers(0, shape[0]))))
    assert np.array_equal(opened["m/w"][first:end], whole[first:end])
    assert np.array_equal(opened.values()["m"]["w"], whole)


def shards(store: MemoryStore, whole: np.ndarray, columns: int) -> list[FileEntry]:
    width = whole.shape[1] // columns
    slices = [(slice(0, whole.shape[0]), slice(i * width, (i + 1) * width)) for i in range(columns)]
    return [file_of(store, [part_of("w", whole, cut)]) for cut in slices]


@pytest.mark.parametrize("small", [False, True])
def test_columns_of_several_processes_make_a_tensor(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr(assembling, "AT_ONCE_BYTES", 100_000)
        monkeypatch.setattr(staging, "SLAB_BYTES", 50_000)
        monkeypatch.setattr(staging, "CHUNK_BYTES", 8192)
    store, whole = MemoryStore(), np.random.default_rng(0).random((300, 1200))
    files = shards(store, whole, 4)
    opened = Checkpoint(store, manifest_of(files, "w"))
    assert np.array_equal(opened["m/w"].read(), whole)
    assert np.array_equal(opened["m/w"][17:211], whole[17:211])
    assert len(opened.reader.places("m/w")) == 4 * 300


def test_what_no_file_holds_is_missed_by_name() -> None:
    store, whole = MemoryStore(), np.arange(40.0).reshape(10, 4)
    first, last = (
        part_of("w", whole, (slice(0, 4), slice(0, 4))),
        part_of("w", whole, (slice(5, 10), slice(0, 4))),
    )
    manifest = manifest_of([file_of(store, [first]), file_of(store, [last])], "w")
    with pytest.raises(MissingObject, match="m/w: no data file of the checkpoint holds 32 of its 320 bytes"):
        Reader(store, manifest)
    assert [p.key for p in verify_manifest(store, manifest)] == ["m/w"]


def test_parts_that_do_not_fit_together_are_refused() -> None:
    store, whole = MemoryStore(), np.arange(40.0).reshape(10, 4)
    part = file_of(store, [part_of("w", whole, (slice(0, 4), slice(0, 4)))])
    for other in (whole.astype(np.float32), whole[:9], np.arange(40.0)):
        base = file_of(store, [(StoredTensor("w", str(other.dtype), other.shape, None, 0, 0), other)])
        manifest = manifest_of([part, base], "w")
        with pytest.raises(
            InvalidFormat, match=r"holds a part of m/w that is .*; the files listed before it say float64"
        ):
            Reader(store, manifest)
        assert [p.key for p in verify_manifest(store, manifest)] == ["m/w"]
    for_good = file_of(store, [(StoredTensor("w", "float64", whole.shape, None, 0, 0), whole)])
    stale = file_of(store, [(StoredTensor("w", "float64", (3,), None, 0, 0), np.zeros(3))])
    assert np.array_equal(Checkpoint(store, manifest_of([part, for_good, stale], "w"))["m/w"].read(), whole)


def test_a_changed_byte_in_any_part_is_refused() -> None:
    store, whole = MemoryStore(), np.random.default_rng(0).random((300, 1200))
    files = shards(store, whole, 3)
    for entry in files:
        good = store.read(entry.key)
        bad = bytearray(good)
        bad[-7] ^= 1
        store.replace(entry.key, bytes(bad))
        with pytest.raises(DigestMismatch, match=entry.key):
            Checkpoint(store, manifest_of(files, "w"))["m/w"].read()
        store.replace(entry.key, good)


def test_a_claim_of_a_huge_whole_takes_no_memory() -> None:
    store = MemoryStore()
    t = StoredTensor("w", "uint8", (1, 2), None, 0, 0, ((7, 7), (2**31, 2**31)))
    with pytest.raises(MissingObject, match=str(2**62 - 2)):
        Reader(store, manifest_of([file_of(store, [(t, np.zeros(2, np.uint8))])], "w"))
