"""Runs of format version 1 are read for ever, to the bit, with and without torch."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import safetensors
import torch
from expected_v1 import DTYPES, LARGE, LAYOUTS, MEAN, MOMENTUM, ROOT, VALUES, WEIGHT, check_run, check_values

import holdfast

TREE_DIGEST = "fec3a82ef8a70168e2fe8d43ef9bc2e3159b249127ed5f6e9d1d332f531d625e"


def tree_digest(root: pathlib.Path) -> str:
    """One digest over every name and byte below `root`."""
    whole = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        whole.update(
            f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes()
        )
    return whole.hexdigest()


@pytest.fixture(autouse=True)
def untouched() -> object:
    """Reading changes nothing."""
    yield
    assert tree_digest(ROOT) == TREE_DIGEST


def test_the_golden_files_are_those_that_were_made() -> None:
    assert tree_digest(ROOT) == TREE_DIGEST, (
        "golden files are never changed: make another version beside them"
    )


def test_every_value_and_byte_is_read() -> None:
    check_run()


def test_every_value_and_byte_is_read_where_torch_is_not_installed() -> None:
    code = "import sys; sys.modules['torch'] = None; import expected_v1; expected_v1.check_run(); print('checked')"
    path = os.pathsep.join([str(ROOT.parent), str(pathlib.Path(holdfast.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "checked\n", done.stderr


def as_bytes(t: torch.Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def test_torch_gets_its_own_tensors_back() -> None:
    loaded = holdfast.load(ROOT, step=20, as_="torch")
    for name, raw in DTYPES.items():
        t = loaded["dtypes"][name]
        assert (t.dtype, tuple(t.shape)) == (getattr(torch, name), (2, 3))
        assert as_bytes(t).hex() == raw
    for name, (dtype, shape, stride, raw) in LAYOUTS.items():
        t = loaded["layouts"][name]
        if isinstance(t, torch.Tensor):
            assert (t.dtype, tuple(t.shape)) == (getattr(torch, dtype), shape)
            assert stride is None or t.stride() == stride
            assert as_bytes(t).hex() == raw
    assert type(loaded["model"]["encoder.weight"]) is torch.nn.Parameter
    assert loaded["model"]["encoder.weight"] is loaded["model"]["decoder.weight"]
    values = dict(loaded["values"])
    assert [values.pop(name) for name in ("torch_size", "torch_dtype", "torch_device")] == [
        torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"),
    ]  # fmt: skip
    values.pop("numpy_dtype")
    check_values(values, VALUES)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3, 2, bias=False)
        self.decoder = torch.nn.Linear(3, 2, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize("step", [10, 20])
def test_live_objects_are_filled(step: int) -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
    holdfast.load(
        ROOT, into={"model": model, "optimizer": optimizer}, step=step, only=["model/**", "optimizer/**"]
    )
    assert as_bytes(model.decoder.weight.detach()).hex() == WEIGHT[step]
    assert as_bytes(model.mean).hex() == MEAN
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.5)
    momentum = [as_bytes(s["momentum_buffer"]).hex() for s in optimizer.state.values()]
    assert momentum == {10: [], 20: [MOMENTUM]}[step]


def test_any_safetensors_reader_reads_the_data_files() -> None:
    found: dict[str, bytes] = {}
    for path in sorted(ROOT.glob("data/000000000010-*/*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            found[f"{path.stem}/{name}"] = bytes(entry["data"])
    assert {
        n.removeprefix("dtypes/"): raw.hex() for n, raw in found.items() if n.startswith("dtypes/")
    } == DTYPES
    assert found["frozen/large"] == LARGE
    assert found["model/encoder.weight"].hex() == WEIGHT[10]


def test_an_old_run_can_be_carried_on(tmp_path: pathlib.Path) -> None:
    shutil.copytree(ROOT, tmp_path / "run")
    state = holdfast.load(tmp_path / "run", step=20, as_="torch")
    holdfast.save(tmp_path / "run", state, step=30)
    run = holdfast.Run(tmp_path / "run")
    assert run.steps == [10, 20, 30]
    assert not any(run.verify().values())
    assert run[30].manifest.new_bytes < 65536, "the large array is not written again"
    assert run.remove([10, 20], force=True) > 0
    assert not any(run.verify().values())
    assert run[30]["frozen/large"].read().tobytes() == LARGE
