"""A scrub reads everything once, oldest-proven first, goes on where it was stopped, and says what is wrong by name."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time as wall

import numpy as np
import pytest

import holdfast
from holdfast.catalog.keys import PROOFS
from holdfast.catalog.proofs import Proofs
from holdfast.cli import main
from holdfast.core.errors import IntegrityError, OutOfSpace, PermissionDenied, StoreError
from holdfast.format.events import Damaged, Verified
from holdfast.replication.copying import copy_file
from holdfast.replication.scrub import ScrubLimits, scrub
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.stores.wrappers import Throttled
from holdfast.testing import MockClock
from replication.places import contents, files, flip, make_run, manifests, state


class Counting(LocalStore):
    """Notes which data files are read behind their headers, and may stop the reader there."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self.seen: list[str] = []
        self.stop_after = 1_000_000

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        if key not in self.seen:
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(key)
        super().read_into(key, start, target)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Counting:
    store = Counting(tmp_path / "run")
    make_run(store)
    return store


@pytest.fixture
def clock() -> MockClock:
    return MockClock(wall.time() + 10)


def events(store: Store, kind: type) -> list[object]:
    return [e for e in holdfast.Run(store).events() if isinstance(e, kind)]


def test_everything_is_read_once_and_every_checkpoint_proven(store: Counting, clock: MockClock) -> None:
    seen: list[int] = []
    planned: list[int] = []
    report = scrub(store, time=clock, progress=seen.append, planned=planned.append)
    needed = files(store)
    assert sorted(store.seen) == sorted(f.key for f in needed)
    assert (report.files, report.left, report.problems, report.damaged) == (len(needed), 0, (), ())
    assert report.bytes == sum(planned) == sum(f.size for f in needed)
    assert sum(seen) == sum(f.size - f.header_size for f in needed)
    assert report.verified == (1, 2, 3)
    assert {e.step for e in events(store, Verified)} == {1, 2, 3}
    assert all(r.verified for r in holdfast.Run(store).records())
    clock.advance(60)
    again = scrub(store, time=clock)
    assert again.files == len(needed), "it is asked for again, so it is done again"
    assert len(events(store, Verified)) == 3, "what the log says already is not said again"


def test_what_was_proven_longest_ago_is_read_first(store: Counting, clock: MockClock) -> None:
    scrub(store, time=clock)
    clock.advance(1000)
    order = store.seen[3:] + store.seen[:3]
    proofs = Proofs.of(store, holdfast.Run(store).id)
    for n, key in enumerate(order):
        proofs.note(store.info(key), clock.now() + n)
    proofs.save(store)
    clock.advance(1000)
    store.seen.clear()
    scrub(store, time=clock)
    assert store.seen == order
    store.seen.clear()
    scrub(store, ScrubLimits(older_than_seconds=clock.now() + 1000), time=clock)
    assert store.seen == []
    clock.advance(500)
    holdfast.save(store, {"new": {"x": 1.0}, "model": {"w": np.ones(9)}}, step=9)
    scrub(store, ScrubLimits(older_than_seconds=3600), time=clock)
    assert store.seen == [f.key for f in files(store) if "000000000009" in f.key]


def test_a_scrub_that_was_stopped_goes_on(store: Counting, clock: MockClock) -> None:
    whole = len(files(store))
    for n in range(whole):
        store.stop_after = n + 1
        store.seen = store.seen[:n]
        with pytest.raises(KeyboardInterrupt) if n + 1 < whole else contextlib.nullcontext():
            scrub(store, time=clock)
        clock.advance(5)
    assert len(store.seen) == whole, "each was read in full once"
    assert {e.step for e in events(store, Verified)} == {1, 2, 3}
    store.stop_after = 1000
    store.seen.clear()
    clock.advance(5)
    assert scrub(store, time=clock).files == whole, "that pass is over; this is another"


def test_a_scrub_that_was_killed_goes_on(store: Counting, tmp_path: pathlib.Path) -> None:
    """A real process, killed in the middle; what it had recorded is not read again."""
    script = f"""
import os, signal
import holdfast.replication.scrub as m
from holdfast.stores import LocalStore
m.SAVE_SECONDS = 0.0
class Dying(LocalStore):
    seen = set()
    def read_into(self, key, start, target):
        self.seen.add(key)
        if len(self.seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super().read_into(key, start, target)
m.scrub(Dying({store.root!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    report = scrub(store)
    assert report.files == len(files(store)) - 3
    assert report.verified == (1, 2, 3)


def test_it_stops_in_time_and_at_its_rate(store: Counting, clock: MockClock) -> None:
    needed = sum(f.size for f in files(store))
    slow = Throttled(store, needed / 100, time=clock)
    report = scrub(slow, ScrubLimits(max_seconds=30), time=clock)
    assert 0 < report.files < len(files(store))
    assert report.left == len(files(store)) - report.files
    assert report.problems == ()
    rest = scrub(slow, ScrubLimits(max_seconds=1000), time=clock)
    assert rest.files == report.left
    assert rest.seconds + report.seconds > 80


@pytest.mark.parametrize("damage", ["flip", "short", "gone"])
def test_what_is_bad_stays_bad_until_it_is_proven_intact(
    store: Counting, clock: MockClock, damage: str
) -> None:
    other = MemoryStore()
    entry = next(f for f in files(store) if "model" in f.key and "000000000002" in f.key)
    copy_file(store, other, entry)
    scrub(store, time=clock)
    clock.advance(10)
    if damage == "flip":
        flip(store, entry.key, entry.size - 1)
    elif damage == "short":
        store.replace(entry.key, store.read(entry.key)[:-1])
    else:
        store.delete([entry.key])
    for turn in range(2):
        report = scrub(store, time=clock)
        assert [p.key for p in report.problems] == [entry.key]
        assert report.damaged == (2,)
        assert report.verified == (1, 3)
        damaged = events(store, Damaged)
        assert len(damaged) == 1, "it is said once"
        assert (damaged[0].step, damaged[0].keys) == (2, [entry.key])  # type: ignore[attr-defined]
        assert [r.step for r in holdfast.Run(store).records() if r.verified] == [1, 3]
        clock.advance(10 + turn)
    if damage != "gone":
        assert Proofs.of(store, holdfast.Run(store).id).bad.keys() == {entry.key}
    store.delete([entry.key])
    copy_file(other, store, entry)
    clock.advance(10)
    report = scrub(store, ScrubLimits(older_than_seconds=1e9), time=clock)
    assert (report.files, report.problems) == (1, ()), (
        "only what was bad, and what took its place, is unproven"
    )
    assert Proofs.of(store, holdfast.Run(store).id).bad == {}
    assert [r.step for r in holdfast.Run(store).records() if r.verified] == [1, 2, 3]


def test_a_bad_file_that_is_not_reached_is_told_again(store: Counting, clock: MockClock) -> None:
    keys = sorted(f.key for f in files(store))
    for key in keys[1], keys[2]:
        flip(store, key, store.info(key).size - 1)
    assert len(scrub(store, time=clock).problems) == 2
    clock.advance(10)
    report = scrub(store, ScrubLimits(max_seconds=0), time=clock)
    assert report.files == 1
    assert {p.key for p in report.problems} == {keys[1], keys[2]}
    assert sum("when it was last read" in p.message for p in report.problems) == 1


def test_every_kind_of_object_is_told_by_name(store: Counting, clock: MockClock) -> None:
    scrub(store, time=clock)
    for key in contents(store):
        if key == "run.json":
            continue
        good = store.read(key)
        flip(store, key, len(good) // 2)
        clock.advance(10)
        report = scrub(store, time=clock)
        assert [p.key for p in report.problems] == [key]
        assert all(key in p.message for p in report.problems)
        store.replace(key, good)
    clock.advance(10)
    assert scrub(store, time=clock).problems == ()
    flip(store, "run.json", 9)
    with pytest.raises(IntegrityError, match=r"run\.json"):
        scrub(store, time=clock)


def test_damaged_proofs_prove_nothing_and_stop_nobody(store: Counting, clock: MockClock) -> None:
    scrub(store, time=clock)
    clock.advance(10)
    flip(store, "proofs.json", 100)
    assert [p.key for p in holdfast.Run(store).verify_beside()] == ["proofs.json"]
    report = scrub(store, ScrubLimits(older_than_seconds=1e6), time=clock)
    assert report.files == len(files(store)), "nothing is believed of it"
    assert [p.key for p in report.problems] == ["proofs.json"]
    assert holdfast.Run(store).verify_beside() == [], "and it was written anew"


def test_a_proof_is_of_an_object_and_not_of_a_name(store: Counting, clock: MockClock) -> None:
    scrub(store, time=clock)
    entry = files(store)[0]
    good = store.read(entry.key)
    store.replace(entry.key, good)
    clock.advance(10)
    report = scrub(store, ScrubLimits(older_than_seconds=1e6), time=clock)
    assert report.files == 1
    proofs = Proofs.of(store, holdfast.Run(store).id)
    proofs.note(store.info(entry.key), clock.now() + 1e6)
    proofs.save(store)
    assert scrub(store, ScrubLimits(older_than_seconds=1e6), time=clock).files == 1, "a clock that was wrong"


def test_proofs_of_another_run_are_none(store: Counting, tmp_path: pathlib.Path, clock: MockClock) -> None:
    other = LocalStore(tmp_path / "other")
    make_run(other, 1)
    scrub(store, time=clock)
    other.replace("proofs.json", store.read("proofs.json"))
    assert Proofs.of(other, holdfast.Run(other).id).objects == {}


def test_two_at_once_lose_nothing(store: Counting, clock: MockClock) -> None:
    run = holdfast.Run(store).id
    one, two = Proofs.of(store, run), Proofs.of(store, run)
    keys = [f.key for f in files(store)]
    one.note(store.info(keys[0]), 5.0)
    two.note(store.info(keys[1]), 6.0)
    one.save(store)
    two.save(store)
    assert Proofs.of(store, run).objects.keys() == {keys[0], keys[1]}


class Removing(Counting):
    """Removes a checkpoint, as a trainer's retention does, when one of its files is about to be read."""

    step = 0

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        if self.step and f"{self.step:012d}" in key:
            step, self.step = self.step, 0
            name = f"{step:012d}"
            place = LocalStore(self.root)
            place.delete([k for k in place.names("checkpoints") if name in k])  # names go before their bytes
            place.delete([k for k in place.names("data") if name in k])
        super().read_into(key, start, target)


def test_checkpoints_may_go_while_it_reads(tmp_path: pathlib.Path, clock: MockClock) -> None:
    store = Removing(tmp_path / "run")
    make_run(store)
    store.step = 2
    report = scrub(store, time=clock)
    assert report.problems == ()
    assert report.damaged == ()
    assert set(report.verified) <= {1, 3}
    assert holdfast.Run(store).steps == [1, 3]
    assert not events(store, Damaged)


def test_it_works_while_the_run_is_written(store: Counting, clock: MockClock) -> None:
    held = state(3)
    with holdfast.Checkpointer(LocalStore(store.root), held) as ckpt:
        for step in ckpt.steps(2):
            if step == 1:
                assert scrub(store).problems == ()
    assert holdfast.Run(store).verify_beside() == []


@pytest.mark.parametrize("names", [("replace", "append", "create", "write_streams"), ("append",)])
@pytest.mark.parametrize("refusal", [PermissionDenied(13, "read-only"), OutOfSpace(28, "full")])
def test_a_store_that_cannot_be_written_is_scrubbed_all_the_same(
    names: tuple[str, ...],
    refusal: StoreError,
    store: Counting,
    clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*arguments: object) -> None:
        raise refusal

    for name in names:
        monkeypatch.setattr(store, name, refuse)
    flip(LocalStore(store.root), files(store)[0].key, 5000)
    before = contents(store)
    report = scrub(store, time=clock)
    assert [p.key for p in report.problems] == [files(LocalStore(store.root))[0].key]
    assert not report.recorded
    assert "what was proven is not" in caplog.text
    assert {k: raw for k, raw in contents(store).items() if k != PROOFS} == before


def test_a_store_that_goes_away_proves_nothing(store: Counting, clock: MockClock) -> None:
    class Away(Counting):
        away = False

        def read_into(self, key: str, start: int, target: memoryview) -> None:
            self.away = self.away or len(self.seen) == 2
            if self.away:
                raise StoreError(110, "the line is dead")
            super().read_into(key, start, target)

        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if self.away:
                raise StoreError(110, "the line is dead")
            return super().read(key, start, end)

    with pytest.raises(StoreError, match="dead"):
        scrub(Away(store.root), time=clock)
    assert Proofs.of(store, holdfast.Run(store).id).bad == {}
    assert manifests(store)
    assert scrub(store, time=clock).problems == ()


def test_a_tensor_that_no_file_holds_is_told(store: Counting, clock: MockClock) -> None:
    import msgspec

    from holdfast.format.manifest import decode_manifest, encode_manifest

    key = manifests(store)[0]
    manifest = decode_manifest(store.read(key), key)
    parts = {
        n: msgspec.structs.replace(p, files=[]) if n == "frozen" else p for n, p in manifest.parts.items()
    }
    store.replace(key, encode_manifest(msgspec.structs.replace(manifest, parts=parts)))
    report = scrub(store, time=clock)
    assert [p.key for p in report.problems] == [key]
    assert "frozen/base" in report.problems[0].message
    assert report.verified == (2, 3)


def test_the_command_names_what_is_wrong(store: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scrub", store.root, "--rate", "1GB", "--max-duration", "1h"]) == 0
    assert "3 checkpoints proven" in capsys.readouterr().out
    bad = files(store)[0].key
    flip(store, bad, 5000)
    assert main(["scrub", store.root, "--older-than", "1h"]) == 4
    out = capsys.readouterr().out
    assert bad in out
    assert "holdfast repair" in out
    assert main(["scrub", store.root, "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert [p["key"] for p in found["problems"]] == [bad]
    assert found["left_files"] == 0
    assert main(["scrub", store.root, "--rate", "fast"]) == 2
    assert main(["scrub", store.root + "-none"]) == 3
