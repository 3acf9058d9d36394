"""Repair mends whatever is whole somewhere, names what is not, and never puts a bad object over a good one."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.catalog.lease import acquire
from holdfast.catalog.proofs import Proofs
from holdfast.core.errors import IntegrityError, NotARun, StateError, StoreError
from holdfast.format.packed import Pack
from holdfast.replication.copying import copy_beside, copy_checkpoint, read_manifest
from holdfast.replication.repair import repair
from holdfast.replication.scrub import scrub
from holdfast.stores import MemoryStore, Store
from replication.places import check_steps, contents, files, flip, make_run, manifests, state


def like(objects: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    for key, raw in objects.items():
        store.create(key, raw)
    return store


@functools.cache
def a_run() -> dict[str, bytes]:
    store = MemoryStore()
    make_run(store)
    holdfast.Run(store).observe(2, "score", 0.5)
    return contents(store)


@pytest.fixture
def whole() -> dict[str, bytes]:
    return dict(a_run())


@pytest.fixture
def good(whole: dict[str, bytes]) -> MemoryStore:
    return like(whole)


@pytest.fixture
def hurt(whole: dict[str, bytes]) -> MemoryStore:
    return like(whole)


def damages(whole: dict[str, bytes]) -> Iterator[tuple[str, list[str], Callable[[Store], None]]]:
    """Every file, in turn, damaged in every way: what, which objects are wrong then, and how to do it."""
    keys = sorted(whole)
    for key in keys:
        raw = whole[key]
        yield f"{key} deleted", [key], lambda s, key=key: s.delete([key])
        yield f"{key} truncated", [key], lambda s, key=key, raw=raw: s.replace(key, raw[: len(raw) * 2 // 3])
        yield f"{key} emptied", [key], lambda s, key=key: s.replace(key, b"")
        yield f"{key} extended", [key], lambda s, key=key, raw=raw: s.replace(key, raw + b"more\n")
        for at in (len(raw) // 100, len(raw) // 2, len(raw) * 99 // 100):
            yield f"{key} flipped", [key], lambda s, key=key, at=at: flip(s, key, at)
    for one, other in zip(keys, keys[1:] + keys[:1], strict=True):

        def swap(s: Store, one: str = one, other: str = other) -> None:
            a, b = s.read(one), s.read(other)
            s.replace(one, b)
            s.replace(other, a)

        yield f"{one} and {other} swapped", [one, other], swap


def is_silent(key: str, what: str) -> bool:
    """A document whose loss nobody can notice without a second copy: nothing refers to it."""
    return ("deleted" in what or "emptied" in what) and key.startswith(("tags/", "log/", "checkpoints/"))


def cuts_a_tail(key: str, what: str) -> bool:
    """A segment of the log may end anywhere: a crash does that, and then the rest was not durable."""
    return key.startswith("log/") and ("truncated" in what or "emptied" in what or "extended" in what)


def test_every_file_damaged_in_every_way_is_mended_from_a_good_copy(
    whole: dict[str, bytes], good: MemoryStore
) -> None:
    for what, keys, damage in damages(whole):
        hurt = like(whole)
        damage(hurt)
        before = contents(hurt)
        planned = repair(hurt, [good], dry_run=True)
        assert contents(hurt) == before, what
        report = repair(hurt, [good])
        if what.startswith("log/") and what.endswith(
            "extended"
        ):  # it may have been a line that the copy never had
            assert [p.key for p in report.lost] == keys
            assert contents(hurt) == before
            continue
        assert (report.lost, report.left) == ((), ()), what
        assert {m.key for m in report.mended} == {m.key for m in planned.mended}, what
        assert {m.key for m in report.mended} <= set(keys), what
        assert contents(hurt) == whole, what
        assert contents(good) == whole, what
        check_steps(hurt, [1, 2, 3])
        assert repair(hurt, [good]).mended == (), what


def test_every_file_damaged_everywhere_is_named_and_left_alone(whole: dict[str, bytes]) -> None:
    for what, keys, damage in damages(whole):
        hurt, other = like(whole), like(whole)
        damage(hurt)
        damage(other)
        before = contents(hurt)
        if "run.json" in keys:
            with pytest.raises(holdfast.HoldfastError, match=r"run\.json"):
                repair(hurt, [other])
            assert contents(hurt) == before
            continue
        report = repair(hurt, [other])
        named = {p.key for p in report.lost}
        if "swapped" in what and all(k.startswith("log/") for k in keys):
            assert contents(hurt) == whole, "each is the other's copy"
            continue
        assert contents(hurt) == before, what
        assert report.mended == (), what
        for key in keys:
            assert key in named or is_silent(key, what) or cuts_a_tail(key, what), what
            assert all(key in p.message for p in report.lost if p.key == key)
        assert named <= set(keys), what


def test_a_good_object_stays_whatever_its_copies_are(whole: dict[str, bytes], good: MemoryStore) -> None:
    for what, keys, damage in damages(whole):
        if "run.json" in keys:
            continue
        bad = like(whole)
        damage(bad)
        before = {o.key: o.modified for o in good.list("") if not o.key.startswith(("lease", "proofs"))}
        report = repair(good, [bad])
        assert (report.mended, report.lost) == ((), ()) or what.endswith("extended"), what
        after = {o.key: o.modified for o in good.list("") if not o.key.startswith(("lease", "proofs"))}
        assert after == before, what


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), copies=st.integers(1, 3), hits=st.integers(1, 12))
def test_no_bad_object_ever_goes_over_a_good_one(seed: int, copies: int, hits: int) -> None:
    """Damage at random, in all places at once: what was whole stays whole, and what is whole somewhere becomes so."""
    rng, whole = random.Random(seed), a_run()
    stores = [like(whole) for _ in range(copies + 1)]
    keys = sorted(k for k in whole if k != "run.json")
    for _ in range(hits):
        store, key = rng.choice(stores), rng.choice(keys)
        raw = contents(store).get(key, b"")
        act = rng.choice(["delete", "cut", "flip", "grow", "swap"])
        if act == "delete" or not raw:
            store.delete([key])
        elif act == "cut":
            store.replace(key, raw[: rng.randrange(len(raw))])
        elif act == "flip":
            flip(store, key, rng.randrange(len(raw)))
        elif act == "grow":
            store.replace(key, raw + rng.randbytes(rng.randrange(1, 9)))
        else:
            store.replace(key, whole[rng.choice(keys)])
    hurt, *sources = stores
    before, elsewhere = contents(hurt), [contents(s) for s in sources]
    report = repair(hurt, sources)
    after = contents(hurt)
    assert [contents(s) for s in sources] == elsewhere, "a repair changes one place"
    needed: set[str] = set()  # by a manifest that is sound; of others nobody can know what they need
    for key in manifests(hurt):
        with contextlib.suppress(IntegrityError):
            needed |= read_manifest(hurt, key)[1].file_keys
    for key in whole:
        if before.get(key) == whole[key]:
            assert after[key] == whole[key], f"{key} was whole"
        elif key.startswith("data/") and any(e.get(key) == whole[key] for e in elsewhere):
            assert key not in needed or after[key] == whole[key], f"{key} is whole elsewhere"
        elif key.startswith("data/") and after.get(key) != before.get(key):
            assert after[key] == whole[key], f"{key} was put together from what is whole of each"
    for problem in report.lost:
        assert after.get(problem.key) == before.get(problem.key) or problem.key.startswith("log/")


# ---- data files ---------------------------------------------------------------------------------------------------


def test_a_file_is_put_together_from_halves(whole: dict[str, bytes]) -> None:
    """Both copies are bad, each in another block."""
    hurt, other = like(whole), like(whole)
    entry = next(f for f in files(hurt) if "model" in f.key)
    flip(hurt, entry.key, entry.header_size + 10)
    flip(other, entry.key, entry.size - 10)
    report = repair(hurt, [other])
    assert [m.key for m in report.mended] == [entry.key]
    assert hurt.read(entry.key) == whole[entry.key] != other.read(entry.key)


def test_what_is_whole_here_is_not_fetched(whole: dict[str, bytes]) -> None:
    class Far(MemoryStore):
        fetched = 0

        def read_into(self, key: str, start: int, target: memoryview) -> None:
            self.fetched += len(target)
            super().read_into(key, start, target)

    far = Far()
    for key, raw in whole.items():
        far.create(key, raw)
    hurt = like(whole)
    entry = next(f for f in files(hurt) if "model" in f.key)
    flip(hurt, entry.key, entry.size - 1)
    assert len(repair(hurt, [far]).mended) == 1
    assert 0 < far.fetched < entry.size - entry.header_size


def test_the_second_source_helps_where_the_first_cannot(whole: dict[str, bytes], good: MemoryStore) -> None:
    bad, hurt = like(whole), like(whole)
    for entry in files(hurt):
        for store in (hurt, bad):
            flip(store, entry.key, entry.size - 1)
    for key in manifests(hurt):
        flip(hurt, key, 30)
        flip(bad, key, 31)
    assert repair(hurt, [bad, good]).whole
    assert contents(hurt) == whole


@pytest.mark.parametrize("packed", ["target", "source"])
def test_packed_files_are_mended_and_stay_packed(whole: dict[str, bytes], packed: str) -> None:
    plain, small = like(whole), MemoryStore()
    for key in manifests(plain):
        copy_checkpoint(plain, small, key, pack=Pack())
    copy_beside(plain, small)
    hurt, source = (small, plain) if packed == "target" else (plain, small)
    before = contents(hurt)
    for n, key in enumerate(sorted(hurt.names("data"))):
        if n % 2:
            flip(hurt, key, hurt.info(key).size - 1)
        else:
            flip(hurt, key, 20)
    report = repair(hurt, [source])
    assert report.whole
    assert len(report.mended) == len(files(hurt))
    assert contents(hurt) == before


def test_a_disk_that_gives_back_other_bytes_is_not_believed(
    whole: dict[str, bytes], good: MemoryStore
) -> None:
    class Rotten(MemoryStore):
        def write_streams(self, streams: object) -> None:
            super().write_streams(streams)  # type: ignore[arg-type]
            flip(self, bad, len(whole[bad]) - 1)

    hurt = Rotten()
    for key, raw in whole.items():
        hurt.create(key, raw)
    bad = files(hurt)[0].key
    flip(hurt, bad, len(whole[bad]) - 1)
    report = repair(hurt, [good])
    assert [p.key for p in report.lost] == [bad]
    assert "wrong again" in report.lost[0].message
    assert report.mended == ()


# ---- what is gone ---------------------------------------------------------------------------------------------------


def test_what_was_removed_on_purpose_does_not_come_back(good: MemoryStore, hurt: MemoryStore) -> None:
    run = holdfast.Run(hurt)
    run.remove([2], force=True)
    run.untag("at-1")
    before = contents(hurt)
    assert repair(hurt, [good]).mended == ()
    assert contents(hurt) == before
    assert holdfast.Run(hurt).steps == [1, 3]


def test_what_was_removed_again_after_an_undo_does_not_come_back(
    good: MemoryStore, hurt: MemoryStore
) -> None:
    run = holdfast.Run(hurt)
    run.remove([2], force=True)
    run.undelete(2)
    run.remove([2], force=True, grace=0)
    assert repair(hurt, [good]).mended == ()
    assert holdfast.Run(hurt).steps == [1, 3]


def test_what_was_lost_comes_back_or_not_as_is_asked(
    good: MemoryStore, hurt: MemoryStore, whole: dict[str, bytes]
) -> None:
    lost = [manifests(hurt)[1], *[f.key for f in files(hurt) if "000000000002" in f.key], "tags/at-2.json"]
    hurt.delete(lost)
    before = contents(hurt)
    assert repair(hurt, [good], bring_back=False).mended == ()
    assert contents(hurt) == before
    assert {m.key for m in repair(hurt, [good]).mended} == set(lost)
    assert contents(hurt) == whole


def test_a_checkpoint_whose_data_is_lost_does_not_come_back(good: MemoryStore, hurt: MemoryStore) -> None:
    entry = next(f for f in files(good) if "model" in f.key and "000000000002" in f.key)
    flip(good, entry.key, entry.size - 1)
    hurt.delete([manifests(hurt)[1], entry.key])
    report = repair(hurt, [good])
    assert {p.key for p in report.lost} == {manifests(good)[1], entry.key}
    assert holdfast.Run(hurt).steps == [1, 3]
    assert not any(holdfast.Run(hurt).verify().values())


def test_another_attempt_of_a_step_is_not_mixed_up(good: MemoryStore, hurt: MemoryStore) -> None:
    """Step 2 was removed and saved again; the copy is of before. The damaged manifest is not mended from it."""
    holdfast.Run(hurt).remove([2], force=True)
    holdfast.save(hurt, state(7), step=2)
    flip(hurt, manifests(hurt)[1], 500)
    before = contents(hurt)
    report = repair(hurt, [good])
    assert [p.key for p in report.lost] == [manifests(hurt)[1]]
    assert "on purpose" in report.lost[0].message
    assert contents(hurt) == before


def test_a_tag_that_moved_since_is_not_moved_back(good: MemoryStore, hurt: MemoryStore) -> None:
    holdfast.Run(hurt).tag("at-1", 3)
    assert repair(hurt, [good]).mended == ()
    assert holdfast.Run(hurt).tags["at-1"] == 3


# ---- who may ------------------------------------------------------------------------------------------------------


def test_while_the_run_is_written_only_data_is_mended(
    good: MemoryStore, hurt: MemoryStore, whole: dict[str, bytes]
) -> None:
    entry, manifest = files(hurt)[0], manifests(hurt)[2]
    flip(hurt, entry.key, entry.size - 1)
    flip(hurt, manifest, 40)
    flip(hurt, "tags/at-1.json", 10)
    lease = acquire(hurt)
    report = repair(hurt, [good])
    assert [m.key for m in report.mended] == [entry.key]
    assert {p.key for p in report.left} == {manifest, "tags/at-1.json"}
    assert "being written by" in report.left[0].message
    assert not report.whole
    assert repair(hurt, [good], lease=lease).whole, "who holds it may mend all"
    lease.release()
    assert contents(hurt) == whole


def test_the_lease_is_given_back(good: MemoryStore, hurt: MemoryStore) -> None:
    flip(hurt, manifests(hurt)[0], 40)
    repair(hurt, [good])
    assert holdfast.Run(hurt).writer is None
    holdfast.save(hurt, state(4), step=4)
    check_steps(hurt, [1, 2, 3, 4])


def test_other_runs_are_no_copies(good: MemoryStore, whole: dict[str, bytes]) -> None:
    other, empty = MemoryStore(), MemoryStore()
    holdfast.save(other, {"m": {"w": np.ones(3)}}, step=1)
    before = contents(good)
    with pytest.raises(StateError, match="its own copies"):
        repair(good, [other])
    with pytest.raises(NotARun):
        repair(good, [empty])
    with pytest.raises(NotARun):
        repair(empty, [good])
    other.delete(["run.json"])
    with pytest.raises(StateError, match="is of run"):
        repair(other, [good])
    assert contents(good) == before
    assert contents(empty) == {}


def test_a_full_disk_stops_it_and_nothing_is_worse(whole: dict[str, bytes], good: MemoryStore) -> None:
    class Full(MemoryStore):
        def write_streams(self, streams: object) -> None:
            raise StoreError(28, "no space left")

    hurt = Full()
    for key, raw in whole.items():
        hurt.create(key, raw)
    flip(hurt, files(hurt)[0].key, 5000)
    before = contents(hurt)
    with pytest.raises(StoreError, match="no space"):
        repair(hurt, [good])
    assert contents(hurt) == before
    assert holdfast.Run(hurt).writer is None


# ---- with scrub ---------------------------------------------------------------------------------------------------


def test_what_scrub_found_bad_is_known_to_be_whole_after_a_repair(
    good: MemoryStore, hurt: MemoryStore
) -> None:
    scrub(hurt)
    entry = next(f for f in files(hurt) if "model" in f.key and "000000000002" in f.key)
    flip(hurt, entry.key, entry.size - 1)
    assert scrub(hurt).damaged == (2,)
    assert repair(hurt, [good]).whole
    assert Proofs.of(hurt, holdfast.Run(hurt).id).bad == {}
    assert {r.step for r in holdfast.Run(hurt).records() if r.verified} == {1, 2, 3}
    assert scrub(hurt).problems == ()


def test_a_damaged_cache_is_removed(good: MemoryStore, hurt: MemoryStore) -> None:
    scrub(hurt)
    hurt.create("index.json", b"{}")
    flip(hurt, "proofs.json", 50)
    assert {m.key for m in repair(hurt, []).mended} == {"index.json", "proofs.json"}
    assert holdfast.Run(hurt).verify_beside() == []
