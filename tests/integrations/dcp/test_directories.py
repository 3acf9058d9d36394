"""DCP's own directories: imported, exported, and refused where they are hostile or damaged."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import holdfast
from holdfast.core.errors import InvalidFormat, MissingObject, PolicyError, Truncated, UnsupportedValue
from holdfast.integrations.dcp import export_dcp, import_dcp


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def state() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "model": {"w": torch.randn(200, 100), "b": torch.randn(7).to(torch.bfloat16), "n": torch.tensor(3)},
        "optim": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "epoch": 4,
    }


def zeros() -> dict[str, Any]:
    found = state()
    for t in found["model"].values():
        t.zero_()
    found["optim"]["groups"][0].update(lr=0.0, betas=())
    found["epoch"] = 0
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "step-12")
    return tmp_path / "step-12"


def test_there_and_back(tmp_path: Path, directory: Path) -> None:
    checkpoint = import_dcp(directory, tmp_path / "run", tag="from-dcp")
    assert checkpoint.step == 12
    assert not checkpoint.verify()
    assert same(holdfast.load(tmp_path / "run")["model"], state()["model"])
    assert checkpoint.tree["optim"] == {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    export_dcp(tmp_path / "run", tmp_path / "out", step="from-dcp")
    got = zeros()
    dcp.load(got, checkpoint_id=tmp_path / "out")
    assert same(got, state())
    with pytest.raises(PolicyError, match="holds a DCP checkpoint already"):
        export_dcp(tmp_path / "run", tmp_path / "out")


def test_what_a_checkpointer_saved_is_exported(tmp_path: Path) -> None:
    model = torch.nn.Linear(30, 20)
    holdfast.save(tmp_path / "run", {"model": model, "epoch": 2})
    export_dcp(tmp_path / "run", tmp_path / "out")
    got = {"model": {k: torch.zeros_like(v) for k, v in model.state_dict().items()}}
    dcp.load(got, checkpoint_id=tmp_path / "out")
    assert same(got["model"], dict(model.state_dict()))


class Runs:
    """A pickle that runs code when it is loaded by the unpickler of the standard library."""

    def __init__(self, act: Any, *arguments: object) -> None:
        self.act, self.arguments = act, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.act, self.arguments


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, directory: Path, nested: bool) -> None:
    witness = tmp_path / "was run"
    bad: object = Runs(os.mkdir, str(witness))
    if nested:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        metadata.planner_data["epoch"] = bad
        bad = metadata
    (directory / ".metadata").write_bytes(pickle.dumps(bad))
    with pytest.raises(InvalidFormat, match=r"posix\.mkdir|nt\.mkdir"):
        import_dcp(directory, tmp_path / "run")
    assert not witness.exists()
    assert not (tmp_path / "run").exists()
    pickle.loads((directory / ".metadata").read_bytes())
    assert witness.exists()  # so it would have run


@pytest.mark.parametrize("name", ["getattr", "eval", "__import__", "exec"])
def test_builtins_are_refused(tmp_path: Path, directory: Path, name: str) -> None:
    (directory / ".metadata").write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(InvalidFormat, match=f"builtins.{name}"):
        import_dcp(directory, tmp_path / "run")


@pytest.mark.parametrize("name", ["load", "hub.load", "nn.Module", "Tensor", "_C", "ops"])
def test_the_rest_of_torch_is_refused(tmp_path: Path, directory: Path, name: str) -> None:
    raw = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    (directory / ".metadata").write_bytes(raw)
    with pytest.raises(InvalidFormat, match="no part of DCP's metadata"):
        import_dcp(directory, tmp_path / "run")


def test_an_item_that_runs_code_is_refused_or_left_out(tmp_path: Path) -> None:
    witness = tmp_path / "was run"
    dcp.save({"w": torch.ones(4), "bad": Runs(os.mkdir, str(witness))}, checkpoint_id=tmp_path / "step-1")
    with pytest.raises(UnsupportedValue, match=r"'bad': cannot be read without running code.*skip=\['bad'\]"):
        import_dcp(tmp_path / "step-1", tmp_path / "run")
    assert not witness.exists()
    checkpoint = import_dcp(tmp_path / "step-1", tmp_path / "run", skip=["bad"])
    assert list(checkpoint.tensors) == ["state/w"]
    assert not witness.exists()


def change(directory: Path, act: Any) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    act(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def moved(to: str) -> Any:
    def act(metadata: Metadata) -> None:
        for where in metadata.storage_data.values():
            where.relative_path = to

    return act


def test_paths_that_lead_out_are_refused(tmp_path: Path, directory: Path) -> None:
    for path in ("../step-12/__0_0.distcp", "/etc/passwd", "..", "a\\b", ""):
        change(directory, moved(path))
        with pytest.raises(InvalidFormat, match="no plain file name"):
            import_dcp(directory, tmp_path / "run")


def test_damage_is_named(tmp_path: Path, directory: Path) -> None:
    whole = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(whole[:-20])
    with pytest.raises(InvalidFormat, match="is not the metadata of a DCP checkpoint"):
        import_dcp(directory, tmp_path / "run")
    (directory / ".metadata").unlink()
    with pytest.raises(MissingObject, match="was not completed"):
        import_dcp(directory, tmp_path / "run")
    (directory / ".metadata").write_bytes(whole)

    def without_b(metadata: Metadata) -> None:
        del metadata.storage_data[MetadataIndex("model.b", torch.Size([0]))]

    change(directory, without_b)
    with pytest.raises(MissingObject, match=r"'model\.b' is in the metadata, and no file"):
        import_dcp(directory, tmp_path / "run")
    (directory / ".metadata").write_bytes(whole)
    data = directory / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-300])
    with pytest.raises(Truncated, match="ends before byte"):
        import_dcp(directory, tmp_path / "run")
    assert not holdfast.Run(tmp_path / "run").steps
    assert not list((tmp_path / "run" / "data").rglob("*.safetensors"))
