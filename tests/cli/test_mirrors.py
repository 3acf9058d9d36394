"""`holdfast status` and `holdfast sync`: what is not yet where, and bringing it there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, every, last, where
from holdfast.catalog.keys import lease_key
from holdfast.catalog.lease import acquire
from holdfast.core.errors import PolicyError
from holdfast.core.processes import process_start
from holdfast.format.sealed import seal
from holdfast.replication import Mirror
from holdfast.stores.local import LocalStore


def learn(run: Path, total: int, **options: object) -> None:
    held = {"w": np.zeros(100)}
    with Checkpointer(run, held, save=every(steps=1), writer="inline", **options) as ckpt:  # type: ignore[arg-type]
        for step in ckpt.steps(total):
            held["w"][:] = step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    mirrors = [tmp_path / "near", Mirror(tmp_path / "packed", keep=last(2), compress=True)]
    learn(tmp_path / "run", 3, mirrors=mirrors)
    return tmp_path / "run"


def test_a_run_that_is_well(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shown = cli("status", run)
    assert shown.code == 0
    assert "3 checkpoints, nobody writes it now" in shown.out
    assert "newest: step 3" in shown.out
    assert [row.split()[:3] for row in shown.out.splitlines()[3:]] == [
        [str(tmp_path / name), "ok", "3"] for name in ("run", "near", "packed")
    ]
    found = cli("status", run, "--json").json
    assert found["well"] is True
    assert [p["state"] for p in found["places"]] == ["ok"] * 3


def test_what_is_not_yet_where_is_said_and_synced(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    learn(run, 5)  # without its mirrors
    shown = cli("status", run)
    assert shown.code == 8
    found = json.loads(cli("status", run, "--json").out)
    assert [(p["state"], p["newest"], p["missing"]) for p in found["places"]] == [
        ("ok", 5, []),
        ("behind", 3, [5, 4]),
        ("behind", 3, [5, 4]),
    ]
    assert all(p["missing_bytes"] > 0 for p in found["places"][1:])
    synced = cli("sync", run)
    assert synced.code == 0, synced.err
    assert "2 checkpoints copied" in synced.out
    assert cli("sync", run).out.count("  up to date; newest: step 5\n") == 2
    assert cli("status", run).code == 0
    assert holdfast.Run(tmp_path / "near").steps == [1, 2, 3, 4, 5]
    assert holdfast.Run(tmp_path / "packed").steps == [3, 4, 5]  # 3 is what training went on from
    assert all(p.suffix == ".zst" for p in (tmp_path / "packed" / "data").rglob("*") if p.is_file())


def test_a_place_that_is_gone_or_another_runs(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(tmp_path / "near")
    shutil.rmtree(tmp_path / "packed")
    holdfast.save(tmp_path / "near", {"x": 1})
    found = json.loads(cli("status", run, "--json").out)
    assert [p["state"] for p in found["places"]] == ["ok", "degraded", "behind"]
    assert "another run" in found["places"][1]["note"]
    told = json.loads(cli("doctor", run, "--json").out)["findings"]
    helps = {f["topic"]: f["remedy"] for f in told if f["topic"].startswith("mirror")}
    assert list(helps.values()) == [
        f"see to that place, then holdfast sync {run}",
        f"holdfast sync {run}",
    ]
    before = holdfast.Run(tmp_path / "near").id
    synced = cli("sync", run)
    assert synced.code == 8
    assert f"{tmp_path / 'near'}  not up to date: file://{tmp_path / 'near'} holds the run" in synced.out
    assert holdfast.Run(tmp_path / "near").id == before
    assert holdfast.Run(tmp_path / "packed").steps == [2, 3]
    repaired = cli("repair", run)
    assert repaired.code == 0
    assert "near is left out: it holds another run" in repaired.err


def test_a_run_by_another_path_is_no_mirror_of_itself(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "link").symlink_to(run)
    assert cli("sync", run, "--to", tmp_path / "link", "--keep", "last(1)").code == 2
    assert cli("cp", run, tmp_path / "link").code == 2
    with pytest.raises(PolicyError, match="named twice"):
        learn(run, 4, mirrors=[tmp_path / "link"])
    assert holdfast.Run(run).steps == [1, 2, 3]


def test_doctor_tells_what_only_a_mirror_has_and_repair_brings_it_back(
    cli, run: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(run / "checkpoints")
    told = json.loads(cli("doctor", run, "--json").out)["findings"]
    (lost,) = [f for f in told if f["topic"] == f"only in {(tmp_path / 'near').as_uri()}"]
    assert "3 checkpoints, the newest of step 3" in lost["text"]
    assert lost["remedy"].startswith(f"holdfast repair {run} ")
    assert cli(*lost["remedy"].split()[1:3]).code == 0
    assert holdfast.Run(run).steps == [1, 2, 3]
    assert "only in" not in cli("doctor", run).out


def test_a_mirror_whose_identity_is_damaged_did_answer(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "near" / "run.json").write_text("{}")
    places = json.loads(cli("status", run, "--json").out)["places"]
    assert [p["state"] for p in places] == ["ok", "degraded", "ok"]
    with Checkpointer(run, {"w": np.zeros(100)}, mirrors=[tmp_path / "near"], mirror_seconds=60) as ckpt:
        for _ in ckpt.steps(4):
            pass
    assert ckpt.mirrors[0].state == "degraded"
    assert str(tmp_path / "near" / "run.json") in str(ckpt.mirrors[0].error)


def test_a_place_that_cannot_be_written_is_named(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    learn(run, 4)
    shutil.rmtree(tmp_path / "near")
    (tmp_path / "near").write_text("no directory")
    synced = cli("sync", run)
    assert synced.code == 8
    assert f"{tmp_path / 'near'}  not up to date" in synced.out
    assert holdfast.Run(tmp_path / "packed").latest.step == 4
    assert json.loads(cli("status", run, "--json").out)["places"][1]["state"] == "behind"


def test_to_a_new_place_with_a_rule(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = cli("sync", run, "--to", tmp_path / "new", "--keep", "every(steps=2)", "--verify", "--json").json
    assert found["mirrors"][0]["copied"] == [3, 2]
    assert holdfast.Run(tmp_path / "new").steps == [2, 3]
    assert cli("sync", run, "--to", run).code == 2
    assert cli("sync", run, "--keep", "last(1)").code == 2


def test_a_mirror_that_somebody_else_copies_to_is_no_accident(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store, parent = LocalStore(tmp_path / "near"), os.getppid()
    lease = acquire(store, heartbeat=False)
    theirs = msgspec.structs.replace(lease.doc, pid=parent, started=process_start(parent))
    store.replace(lease_key(lease.generation), seal(msgspec.json.encode(theirs)))
    told = [cli("sync", run), cli("cp", run, tmp_path / "near")]
    assert [r.code for r in told] == [8, 5]
    for said in (told[0].out, told[1].err):
        text = " ".join(said.split())
        assert f"near is being written by process {parent} on" in text
        assert "nothing is wrong: copies are made one after the other" in text
        assert "Stop that process" not in text


def test_sync_names_what_is_broken_at_the_run_itself(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    manifest = run / "checkpoints" / f"{2:012}.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b'"step"', b'"stop"', 1))
    shutil.rmtree(tmp_path / "near")
    synced = cli("sync", run)
    assert synced.code == 4
    assert (
        f"not copied: the manifest of step 2 does not verify; mend it with holdfast repair {run}"
        in " ".join(synced.out.split())
    )
    assert "2 checkpoints copied" in synced.out
    told = cli("sync", run, "--json")
    assert (told.code, json.loads(told.out)["broken"]) == (4, [2])
    manifest.write_bytes(whole)
    again = cli("sync", run, "--json")
    assert (again.code, json.loads(again.out)["broken"]) == (0, [])


def test_one_of_a_thing_is_said_in_the_singular(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, near = tmp_path / "run", tmp_path / "near"
    learn(run, 1, mirrors=[near], keep=last(1))
    assert repr(holdfast.Run(run)).endswith(": 1 checkpoint>")
    shutil.rmtree(near)
    told = cli("doctor", run).out
    assert ", with 1 checkpoint\n" in told
    assert "is behind, 1 checkpoint to come" in told
    cli("sync", run)
    manifest = run / "checkpoints" / f"{1:012}.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b'"step"', b'"stop"', 1))
    assert "the manifest of step 1 does not verify" in cli("status", run).out
    manifest.unlink()
    assert "step 1 only here" in cli("status", run).out
    assert "1 checkpoint, the newest of step 1, only in the mirror" in cli("doctor", run).out
    learn(run, 2, mirrors=[near])
    cli("rm", run, 1, "--yes")
    told = cli("doctor", run).out
    assert "1 deleted checkpoint in the trash, 0 due to be freed" in told
    assert "1 remains in it" in cli("collect", run).out


def test_a_run_without_mirrors(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    holdfast.save(tmp_path / "alone", {"x": 1}, step=7)
    assert cli("status", tmp_path / "alone").code == 0
    refused = cli("sync", tmp_path / "alone")
    assert refused.code == 2
    assert "--to" in refused.err
    assert cli("status", tmp_path / "nothing").code == 3


def test_a_rule_that_is_a_function_is_not_guessed(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rule = where(lambda record: record.step % 2 == 0)
    learn(tmp_path / "run", 3, mirrors=[Mirror(tmp_path / "even", keep=rule)])
    shown = cli("status", tmp_path / "run", "--json").json
    assert "function" in shown["places"][1]["note"]
    assert shown["places"][1]["state"] == "ok"
    assert cli("sync", tmp_path / "run").code == 2


def test_mirrors_are_remembered_until_they_are_given_up(
    cli, run: Path, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    learn(run, 4)
    assert "fall behind" in caplog.text
    assert len(json.loads(cli("status", run, "--json").out)["places"]) == 3
    learn(run, 5, mirrors=[])
    assert len(json.loads(cli("status", run, "--json").out)["places"]) == 1


def test_a_bad_list_of_mirrors_is_said_and_nothing_else_suffers(cli, run: Path) -> None:  # type: ignore[no-untyped-def]
    raw = bytearray((run / "mirrors.json").read_bytes())
    raw[20] ^= 1
    (run / "mirrors.json").write_bytes(bytes(raw))
    shown = cli("status", run)
    assert shown.code == 8
    assert "mirrors.json" in shown.out
    told = json.loads(cli("doctor", run, "--json").out)["findings"]
    assert ["mirrors.json" in f["text"] for f in told if f["topic"] == "mirrors"] == [True]
    assert cli("sync", run).code == 4
    assert holdfast.Run(run).latest.step == 3
