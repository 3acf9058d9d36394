"""trash, undo and collect; what prune and rm leave behind for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import holdfast
from holdfast.catalog.lease import acquire
from holdfast.stores import open_store


def steps(run: Path) -> list[int]:
    return holdfast.Run(run).steps


def test_rm_and_undo(cli, run: Path) -> None:
    gone = cli("rm", run, 100, 300, "--yes")
    assert "2 checkpoints" in gone.out
    assert "to be freed" in gone.out
    assert "`holdfast undo` brings back what was deleted, for 1d" in gone.out
    shown = cli("trash", run)
    assert shown.code == 0
    assert "2 checkpoints in the trash" in shown.out
    assert "asked for" in shown.out
    assert [t["step"] for t in cli("trash", run, "--json").json["trash"]] == [100, 300]
    assert cli("undo", run, 300).out == "brought back 1 checkpoint: 300\n"
    assert steps(run) == [200, 300, 400, 500]
    assert cli("undo", run, "--all", "--json").json == {"run": run.as_uri(), "restored": [100], "failed": {}}
    assert steps(run) == [100, 200, 300, 400, 500]
    assert cli("verify", run).code == 0
    assert cli("trash", run).out == "the trash is empty\n"


def test_prune_and_undo(cli, run: Path) -> None:
    assert "`holdfast undo`" in cli("prune", run, "--keep", "last(1)", "--yes", "--grace", "2h").out
    (one, *_) = cli("trash", run, "--json").json["trash"]
    assert one["until"] - one["deleted"] == pytest.approx(7200, abs=60)
    assert one["reasons"] == ["no rule keeps it"]
    assert cli("undo", run, 100).code == 0
    assert steps(run) == [100, 200, 500]


@pytest.mark.parametrize("verb", [("rm", 100), ("prune", "--keep", "last(4)")])
@pytest.mark.parametrize("how", [("--now",), ("--grace", "0s")])
def test_now_leaves_nothing(cli, run: Path, verb: tuple[object, ...], how: tuple[str, ...]) -> None:
    name, *rest = verb
    done = cli(name, run, *rest, *how, "--yes")
    assert done.code == 0
    assert "undo" not in done.out
    assert "to be" not in done.out
    assert steps(run) == [200, 300, 400, 500]
    assert cli("trash", run, "--json").json["trash"] == []
    assert cli("undo", run, 100).code == 3
    assert not list(run.glob("data/000000000100-*/model.safetensors")) or cli("verify", run).code == 0


def test_undo_wants_to_know_what(cli, run: Path) -> None:
    assert cli("undo", run).code == 2
    assert cli("undo", run, 100, "--all").code == 2
    assert cli("undo", run, "--all").code == 3
    assert cli("undo", run, 100).code == 3


def test_undo_says_what_it_could_not_and_does_the_rest(cli, run: Path) -> None:
    cli("rm", run, 100, 400, "--yes")
    (directory,) = run.glob("data/000000000400-*")
    shutil.rmtree(directory)
    done = cli("undo", run, "--all")
    assert done.code == 4
    assert "brought back 1 checkpoint: 100" in done.out
    assert "step 400 cannot be brought back whole" in done.err
    assert steps(run) == [100, 200, 300, 500]


def test_collect(cli, run: Path) -> None:
    cli("rm", run, 400, "--yes")
    dead = run / "data" / "000000000900-dead0000" / "model.safetensors"
    dead.parent.mkdir()
    dead.write_bytes(b"x" * 1000)
    first = cli("collect", run, "--json").json
    assert (first["trashed"], first["files"], first["freed_bytes"], first["left_in_trash"]) == (0, 1, 1000, 1)
    second = cli("collect", run, "--grace", "0s")
    assert "1 checkpoint left the trash for good, 0 remain in it" in second.out
    assert cli("undo", run, 400).code == 3
    assert cli("verify", run).code == 0
    assert cli("collect", run, "--grace", "never").code == 2


def test_a_held_run_is_not_collected_and_undo_works(cli, run: Path) -> None:
    cli("rm", run, 400, "--yes")
    lease = acquire(open_store(run), heartbeat=False)
    try:
        assert cli("collect", run).code == 5
        assert cli("undo", run, 400).code == 0
    finally:
        lease.release()
    assert 400 in steps(run)


def test_a_grace_without_end_is_shown(cli, tmp_path: Path) -> None:
    for step in (1, 2):
        holdfast.save(tmp_path, {"n": step}, step=step)
    assert cli("rm", tmp_path, 1, "--yes", "--grace", "900000000000s").code == 0
    shown = cli("trash", tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert "after the year 9999" in shown.out
    assert cli("undo", tmp_path, 1).code == 0
