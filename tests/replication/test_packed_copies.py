"""Copies that are packed on their way: the same run, smaller; and from packed to plain and back without a changed bit."""

from __future__ import annotations

import pathlib

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.catalog.checkpoints import Entry
from holdfast.catalog.content import open_file
from holdfast.catalog.keys import packed_key
from holdfast.catalog.summary import Summary
from holdfast.core.errors import DigestMismatch
from holdfast.core.records import CheckpointRecord
from holdfast.format.packed import Pack
from holdfast.replication.copying import Copied, copy_beside, copy_checkpoint, copy_file, send_file
from holdfast.replication.desired import Held, Location
from holdfast.replication.looking import without_data
from holdfast.stores import LocalStore, MemoryStore, ObjectInfo, Store, open_store
from replication.places import check_steps, contents, copy_all, files, flip, manifests


def test_a_packed_copy_is_the_same_run(source: LocalStore, target: Store) -> None:
    copied = copy_all(source, target, Pack())
    found = contents(target)
    assert copied == Copied(len(found), sum(map(len, found.values()))), "what was really written"
    plain = contents(source)
    assert {key.removesuffix(".zst") for key in found} == plain.keys()
    assert all(found[key] == plain[key] for key in plain if not key.startswith("data/"))
    data = {key: raw for key, raw in found.items() if key.startswith("data/")}
    assert all(key.endswith(".zst") for key in data)
    assert sum(map(len, data.values())) < 0.95 * sum(
        len(r) for k, r in plain.items() if k.startswith("data/")
    )
    check_steps(target, [1, 2, 3])
    assert copy_all(source, target, Pack()) == Copied()
    assert copy_all(source, target, None) == Copied(), "a file that is there packed is there"


def test_there_and_back_again(source: LocalStore, target: Store, tmp_path: pathlib.Path) -> None:
    copy_all(source, target, Pack(level=9, threads=1))
    back = LocalStore(tmp_path / "back")
    copy_all(target, back, None)
    assert contents(back) == contents(source)
    again = MemoryStore()
    copy_all(target, again, Pack(level=9, threads=3))
    assert contents(again) == contents(target), "packing is a function of the bytes"


@pytest.mark.parametrize("stretch", [1, 4096, 100_000, 1 << 30])
def test_a_packed_file_of_many_stretches_arrives(
    source: LocalStore, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    """Read in stretches of any size, which here share no pages: nothing is lost or said twice between them."""
    packed, back = MemoryStore(), LocalStore(tmp_path / "back")
    monkeypatch.setattr("holdfast.replication.streaming.STRETCH_BYTES", stretch)
    for entry in files(source):
        copy_file(source, packed, entry, pack=Pack())
        copy_file(packed, back, entry)
        assert back.read(entry.key) == source.read(entry.key)


@pytest.mark.parametrize("pack", [None, Pack()], ids=["plain", "packed"])
@pytest.mark.parametrize("damaged", ["plain", "packed"])
def test_a_damaged_object_gives_way_whatever_its_form(
    source: LocalStore, target: Store, pack: Pack | None, damaged: str
) -> None:
    """A plain file hides a packed one: one that is no good must not stay in front of its copy."""
    entry = files(source)[0]
    key = entry.key if damaged == "plain" else packed_key(entry.key)
    target.write(key, [b"damaged"])
    assert copy_file(source, target, entry, pack=pack) > 0
    assert [o.key for o in target.list("data")] == [packed_key(entry.key) if pack else entry.key]
    file = open_file(target, entry)
    for index in range(len(file.header.blocks)):
        file.read_block(index)


def test_a_bad_source_leaves_no_packed_file(source: LocalStore, target: Store) -> None:
    entry = max(files(source), key=lambda f: f.size)
    flip(source, entry.key, entry.size - 1)
    with pytest.raises(DigestMismatch, match=str(entry.key)):
        copy_file(source, target, entry, pack=Pack())
    assert target.list("data") == []
    copy_file(source_again(source), target, entry, pack=Pack())
    before = contents(target)
    flip(source, entry.key, entry.size - 2)
    with pytest.raises(DigestMismatch):
        send_file(source, target, entry, pack=Pack())
    assert contents(target) == before, "a good object stays as it was"


def source_again(source: LocalStore) -> LocalStore:
    entry = max(files(source), key=lambda f: f.size)
    flip(source, entry.key, entry.size - 1)
    return source


def test_a_resume_on_a_packed_mirror_goes_on(source: LocalStore, target: Store) -> None:
    copy_all(source, target, Pack())
    state = dict(holdfast.load(target, as_="numpy"))
    holdfast.save(target, state, step=4)
    assert not any(holdfast.Run(target).verify().values())
    assert holdfast.Run(target).steps == [1, 2, 3, 4]


def test_through_a_real_server(source: LocalStore, s3_url: str, tmp_path: pathlib.Path) -> None:
    """Up in parts while it is packed, some rows of it back in ranges, all of it back bit for bit."""
    rng = np.random.default_rng(0)
    large = (rng.standard_normal((40_000, 256)) * 0.02).astype(
        "<f4"
    )  # 41 MB: several parts, and several digest blocks
    holdfast.save(source, {"large": {"w": large}}, step=4)
    target = open_store(s3_url)
    for key in manifests(source)[-1:]:
        copy_checkpoint(source, target, key, pack=Pack())
    copy_beside(source, target)
    [stored] = [o for o in target.list("data") if "large" in o.key]
    assert stored.key.endswith(".safetensors.zst")
    assert 30e6 < stored.size < 0.9 * large.nbytes
    opened = holdfast.open(target)
    assert np.array_equal(opened["large/w"][17_000:17_003], large[17_000:17_003])
    assert np.array_equal(holdfast.load(target, as_="numpy")["large"]["w"], large)
    assert not any(holdfast.Run(target).verify().values())


def test_a_damaged_plain_file_counts_as_missing_though_a_packed_one_lies_beside_it() -> None:
    """Readers take the plain one, so the packed one does not help."""
    entry = Entry("checkpoints/000000000001.json", 1, 0)
    file = "data/000000000001-a/x.safetensors"
    record = CheckpointRecord(1, "a", 0.0, stored_bytes=10)
    summary = Summary(1, "a", 1, 0.0, (1, 0, 0, 0, 0.0), msgspec.Raw(msgspec.json.encode({file: 10})), 10)
    location = Location.of([Held(entry, record, 1, summary)])
    packed, whole, cut = (
        ObjectInfo(f"{file}.zst", 7, 0.0),
        ObjectInfo(file, 10, 0.0),
        ObjectInfo(file, 9, 0.0),
    )
    for listed, missing in (
        ([packed], False),
        ([whole], False),
        ([packed, whole], False),
        ([packed, cut], True),
        ([], True),
    ):
        assert bool(without_data(location, listed).incomplete) is missing
