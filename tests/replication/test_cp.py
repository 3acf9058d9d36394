"""`holdfast cp` between any two stores: the same run, verified, and only what is missing the second time."""

from __future__ import annotations

import json
import pathlib

import pytest

import holdfast
from holdfast.catalog.lease import acquire
from holdfast.cli import main
from holdfast.core.errors import LeaseHeld, NoCheckpoint, StateError, StoreError
from holdfast.replication.copying import Copied
from holdfast.replication.transfer import transfer
from holdfast.stores import LocalStore, MemoryStore, Store
from replication.places import check_steps, contents, files, flip, make_run, manifests


def test_a_run_is_copied_and_then_only_what_is_missing(source: LocalStore, target: Store) -> None:
    seen: list[int] = []
    planned: list[int] = []
    done = transfer(source, target, progress=seen.append, planned=planned.append)
    assert (done.steps, done.problems) == ((1, 2, 3), ())
    assert done.copied.objects == len(contents(source))
    assert sum(seen) == sum(planned) == sum(f.size - f.header_size for f in files(source))
    assert contents(target) == contents(source)
    check_steps(target, [1, 2, 3])
    assert transfer(source, target).copied == Copied()
    holdfast.save(source, {"model": {"w": __import__("numpy").ones(4)}}, step=4, tag="late")
    again = transfer(source, target)
    assert again.steps == (1, 2, 3, 4)
    assert again.copied.objects == 4, "a data file, a segment of the log, a manifest, a tag"
    assert holdfast.Run(target).writer is None
    holdfast.save(target, {"x": 1}, step=5)


def test_one_checkpoint_is_copied_with_its_tag(source: LocalStore, target: Store) -> None:
    done = transfer(source, target, "at-2")
    assert done.steps == (2,)
    check_steps(target, [2])
    assert holdfast.Run(target).tags == {"at-2": 2}
    assert transfer(source, target, 3).steps == (3,)
    check_steps(target, [2, 3])
    with pytest.raises(NoCheckpoint):
        transfer(source, target, 9)


def test_a_copy_that_was_cut_off_goes_on(source: LocalStore, tmp_path: pathlib.Path) -> None:
    class Failing(LocalStore):
        left = 2

        def write_streams(self, streams: object) -> None:
            self.left -= 1
            if self.left < 0:
                raise StoreError(5, "the line is cut")
            super().write_streams(streams)  # type: ignore[arg-type]

    target = Failing(tmp_path / "target")
    with pytest.raises(StoreError, match="cut"):
        transfer(source, target)
    target.left = 1000
    rest: list[int] = []
    transfer(source, target, planned=rest.append)
    assert 0 < sum(rest) < sum(f.size - f.header_size for f in files(source))
    assert contents(target) == contents(source)


def test_what_is_bad_is_named_and_the_rest_copied(source: LocalStore, target: Store) -> None:
    bad = next(f for f in files(source) if "model" in f.key and "000000000002" in f.key)
    flip(source, bad.key, bad.size - 1)
    broken = manifests(source)[0]
    flip(source, broken, 33)
    done = transfer(source, target)
    assert done.steps == (3,)
    assert {p.key for p in done.problems} == {broken, manifests(source)[1]}
    assert any(bad.key in p.message for p in done.problems)
    check_steps(target, [3])


def test_it_refuses_what_is_not_its_place(source: LocalStore, target: Store) -> None:
    make_run(target, 1)
    before = contents(target)
    with pytest.raises(StateError, match="a place of their own"):
        transfer(source, target)
    assert contents(target) == before
    for spoil in (lambda: flip(target, "run.json", 9), lambda: target.delete(["run.json"])):
        spoil()  # its checkpoints still say whose place it is
        before = contents(target)
        with pytest.raises(StateError, match="a place of their own"):
            transfer(source, target)
        assert contents(target) == before
    empty = MemoryStore()
    transfer(source, empty, 1)
    lease = acquire(empty)
    with pytest.raises(LeaseHeld):
        transfer(source, empty)
    lease.release()
    with pytest.raises(NoCheckpoint, match="nothing to copy"):
        nothing = MemoryStore()
        nothing.create("run.json", source.read("run.json"))
        transfer(nothing, MemoryStore())


def test_checkpoints_may_go_at_the_source_meanwhile(source: LocalStore) -> None:
    class Removing(MemoryStore):
        def create(self, key: str, data: object) -> None:
            super().create(key, data)  # type: ignore[arg-type]
            if key == manifests(source)[-1]:
                name = f"{2:012d}"
                source.delete([k for k in source.names("checkpoints") if name in k])
                source.delete([k for k in source.names("data") if name in k])

    target = Removing()
    done = transfer(source, target)
    assert (done.steps, done.problems) == ((1, 3), ())


def test_the_command(source: LocalStore, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there"
    assert main(["cp", source.root, str(there), "--rate", "1GB"]) == 0
    assert "3 checkpoints at" in capsys.readouterr().out
    assert contents(LocalStore(there)) == contents(source)
    small = tmp_path / "small"
    assert main(["cp", f"{source.root}@at-1", str(small), "--compress", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == [1]
    assert all(k.endswith(".zst") for k in LocalStore(small).names("data"))
    check_steps(LocalStore(small), [1])
    flip(source, files(source)[-1].key, 5000)
    assert main(["cp", source.root, str(tmp_path / "third")]) == 4
    assert "not copied" in capsys.readouterr().out
    assert main(["cp", source.root + "-none", str(there)]) == 3
    assert main(["cp", f"{source.root}@77", str(there)]) == 3
