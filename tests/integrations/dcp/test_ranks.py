"""The script under torchrun, with DCP's own file storage and with ours: equal results, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from distributed.launching import launch, results

SCRIPT = Path(__file__).with_name("script.py")
TIMEOUT = 300


def torchrun(world: int, order: dict[str, object]) -> list[dict[str, Any]]:
    """Run all ranks and return what each has left."""
    launch(SCRIPT, world, json.dumps(order), seconds=TIMEOUT)
    return results(Path(str(order["out"])), str(order["name"]), world)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two ranks that saved with both storages, and failed on purpose with ours in between."""
    root = tmp_path_factory.mktemp("dcp")
    ranks = torchrun(2, order(root, "save"))
    assert ranks[0] == ranks[1]  # the failures too
    return root, ranks[0]


def order(root: Path, do: str, **more: object) -> dict[str, object]:
    places = {"files": str(root / "files"), "holdfast": str(root / "run")}
    return {"do": do, "places": places, "out": str(root), "name": do, **more}


@pytest.mark.slow
def test_both_storages_are_given_the_same(saved: tuple[Path, dict[str, Any]]) -> None:
    _, out = saved
    for step in ("1", "2", "3"):
        assert out["files"][step] == out["holdfast"][step]
    assert out["files"]["1"] != out["files"]["2"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_loads_on_another_number_of_ranks(saved: tuple[Path, dict[str, Any]], world: int) -> None:
    root, out = saved
    ranks = torchrun(world, order(root, "load", name=f"load{world}", steps=[2, 3]))
    for loaded in ranks:
        for step in ("2", "3"):
            assert loaded["holdfast"][step] == out["holdfast"][step]
            assert loaded["files"][step] == loaded["holdfast"][step]
            assert loaded["holdfast"]["before"] != loaded["holdfast"][step]


@pytest.mark.slow
def test_a_rank_that_cannot_write_fails_the_save_and_nothing_else(
    saved: tuple[Path, dict[str, Any]],
) -> None:
    root, out = saved
    ours = out["holdfast"]
    assert "OutOfSpace" in ours["full"]
    assert "RANK 1" in ours["full"]
    assert "loader/fn: the function len is code" in ours["refused"]
    before = [f"{step:012d}.json" for step in (1, 2, 3)]
    assert ours["steps after full"] == ours["steps after refused"] == before
    run = holdfast.Run(root / "run")
    assert run.steps == [2, 3, 5]  # keep=last(3)
    attempts = {Path(key).parent.name for step in run.steps for key in run[step].manifest.file_keys}
    assert {p.name for p in (root / "run" / "data").iterdir() if any(p.iterdir())} == attempts
    assert run.writer is None


@pytest.mark.slow
def test_it_is_an_ordinary_checkpoint(saved: tuple[Path, dict[str, Any]]) -> None:
    root, out = saved
    run = holdfast.Run(root / "run")
    assert all(not problems for problems in run.verify().values())
    checkpoint = run[2]
    assert checkpoint.tensors["app/model/first.weight"].shape == (7, 4)
    assert checkpoint.tensors["app/optim/state/first.weight/exp_avg"].shape == (7, 4)
    app = checkpoint.values(as_="torch")["app"]
    assert isinstance(app, dict)
    assert app["epoch"] == 2
    assert app["history"] == (1, 2.5, "a")
    names = [n.removeprefix("app.") for n in out["holdfast"]["2"]]
    assert {n.split(".")[0] for n in names} == set(app)
    assert torch.equal(app["model"]["frozen.bias"], run[3].values(as_="torch")["app"]["model"]["frozen.bias"])  # type: ignore[index]


@pytest.mark.slow
def test_what_did_not_change_is_not_written_again(saved: tuple[Path, dict[str, Any]]) -> None:
    root, _ = saved
    run = holdfast.Run(root / "run")
    frozen = 300 * 300 * 4
    for step in (2, 3, 5):
        manifest = run[step].manifest
        assert manifest.new_bytes < frozen < manifest.stored_bytes
        holders = {key for key, _, _ in run[step].reader.places("app/model/frozen.weight")}
        assert {key[5:17] for key in holders} == {"000000000001"}  # though that checkpoint is gone
        assert len(holders) == 2
