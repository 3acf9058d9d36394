"""The storage objects in one process: values, names, verified reads, what is refused."""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

import holdfast
from holdfast import last
from holdfast.core.errors import PolicyError, SaveFailed
from holdfast.integrations.dcp import HoldfastReader, HoldfastWriter
from holdfast.integrations.dcp.naming import step_of
from holdfast.stores import open_store
from holdfast.testing import Fault, FaultPlan, FaultStore


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": {
            "a.weight": torch.randn(200, 100),
            "a.bias": torch.randn(100).to(torch.bfloat16),
            "on": torch.tensor([True, False]),
            "n": torch.tensor(3),
            "none": torch.empty(0, 4),
            "z": torch.randn(3, 2, dtype=torch.complex64),
        },
        "optim": {"state": {"a": {"step": torch.tensor(2.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "list of tensors": [torch.randn(3), 7, [torch.randn(2), "x"]],
        "plain": [1, 2.5, None, "text", [True]],
        "set": {1, 2},
        "big": 10**30,
        "odd": {"nan": float("-inf"), "bytes": b"\0\1", "ordered": (collections.OrderedDict(a=1),)},
        "tuple": (torch.arange(4), {"in": torch.ones(2)}),
        "dtype": torch.float16,
        "top": torch.randn(5),
    }


def emptied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {k: emptied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [emptied(v) for v in value]
    return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_all_comes_back_as_it_was(tmp_path: Path) -> None:
    live = state()
    dcp.save(live, checkpoint_id="checkpoint/1000", storage_writer=HoldfastWriter(tmp_path / "run"))
    got = emptied(live)
    dcp.load(got, checkpoint_id="checkpoint/1000", storage_reader=HoldfastReader(tmp_path / "run"))
    assert same(live, got)
    checkpoint = holdfast.open(tmp_path / "run", 1000)
    assert checkpoint.environment.keys().isdisjoint({"torch.distributed.checkpoint"})  # the trees say it all
    assert checkpoint["model/a.weight"][3].tolist() == live["model"]["a.weight"][3].tolist()
    assert checkpoint["list of tensors/2/0"].shape == (2,)
    assert torch.equal(holdfast.load(tmp_path / "run")["state"]["top"], live["top"])  # type: ignore[index]


def test_no_pickle_is_stored(tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=HoldfastWriter(tmp_path / "run"))
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert files
    assert not any(b"ccollections\n" in p.read_bytes() or b"PK\x03\x04" in p.read_bytes() for p in files)


@pytest.mark.parametrize("planned", ["cached", "not flat", "changed by the planner"])
def test_other_planners(tmp_path: Path, planned: str) -> None:
    class Doubling(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            twice = object * 2 if isinstance(object, int) else object
            return super().transform_object(write_item, twice)

    live = {"model": {"w": torch.randn(200, 100)}, "n": 21, "some": (1, "a")}
    for step in (1, 2):
        live["model"]["w"] += 1  # type: ignore[index]
        planner = {
            "cached": DefaultSavePlanner(enable_plan_caching=True),
            "not flat": DefaultSavePlanner(flatten_state_dict=False),
            "changed by the planner": Doubling(),
        }[planned]
        dcp.save(
            live,
            planner=planner,
            checkpoint_id=f"step-{step}",
            storage_writer=HoldfastWriter(tmp_path / "run"),
        )
    got: dict[str, Any] = emptied(live)
    flat = planned != "not flat"
    loading = DefaultLoadPlanner(flatten_state_dict=flat, flatten_sharded_tensors=flat)
    dcp.load(got, planner=loading, storage_reader=HoldfastReader(tmp_path / "run"))
    assert same(got, {**live, "n": 42} if planned == "changed by the planner" else live)
    run = holdfast.Run(tmp_path / "run")
    assert run.steps == [1, 2]
    assert not any(run.verify().values())


def test_bytes_are_bytes(tmp_path: Path) -> None:
    dcp.save({"extra": io.BytesIO(b"opaque")}, storage_writer=HoldfastWriter(tmp_path / "run"))
    got: dict[str, Any] = {"extra": None}
    dcp.load(got, storage_reader=HoldfastReader(tmp_path / "run"))
    assert got["extra"].getvalue() == b"opaque"


class Config:
    pass


@dataclasses.dataclass
class Fields:
    lr: float = 0.1


class Colour(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Config(), "Config cannot be stored"), (print, "is code"), (CheckpointException, "is code"),
        (Fields(), "takes its class"), ([Colour.RED], "takes its class"), (Point(1, 2), "takes its class"),
    ],
)  # fmt: skip
def test_what_takes_code_is_refused_by_name(tmp_path: Path, value: object, said: str) -> None:
    writer = HoldfastWriter(tmp_path / "run")
    with pytest.raises(CheckpointException, match=f"cfg/inner: .*{said}"):
        dcp.save({"w": torch.ones(3), "cfg": {"inner": value}}, storage_writer=writer)
    assert not holdfast.Run(tmp_path / "run").steps
    dcp.save({"w": torch.ones(3)}, storage_writer=writer)  # and the next one works
    assert holdfast.Run(tmp_path / "run").steps == [0]


def test_a_flipped_bit_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    live = {"model": {"one": torch.randn(200, 100), "two": torch.randn(200, 100)}}
    dcp.save(live, storage_writer=HoldfastWriter(tmp_path / "run"))
    checkpoint = holdfast.open(tmp_path / "run")
    [(key, first, _)] = checkpoint.reader.places("model/two")
    file = tmp_path / "run" / key
    file.chmod(0o600)
    raw = bytearray(file.read_bytes())
    raw[first + 1000] ^= 4
    file.write_bytes(raw)
    got = emptied(live)
    with pytest.raises(CheckpointException, match="at least one byte changed in tensor 'two'"):
        dcp.load(got, storage_reader=HoldfastReader(tmp_path / "run"))
    assert not got["model"]["one"].any()  # nothing was touched
    half = {"model": {"one": torch.zeros(200, 100)}}
    dcp.load(half, storage_reader=HoldfastReader(tmp_path / "run"))  # what is not read does not matter
    assert same(half["model"]["one"], live["model"]["one"])


def test_another_element_type_is_an_error_unless_it_is_asked_for(tmp_path: Path) -> None:
    dcp.save({"m": {"w": torch.tensor([1.0, 2.0])}}, storage_writer=HoldfastWriter(tmp_path / "run"))
    got = {"m": {"w": torch.zeros(2, dtype=torch.bfloat16)}}
    with pytest.raises(CheckpointException, match=r"m/w: float32 is stored.*cast=\['m/w'\]"):
        dcp.load(got, storage_reader=HoldfastReader(tmp_path / "run"))
    dcp.load(got, storage_reader=HoldfastReader(tmp_path / "run", cast=["m/**"]))
    assert got["m"]["w"].tolist() == [1.0, 2.0]


def test_steps_tags_retention_and_mirrors(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for n in range(4):
        writer = HoldfastWriter(
            run, keep=last(2), mirrors=[str(tmp_path / "mirror")], metrics={"loss": 1.0 / (n + 1)}
        )
        dcp.save(
            {"w": torch.full((200, 200), float(n))}, checkpoint_id=f"ck/step-{n}0", storage_writer=writer
        )
    assert holdfast.Run(run).steps == [20, 30]
    assert holdfast.Run(tmp_path / "mirror").steps == [20, 30]
    assert not any(holdfast.Run(tmp_path / "mirror").verify().values())
    assert holdfast.open(run).metrics == {"loss": 0.25}
    dcp.save({"w": torch.zeros(3)}, storage_writer=HoldfastWriter(holdfast.Run(run), tag="small"))
    assert holdfast.Run(run).tags == {"small": 31}
    got = {"w": torch.ones(3)}
    dcp.load(got, checkpoint_id="ck/small", storage_reader=HoldfastReader(run))
    assert not got["w"].any()
    big = {"w": torch.ones(200, 200)}
    dcp.load(big, storage_reader=HoldfastReader(run, step=20))
    assert big["w"][0, 0] == 2.0


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-1000", 1000), ("checkpoint/1000", 1000), ("/a/2/iter_0000050/", 50), ("run/latest", None),
        ("epoch=3-step=1000.ckpt", 1000), ("epoch=3-x=1000.ckpt", None), ("s3://b/3/global_step7", 7),
    ],
)  # fmt: skip
def test_what_a_checkpoint_id_says(name: str, step: int | None) -> None:
    assert step_of(name) == step
    assert HoldfastWriter.validate_checkpoint_id(name) == (step is not None)


def test_an_id_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="does not say which step"):
        dcp.save({"w": torch.ones(1)}, checkpoint_id="final", storage_writer=HoldfastWriter(tmp_path / "run"))


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="both would be called 'a/b/c'"):
        dcp.save(
            {"a": {"b/c": torch.ones(1), "b": {"c": torch.ones(1)}}},
            storage_writer=HoldfastWriter(tmp_path / "run"),
        )
    assert not holdfast.Run(tmp_path / "run").steps


def test_what_a_checkpointer_saved_is_loaded_too(tmp_path: Path) -> None:
    model = torch.nn.Linear(40, 30)
    holdfast.save(tmp_path / "run", {"model": model, "epoch": 3}, step=4)
    got: dict[str, Any] = {"model": emptied(dict(model.state_dict()))}
    dcp.load(got, storage_reader=HoldfastReader(tmp_path / "run"))
    assert same(got["model"], dict(model.state_dict()))


def test_saves_that_overlap_wait_for_each_other(tmp_path: Path) -> None:
    slow = FaultStore(
        open_store(tmp_path / "run"), FaultPlan(Fault("delay", call="write_streams", seconds=0.5))
    )
    first = dcp.async_save({"w": torch.ones(3)}, no_dist=True, storage_writer=HoldfastWriter(slow, step=1))
    second = dcp.async_save({"w": torch.zeros(3)}, no_dist=True, storage_writer=HoldfastWriter(slow, step=2))
    first.result()
    second.result()
    run = holdfast.Run(tmp_path / "run")
    assert run.steps == [1, 2]
    assert run[1]["state/w"].read().tolist() == [1, 1, 1]


def test_a_save_that_is_overtaken_does_not_commit(tmp_path: Path) -> None:
    """As when a rank fails whose failure DCP tells the coordinator's storage nothing of."""
    lost, later = (HoldfastWriter(tmp_path / "run", step=n) for n in (1, 2))
    planner = DefaultSavePlanner()
    planner.set_up_planner({"w": torch.ones(3)}, is_coordinator=True)
    lost.set_up_storage_writer(True, rank=0, use_collectives=True)
    [plan], metadata = planner.create_global_plan([lost.prepare_local_plan(planner.create_local_plan())])
    [plan] = lost.prepare_global_plan([plan])
    results = [lost.write_data(plan, planner).wait()]
    dcp.save({"w": torch.zeros(3)}, storage_writer=later)
    with pytest.raises(SaveFailed, match="another save of this run was begun"):
        lost.finish(metadata, results)
    run = holdfast.Run(tmp_path / "run")
    assert run.steps == [2]
    assert {
        str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run" / "data").rglob("*.safetensors")
    } == {*run[2].manifest.file_keys}


def test_a_share_that_is_missing_is_no_checkpoint(tmp_path: Path) -> None:
    writer, planner = HoldfastWriter(tmp_path / "run"), DefaultSavePlanner()
    planner.set_up_planner({"w": torch.ones(3)}, is_coordinator=True)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    [plan] = writer.prepare_global_plan(plans)
    [result] = writer.write_data(plan, planner).wait()
    part = dataclasses.replace(result, storage_data=dataclasses.replace(result.storage_data, tensors=0))
    with pytest.raises(SaveFailed, match="DCP planned 1 pieces of tensors and the ranks wrote 0"):
        writer.finish(metadata, [[part]])
    assert not holdfast.Run(tmp_path / "run").steps
    assert not list((tmp_path / "run" / "data").rglob("*.safetensors"))
