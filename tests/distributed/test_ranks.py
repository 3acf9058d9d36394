"""Real processes under torch.distributed's gloo: what several ranks save together they resume exactly, and any other
number of them can take it up."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

import holdfast
from distributed.launching import each, results, torchrun
from holdfast.catalog.content import open_file
from holdfast.stores import open_store

pytest.importorskip("torch.distributed.fsdp")


def order(kind: str, run: Path, name: str, **more: object) -> dict[str, object]:
    return {"kind": kind, "run": str(run), "steps": 9, "out": str(run.parent), "name": name, **more}


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    assert torchrun(2, order(request.param, out / "whole", "whole")) == 0
    return request.param, out


def test_all_ranks_are_killed_and_resume_exactly(undisturbed: tuple[str, Path]) -> None:
    kind, out = undisturbed
    assert torchrun(2, order(kind, out / "cut", "cut", kill_at=5, kill=[0, 1])) != 0
    assert holdfast.Run(str(out / "cut")).latest.step == 4
    assert torchrun(2, order(kind, out / "cut", "cut")) == 0
    for whole, cut in zip(results(out, "whole", 2), results(out, "cut", 2), strict=True):
        assert len(cut["losses"]) == 5
        assert cut["losses"] == whole["losses"][-5:]
        assert cut["digest"] == whole["digest"]  # parameters, buffers, moments, own values, generators
        assert cut["drawn"] == whole["drawn"]
        assert cut["notes"] == []


def test_it_is_read_without_torch_and_verifies(undisturbed: tuple[str, Path]) -> None:
    _, out = undisturbed
    params = results(out, "whole", 2)[0]["params"]
    loaded = holdfast.load(str(out / "whole"), as_="numpy")
    assert list(loaded) == ["model", "optimizer", "own"]
    model = loaded["model"]
    assert {n: np.asarray(model[n]).tobytes().hex() for n in params} == params
    assert loaded["own"]["rank"] == 0
    checkpoint = holdfast.Run(str(out / "whole")).latest
    assert checkpoint.parts == ["model", "optimizer", "own", "rng"]
    assert checkpoint.manifest.world_size == 2
    assert list(checkpoint.verify()) == []


def test_no_byte_of_what_is_shared_is_written_twice_and_each_rank_writes(
    undisturbed: tuple[str, Path],
) -> None:
    _, out = undisturbed
    manifest = holdfast.Run(str(out / "whole")).latest.manifest
    store = open_store(str(out / "whole"))
    covered: dict[str, int] = {}
    for entry in manifest.parts["model"].files:
        tensors = open_file(store, entry).header.tensors
        assert tensors
        for t in tensors:
            covered[t.name] = covered.get(t.name, 0) + t.nbytes
    assert len(manifest.parts["model"].files) == 2
    sizes = {"first.weight": 112, "first.bias": 28, "second.weight": 84, "second.bias": 12}
    assert {name: covered[name] for name in sizes} == sizes


@pytest.mark.parametrize(("dead", "alive"), [(1, 0), (0, 1)])
def test_a_rank_that_dies_before_a_save_fails_it_by_name(tmp_path: Path, dead: int, alive: int) -> None:
    ended = each(2, order("plain", tmp_path / "run", "x", kill_at=5, kill=[dead]))
    assert ended[dead][0] == -signal.SIGKILL
    assert ended[alive][0] > 0
    said = [line for line in ended[alive][1].splitlines() if "step 6:" in line]
    assert any(f"rank {dead}" in line for line in said), ended[alive][1]
    run = holdfast.Run(str(tmp_path / "run"))
    assert run.latest.step == 4
    assert list(run.latest.verify()) == []
