"""The doctor says what is so, names what is wrong, and what helps; and changes nothing."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil

import pytest

import holdfast
from holdfast.catalog.lease import acquire
from holdfast.cli import main
from holdfast.core.errors import NotARun
from holdfast.replication.doctor import Finding, diagnose
from holdfast.replication.scrub import scrub
from holdfast.stores import LocalStore
from holdfast.testing import MockClock
from replication.places import everything, files, flip, make_run, manifests


@pytest.fixture
def store(tmp_path: pathlib.Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    make_run(store)
    return store


def said(store: LocalStore, topic: str, clock: MockClock | None = None) -> Finding | None:
    before = everything(pathlib.Path(store.root))
    found = diagnose(store, clock)
    assert everything(pathlib.Path(store.root)) == before
    return next((f for f in found if f.topic == topic), None)


def level(store: LocalStore, topic: str) -> str:
    found = said(store, topic)
    return "" if found is None else found.level


def test_a_healthy_run_is_said_to_be_well(store: LocalStore) -> None:
    scrub(store)
    found = diagnose(store)
    assert {f.level for f in found} == {"good"}
    assert {"run", "writer", "newest", "scrub"} <= {f.topic for f in found}


def test_damage_is_named_with_what_mends_it(store: LocalStore) -> None:
    two = manifests(store)[1]
    bad = next(f for f in files(store) if "000000000003" in f.key)
    flip(store, two, 50)
    store.replace(bad.key, store.read(bad.key)[:-1])
    flip(store, "tags/at-1.json", 10)
    for topic in (two, "step 3", "tags/at-1.json"):
        found = said(store, topic)
        assert found is not None
        assert found.level == "wrong"
        assert found.remedy.startswith(f"holdfast repair {store.root} --from")
    assert level(store, "tag at-2") == "warning", "what it points to cannot be read"
    pointless = said(store, "tag at-2")
    assert pointless is not None
    assert "undo" not in pointless.remedy, "it is not in the trash"


def test_what_a_scrub_found_is_told(store: LocalStore) -> None:
    assert level(store, "scrub") == "note"
    bad = files(store)[0].key
    flip(store, bad, 5000)
    scrub(store)
    assert level(store, bad) == "wrong"
    holdfast.Run(store).remove([1, 2, 3], force=True)
    assert level(store, bad) == "", "no repair mends what is in the trash"


def test_left_overs_and_the_trash_are_told(store: LocalStore) -> None:
    store.write("data/000000000009-dead0000/model.safetensors", [b"x" * 1000])
    holdfast.Run(store).remove([1], force=True)
    store.write("data/000000000009-dead0000/model.safetensors", [b"x" * 1000])
    found = said(store, "left-overs")
    assert found is not None
    assert "1.0 kB" in found.text
    assert level(store, "trash") == "note"


def test_who_writes_it_is_told(store: LocalStore) -> None:
    lease = acquire(store)
    found = said(store, "writer")
    assert found is not None
    assert str(os.getpid()) in found.text
    lease.forget()
    assert level(store, "writer") == "note"


def test_a_wrong_clock_and_a_full_disk_are_told(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    found = said(store, "clock", MockClock(1_700_000_000.0))
    assert found is not None
    assert found.level == "warning"
    monkeypatch.setattr(store, "room", lambda: 10)
    assert level(store, "room") == "wrong"


def test_a_disk_that_is_mounted_read_only_is_no_matter_of_rights(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    scrub(store)
    real, may = os.statvfs, os.access

    def mounted_read_only(path: str) -> os.statvfs_result:
        told = list(real(path))
        told[8] |= os.ST_RDONLY  # f_flag
        return os.statvfs_result(told)

    monkeypatch.setattr(os, "statvfs", mounted_read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and may(path, mode))
    (found,) = [f for f in diagnose(store) if f.level != "good"]
    assert "mounted read-only" in found.text
    assert "chmod" not in found.remedy


def test_no_run_and_a_run_without_identity(store: LocalStore, tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotARun):
        diagnose(LocalStore(tmp_path / "none"))
    flip(store, "run.json", 9)
    assert level(store, "run.json") == "wrong"


def test_what_helps_can_be_pasted_whatever_the_place_is_called(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path / "größe 1")
    make_run(store)
    copy = shutil.copytree(store.root, tmp_path / "copy")
    flip(store, "tags/at-1.json", 10)
    found = said(store, "tags/at-1.json")
    assert found is not None
    command = shlex.split(found.remedy.replace("COPY", shlex.quote(str(copy))))
    assert main(command[1:]) == 0
    bad = files(store)[0].key
    flip(store, bad, 5000)
    capsys.readouterr()
    assert main(["scrub", store.root]) == 4
    helps = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("holdfast repair"))
    assert shlex.split(helps)[2] == store.root
    assert main(["status", store.root]) == 0
    assert capsys.readouterr().out.startswith(f"{store.root}  3 checkpoints")


def test_the_command(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", store.root]) == 0
    assert "the newest checkpoint is step 3" in capsys.readouterr().out
    flip(store, manifests(store)[0], 50)
    assert main(["doctor", store.root, "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert [f["topic"] for f in told["findings"] if f["level"] == "wrong"] == [manifests(store)[0]]
    assert main(["doctor", store.root + "-none"]) == 3
