"""Four real ranks under torchrun, one launch for all: every layout is saved and restored on every other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from distributed.launching import launch
from holdfast.analysis.diff import compare
from holdfast.catalog.content import open_file
from holdfast.stores import open_store

pytest.importorskip("torch.distributed.fsdp")

SUITE = Path(__file__).with_name("suite.py")
LAYOUTS = {
    "plain": 1, "ddp-2": 2, "ddp-3": 3, "fsdp-1": 1, "fsdp-2": 2, "fsdp-3": 3, "fsdp-4": 4, "hsdp-4": 4,
    "tp-2": 2, "2d-4": 4, "pp-2": 2, "pp-fsdp-4": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    scenarios = [
        "boxes",
        "layouts",
        "exact",
        "accumulation",
        "amplification",
        "rollback",
        "data",
        "tp_pair",
        "broadcast",
        "optimizers",
        "containers",
        "alike",
    ]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    launch(SUITE, 4, str(out), *scenarios, seconds=280, PYTHONPATH=path)
    return out


def told(out: Path, name: str, world: int = 4) -> list[dict[str, Any]]:
    return [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(world)]


def test_a_process_that_becomes_another_rank_holds_another_box() -> None:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    from holdfast.state.adapters.torch_distributed import held_boxes

    found = []
    for rank in (0, 1):  # as after a group that was made anew: the meshes are equal
        mesh = DeviceMesh("cpu", [0, 1], _init_backend=False, _rank=rank)
        half = DTensor.from_local(
            torch.ones(4), mesh, [Shard(0)], run_check=False, shape=torch.Size([8]), stride=(1,)
        )
        found.append(held_boxes(half)[0][0].offsets)
    assert found == [(0,), (4,)]


def test_a_box_is_what_the_placements_say(out: Path) -> None:
    assert [rank["wrong"] for rank in told(out, "boxes")] == [[], [], [], []]


@pytest.mark.parametrize("source", LAYOUTS)
def test_what_one_layout_saves_every_other_restores(out: Path, source: str) -> None:
    saved: dict[str, str] = {}
    for rank in told(out, f"saved-{source}", LAYOUTS[source]):
        for name, digest in rank.items():
            assert saved.setdefault(name, digest) == digest
    assert len(saved) == 8 + 8 * 3
    for layout, world in LAYOUTS.items():
        found: dict[str, str] = {}
        for rank in told(out, f"{source}-to-{layout}", world):
            assert rank["failed"] == "", f"{source} to {layout}: {rank['failed']}"
            found |= rank["found"]
        assert found == saved, f"{source} to {layout}"


@pytest.mark.parametrize("source", LAYOUTS)
def test_it_is_whole_without_torch(out: Path, source: str) -> None:
    checkpoint = holdfast.Run(str(out / source)).latest
    assert list(checkpoint.verify()) == []
    model = checkpoint.values(as_="numpy")["model"]
    assert {name: np.asarray(value).shape for name, value in model.items()} == {
        "layers.a.weight": (10, 6), "layers.a.bias": (10,), "layers.b.weight": (7, 10), "layers.b.bias": (7,),
        "layers.norm.weight": (7,), "layers.norm.bias": (7,), "layers.c.weight": (3, 7), "layers.c.bias": (3,),
        "seen": (2,),
    }  # fmt: skip


@pytest.mark.parametrize("source", LAYOUTS)
def test_what_two_layouts_saved_is_compared(out: Path, source: str) -> None:
    before, after = holdfast.Run(str(out / "plain")).latest, holdfast.Run(str(out / source)).latest
    found = {c.name: c for c in compare(before, after).tensors}
    for name in before.tensors:
        a, b = (np.asarray(checkpoint.tensors[name][...]) for checkpoint in (before, after))
        changed = found.pop(name, None)
        assert (changed is None) == np.array_equal(a, b), name
        if changed is not None:
            assert (changed.max_delta, changed.fraction) == (np.abs(b - a).max(), np.mean(a != b)), name
    assert not found


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-3", "hsdp-4", "2d-4", "pp-fsdp-4", "tp-2"])
def test_a_resume_at_the_same_layout_is_exact(out: Path, layout: str) -> None:
    for rank in told(out, f"exact-{layout}", LAYOUTS[layout]):
        assert len(rank["whole"][0]) == 6
        assert rank["cut"] == rank["whole"]  # losses, parameters and moments, and what is drawn next


@pytest.mark.parametrize(
    ("source", "layout"), [("fsdp-2", "fsdp-2"), ("ddp-2", "fsdp-2"), ("fsdp-2", "ddp-2")]
)
def test_gradients_that_are_not_consumed_yet_come_back_in_any_layout(
    out: Path, source: str, layout: str
) -> None:
    for rank in told(out, f"accumulation-{source}-{layout}", 2):
        assert len(rank["cut-gradients"]) == 8
        assert rank["cut-gradients"] == rank["whole-gradients"]
        if source == layout:  # another one sums in another order
            assert rank["cut"] == rank["whole"]


@pytest.mark.parametrize(
    ("source", "layout"),
    [("fsdp-4", "fsdp-4"), ("fsdp-4", "fsdp-2"), ("fsdp-2", "fsdp-4"), ("hsdp-4", "fsdp-4")],
)
def test_no_more_is_read_than_is_needed(out: Path, source: str, layout: str) -> None:
    ranks = told(out, f"read-{source}-{layout}")
    for rank in ranks[: LAYOUTS[layout]]:
        # Aligned up: to pages, and what a rank has for itself.
        assert rank["needed"] <= rank["read"] <= rank["needed"] + (64 << 10)
        assert rank["digest-2"] == ranks[0]["digest-1"]


@pytest.mark.parametrize("layout", ["fsdp-4", "hsdp-4", "ddp-3", "tp-2"])
def test_a_rollback_takes_what_is_in_memory(out: Path, layout: str) -> None:
    for rank in told(out, f"rollback-{layout}", LAYOUTS[layout]):
        assert rank["changed"] != rank["saved"]
        assert rank["found"] == [rank["saved"]] * 2
        memory, disk = rank["read"]
        # Values that only this rank has are read; with replicas, shares of other ranks too.
        assert memory < 512 if layout.startswith("fsdp") else memory < disk - 5000


def test_stages_that_call_their_layers_alike_are_refused_by_name(out: Path) -> None:
    for rank in told(out, "alike"):
        assert rank["replicas"] == ""
        assert "model/weight: rank 2 holds other values than rank 0" in rank["stages"]
        assert "names that differ" in rank["stages"]
    assert holdfast.Run(str(out / "alike-replicas")).steps == [0]
    assert holdfast.Run(str(out / "alike-stages")).steps == []


def test_stages_with_several_optimizers_each(out: Path) -> None:
    ranks = told(out, "optimizers")
    saved = ranks[0]["saved"] | ranks[1]["saved"]
    assert len(saved) == 8 + 3 * 1 + 5 * 3
    assert [r["again"] for r in ranks[:2]] == [r["saved"] for r in ranks[:2]]
    assert ranks[0]["plain"] == saved
    assert ranks[0]["wide"] == ranks[1]["wide"] == saved


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-2"])
def test_what_stands_in_containers_is_shared_as_at_the_top(out: Path, layout: str) -> None:
    url = str(out / f"containers-{layout}")
    store, stored = open_store(url), dict[str, int]()
    for part in holdfast.open(url).manifest.parts.values():
        for t in (t for entry in part.files for t in open_file(store, entry).header.tensors):
            stored[t.name] = stored.get(t.name, 0) + t.nbytes
    weight = 10 * 6 * 4
    assert stored["models/0/layers.a.weight"] == weight
    assert stored["optimizers/0/state/all/models/0/layers.a.weight/exp_avg"] == weight
    assert not [
        name for name in stored if "layers" in name and name.startswith("all/") and "/step" not in name
    ]
    assert not [name for name in stored if "/group0." in name]


def test_what_all_need_is_read_once_and_handed_on_when_asked(out: Path) -> None:
    ranks = told(out, "broadcast")
    assert len({rank["digest-7"] for rank in ranks} | {rank["digest-8"] for rank in ranks}) == 1
    needed = 2 * (512 * 512 + 512) * 4
    assert needed <= ranks[0]["read"] <= needed + (64 << 10)
    assert all(rank["read"] < (64 << 10) for rank in ranks[1:])


def test_samples_go_on_in_their_global_order(out: Path) -> None:
    ranks = told(out, "data")
    sampler = holdfast.ResumableSampler(list(range(97)), batch_size=12, seed=3, rank=0, world_size=1)
    batches = iter(sampler)
    expected = [sorted(next(batches)) for _ in range(8)]
    found = []
    for part, (world, steps) in enumerate(((2, 4), (3, 2), (4, 2))):
        for step in range(steps):
            found.append(sorted(i for rank in range(world) for i in ranks[rank][str(part)][step]))
    assert found == expected


def test_what_only_some_ranks_hold_comes_back_to_them(out: Path) -> None:
    assert all(rank["same"] for rank in told(out, "apart"))
    loaded = holdfast.load(str(out / "apart"), as_="numpy")
    assert np.asarray(loaded["some"]["x"]).shape == (9, 3)
