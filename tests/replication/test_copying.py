"""Copies between stores: whole, verified on the way, resumable, and harmless where the source is bad."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

import holdfast
from holdfast.catalog.content import open_file
from holdfast.core.errors import (
    CommitConflict,
    DigestMismatch,
    IntegrityError,
    InvalidFormat,
    MissingObject,
    StateError,
    StoreError,
    Truncated,
)
from holdfast.format.events import Observed, encode_event
from holdfast.format.packed import Pack
from holdfast.replication.copying import Copied, copy_beside, copy_checkpoint, copy_file
from holdfast.replication.segments import merge_lines
from holdfast.stores import LocalStore, MemoryStore, Store, Stream
from replication.places import check_steps, contents, copy_all, everything, files, flip, make_run, manifests


def test_a_copied_run_is_the_same_run(source: LocalStore, target: Store) -> None:
    copied = copy_all(source, target)
    assert contents(target) == contents(source)
    assert copied == Copied(len(contents(source)), sum(map(len, contents(source).values())))
    check_steps(target, [1, 2, 3])
    assert holdfast.Run(target).tags == {"at-1": 1, "at-2": 2, "at-3": 3}
    assert copy_all(source, target) == Copied()


def test_progress_is_told_the_bytes_of_the_tensors(source: LocalStore, target: Store) -> None:
    (entry,) = [f for f in files(source) if "frozen" in f.key]
    seen: list[int] = []
    assert copy_file(source, target, entry, progress=seen.append) == entry.size
    assert sum(seen) == entry.size - entry.header_size
    assert copy_file(source, target, entry, progress=lambda done: pytest.fail("it is there")) == 0


def test_a_file_of_many_stretches_arrives(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of many sizes, cut into stretches so small that pages are shared between them."""
    sizes = [3, 70_000, 5, 65_536, 99_999, 1, 4096, 300_000, 4095, 200_001]
    state = {
        "m": {f"t{i}": np.random.default_rng(i).integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}
    }
    source, target = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    holdfast.save(source, state, step=1)
    (entry,) = files(source)
    for stretch in (1, 4096, 100_000, 1 << 30):
        monkeypatch.setattr("holdfast.replication.streaming.STRETCH_BYTES", stretch)
        target.delete([entry.key])
        copy_file(source, target, entry)
        assert target.read(entry.key) == source.read(entry.key)


class FromTheFront(MemoryStore):
    """Takes bytes from the front, as object stores do, and counts those that it would have to hold until the head."""

    appendable = False
    held = 0

    def write_streams(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            body = list(stream.body)
            self.held += sum(map(len, body)) if stream.head_bytes else 0
            assert stream.body_bytes is not None
            assert stream.body_bytes >= sum(map(len, body))
            super().write_streams([replace(stream, body=body)])


@pytest.mark.parametrize("pack", [None, Pack()], ids=["plain", "packed"])
def test_a_store_that_takes_bytes_from_the_front_need_not_hold_them(
    source: LocalStore, pack: Pack | None
) -> None:
    target = FromTheFront()
    for key in manifests(source):
        copy_checkpoint(source, target, key, pack=pack)
    assert target.held == 0
    copy_beside(source, target)
    check_steps(target, [1, 2, 3])


def test_what_was_verified_is_what_is_written(source: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stretches share a page. The bytes of the first in it count as they were verified, not as they are read again."""
    entry = next(f for f in files(source) if "model" in f.key)
    monkeypatch.setattr("holdfast.replication.streaming.STRETCH_BYTES", 1)
    blocks = open_file(source, entry).header.blocks
    spans = [(b.start + entry.header_size, b.end + entry.header_size) for b in blocks]

    class Rotting(LocalStore):
        rotten = 0

        def read_into(self, key: str, start: int, target: memoryview) -> None:
            super().read_into(key, start, target)
            end = start + len(target)
            ours = next(
                s
                for s, e in spans
                if s // 4096 * 4096 == start and min(-(-e // 4096) * 4096, entry.size) == end
            )
            for i in range(ours - start):
                target[i] ^= 0xFF
                self.rotten += 1

    rotting, target = Rotting(source.root), MemoryStore()
    copy_file(rotting, target, entry)
    assert rotting.rotten > 0
    assert target.read(entry.key) == source.read(entry.key)


@pytest.mark.parametrize("damage", ["flip-header", "flip-first", "flip-last", "short", "long", "gone"])
def test_a_bad_source_is_named_and_leaves_nothing(
    source: LocalStore, tmp_path: pathlib.Path, damage: str
) -> None:
    entry = max(files(source), key=lambda f: f.size)
    raw = source.read(entry.key)
    if damage.startswith("flip"):
        flip(
            source, entry.key, {"header": 100, "first": entry.header_size, "last": entry.size - 1}[damage[5:]]
        )
    elif damage == "gone":
        source.delete([entry.key])
    else:
        source.replace(entry.key, raw[:-1] if damage == "short" else raw + b"x")
    kind = {"short": Truncated, "long": Truncated, "gone": MissingObject}.get(damage, DigestMismatch)
    target = LocalStore(tmp_path / "target")
    with pytest.raises(kind, match=f"source.*{entry.key}"):
        copy_file(source, target, entry)
    assert everything(tmp_path / "target") == {}
    key = next(k for k in manifests(source) if entry.key in source.read(k).decode())
    with pytest.raises(kind, match=entry.key):
        copy_checkpoint(source, target, key)
    assert manifests(target) == []
    assert not any(".tmp-" in name for name in everything(tmp_path / "target"))


@pytest.mark.parametrize("bad", ["short", "header", "zeros"])
def test_a_bad_object_at_the_target_gives_way_to_a_good_one_only(
    source: LocalStore, tmp_path: pathlib.Path, bad: str
) -> None:
    target = LocalStore(tmp_path / "target")
    entry = files(source)[0]
    raw = source.read(entry.key)
    found = {"short": raw[:-10], "header": b"\1" + raw[1:], "zeros": bytes(4096) + raw[4096:]}[bad]
    target.write(entry.key, [found])
    flip(source, entry.key, entry.size - 1)
    with pytest.raises(DigestMismatch):
        copy_file(source, target, entry)
    assert target.read(entry.key) == found, "what is there may be better than nothing"
    source.replace(entry.key, raw)
    assert copy_file(source, target, entry) == entry.size
    assert target.read(entry.key) == raw


def test_a_good_object_is_not_touched(source: LocalStore, target: Store) -> None:
    copy_all(source, target)
    before = {o.key: o.modified for o in target.list("")}
    for entry in files(source):
        flip(source, entry.key, entry.size - 1)
    for key in manifests(source):
        assert copy_checkpoint(source, target, key) == Copied()
    assert {o.key: o.modified for o in target.list("")} == before


def test_a_damaged_manifest_is_not_copied_and_is_mended_by_a_good_one(
    source: LocalStore, target: Store
) -> None:
    copy_all(source, target)
    key = manifests(source)[1]
    good = source.read(key)
    flip(source, key, 50)
    with pytest.raises(IntegrityError, match=key):
        copy_checkpoint(source, target, key)
    assert target.read(key) == good
    assert copy_checkpoint(target, source, key) == Copied(1, len(good))
    assert source.read(key) == good


def test_swapped_manifests_are_refused(source: LocalStore, target: Store) -> None:
    one, two = manifests(source)[:2]
    source.replace(one, source.read(two))
    with pytest.raises(InvalidFormat, match=r"step 2; files were swapped"):
        copy_checkpoint(source, target, one)
    with pytest.raises(MissingObject, match="000000000009"):
        copy_checkpoint(source, target, "checkpoints/000000000009.json")
    assert contents(target) == {}


def test_another_checkpoint_at_the_place_stays(source: LocalStore, target: Store) -> None:
    holdfast.save(target, {"model": {"w": np.ones(3)}}, step=2)
    before = contents(target)
    with pytest.raises(CommitConflict, match="step 2"):
        copy_checkpoint(source, target, manifests(source)[1])
    assert contents(target) == before
    with pytest.raises(StateError, match="a place of their own"):
        copy_beside(source, target)
    assert contents(target) == before


def test_what_was_half_copied_is_finished(source: LocalStore, tmp_path: pathlib.Path) -> None:
    class Failing(LocalStore):
        left = 3

        def write_streams(self, streams: object) -> None:
            self.left -= 1
            if self.left < 0:
                raise StoreError(5, "the line is cut")
            super().write_streams(streams)  # type: ignore[arg-type]

    target = Failing(tmp_path / "target")
    last = manifests(source)[-1]
    with pytest.raises(StoreError, match="cut"):
        for key in manifests(source):
            copy_checkpoint(source, target, key)
    assert last not in manifests(target)
    target.left = 1000
    copied = copy_all(source, target)
    assert 0 < copied.objects < len(contents(source))
    assert contents(target) == contents(source)


# ---- the log ------------------------------------------------------------------------------------------------------


def line(n: int) -> bytes:
    return encode_event(Observed((n, 0, 0, 0, 0.0), {"loss": float(n)}))


LINES = [line(n) for n in range(100)]
SEGMENT = "log/g000000000001-000000.jsonl"


@pytest.fixture
def grown() -> Callable[[bytes, bytes, bool], tuple[bytes, int]]:
    def copy(ours: bytes, theirs: bytes, appendable: bool = True) -> tuple[bytes, int]:
        source, target = MemoryStore(), MemoryStore()
        target.appendable = appendable
        make_run(source, 1)
        copy_all(source, target)
        source.replace(SEGMENT, ours)
        if theirs:
            target.replace(SEGMENT, theirs)
        else:
            target.delete([SEGMENT])
        copied = copy_beside(source, target)
        assert copy_beside(source, target) == Copied()
        return target.read(SEGMENT), copied.bytes

    return copy


@pytest.mark.parametrize("appendable", [True, False])
@pytest.mark.parametrize("torn", [b"", LINES[99][:-1], LINES[99][:7]])
def test_a_segment_grows_behind_its_source(grown: Callable, appendable: bool, torn: bytes) -> None:
    whole = b"".join(LINES[:80])
    for had in (b"", *(b"".join(LINES[:n]) for n in (1, 40, 79, 80)), whole[:1000], whole[: len(whole) - 5]):
        after, written = grown(whole + torn, had, appendable)
        assert after == whole
        if appendable and had:
            assert written == len(whole) - len(had)


def test_a_torn_end_at_the_target_is_made_whole(grown: Callable) -> None:
    whole = b"".join(LINES[:9])
    bad_tail = b"".join(LINES[:5]) + b'{"event":"x'
    assert grown(whole, bad_tail)[0] == whole


def test_damaged_lines_are_not_copied_and_cost_nothing_else(
    grown: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = [*LINES[:10]]
    damaged[4] = damaged[4].replace(b'"loss"', b'"lass"')
    without = b"".join(LINES[:4] + LINES[5:10])
    assert grown(b"".join(damaged), b"")[0] == without
    assert "line 5" in caplog.text
    assert grown(b"".join(damaged), b"".join(LINES[:2]))[0] == without
    assert grown(b"".join(damaged), b"".join(LINES[:10]))[0] == b"".join(LINES[:10]), "the copy was better"
    assert grown(b"".join(damaged), b"".join(LINES[:6]))[0] == b"".join(LINES[:10]), (
        "each has what the other lost"
    )
    assert grown(b"".join(LINES[:10]), b"".join(damaged[:8]))[0] == b"".join(LINES[:10])
    assert grown(b"".join(LINES[:5]), b"".join(LINES[:10]))[0] == b"".join(LINES[:10]), (
        "the source was cut off"
    )


def test_two_damaged_copies_make_a_whole_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        kept = rng.random((2, 30)) < 0.7
        first = b"".join(x for x, k in zip(LINES, kept[0], strict=False) if k)
        second = b"".join(x for x, k in zip(LINES, kept[1], strict=False) if k)
        merged = merge_lines(first, second)
        assert sorted(merged.splitlines()) == sorted({*first.splitlines(), *second.splitlines()})
        for one in (first, second):
            at = iter(merged.splitlines())
            assert all(x in at for x in one.splitlines()), "the order of each is kept"


# ---- identity and tags --------------------------------------------------------------------------------------------


def test_a_damaged_identity_is_mended_and_never_spread(source: LocalStore, target: Store) -> None:
    copy_all(source, target)
    good = source.read("run.json")
    flip(target, "run.json", 20)
    assert copy_beside(source, target) == Copied(1, len(good))
    assert target.read("run.json") == good
    flip(source, "run.json", 20)
    with pytest.raises(IntegrityError, match=r"run\.json"):
        copy_beside(source, target)
    assert target.read("run.json") == good


def test_tags_move_with_their_source_and_a_damaged_one_does_not_spread(
    source: LocalStore, target: Store
) -> None:
    copy_all(source, target)
    holdfast.Run(source).tag("at-1", 3)
    holdfast.Run(source).tag("new", 2)
    assert copy_beside(source, target).objects == 2
    assert holdfast.Run(target).tags == {"at-1": 3, "at-2": 2, "at-3": 3, "new": 2}
    good = source.read("tags/new.json")
    flip(source, "tags/new.json", 12)
    assert copy_beside(source, target) == Copied()
    assert target.read("tags/new.json") == good
    holdfast.Run(target).tag("at-2", 1)
    assert copy_beside(source, target) == Copied(), "it was set later at the target"
