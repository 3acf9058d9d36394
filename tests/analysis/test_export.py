"""Export: any safetensors reader reads it, and what it reads is what was saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import holdfast
from holdfast.core.errors import AlreadyExists, DigestMismatch, NoCheckpoint, OutOfSpace, StateError
from holdfast.export import choose_part, export_part


def saved(tmp_path: Path, **state: object) -> holdfast.checkpoint.Checkpoint:
    return holdfast.save(tmp_path / "run", state)


def header(path: Path) -> dict[str, dict[str, object]]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_every_type_layout_and_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    types = ["?", "u1", "i2", "i4", "i8", "f2", "f4", "f8", "u2", "u4", "u8", "c8"]
    state = {f"t{t}": rng.integers(0, 2, (3, 5)).astype(t) for t in types}
    state |= {
        "turned": np.arange(12.0).reshape(3, 4).T,
        "none": np.zeros((0, 2)),
        "one": np.array(3.0),
        "big": rng.normal(size=(90, 100)),
    }
    checkpoint = saved(tmp_path, model=state)
    done = export_part(checkpoint, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert set(found) == set(state) == set(done.tensors)
    for name, want in state.items():
        np.testing.assert_array_equal(found[name], want)
        assert found[name].dtype == want.dtype


def test_the_layout_is_plain_and_aligned(tmp_path: Path) -> None:
    state = {"a": np.ones(3, np.int8), "b": np.ones(2), "c": np.ones(5, np.float16)}
    done = export_part(saved(tmp_path, model=state), tmp_path / "w.safetensors")
    found = header(tmp_path / "w.safetensors")
    assert found.pop("__metadata__") == {"format": "pt"}
    assert [(n, e["data_offsets"]) for n, e in found.items()] == [
        ("b", [0, 16]),
        ("c", [16, 26]),
        ("a", [26, 29]),
    ]
    raw = (tmp_path / "w.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert len(raw) == done.size_bytes


def test_a_torch_model_with_tied_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")

    def model() -> torch.nn.Module:
        made = torch.nn.ModuleDict(
            {
                "embed": torch.nn.Embedding(7, 4),
                "norm": torch.nn.BatchNorm1d(4),
                "head": torch.nn.Linear(4, 7, bias=False),
            }
        )
        made["head"].weight = made["embed"].weight
        return made.to(torch.bfloat16)

    source, target = model(), model()
    done = export_part(
        holdfast.save(tmp_path / "run", {"net": source, "other": {"x": 1}}), tmp_path / "w.safetensors"
    )
    assert done.part == "net"
    assert done.aliases == {"head.weight": "embed.weight"}
    missing, unexpected = safetensors_torch.load_model(target, tmp_path / "w.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    safetensors_torch.save_model(source, str(tmp_path / "theirs.safetensors"))
    assert set(safetensors_torch.load_file(tmp_path / "theirs.safetensors")) == set(done.tensors)


def test_bfloat16_and_float8(tmp_path: Path) -> None:
    state = {
        "b": np.ones(3, ml_dtypes.bfloat16),
        "e": np.ones(3, ml_dtypes.float8_e4m3fn),
        "m": np.ones(3, ml_dtypes.float8_e8m0fnu),
    }
    export_part(saved(tmp_path, model=state), tmp_path / "w.safetensors")
    found = header(tmp_path / "w.safetensors")
    assert {n: e["dtype"] for n, e in found.items() if n != "__metadata__"} == {
        "b": "BF16",
        "e": "F8_E4M3",
        "m": "F8_E8M0",
    }
    with safe_open(tmp_path / "w.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["b", "e", "m"]


def test_a_type_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"model/x is complex128"):
        export_part(saved(tmp_path, model={"x": np.ones(2, np.complex128)}), tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_which_part(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    arrays = {"x": np.ones(1)}
    net, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert choose_part(holdfast.save(tmp_path / "a", {"opt": arrays, "net": net})) == "net"
    assert choose_part(holdfast.save(tmp_path / "b", {"model": net, "critic": other})) == "model"
    for name, state in (("c", {"actor": net, "critic": other}), ("d", {"weights": arrays})):
        with pytest.raises(NoCheckpoint, match="name a part"):
            choose_part(holdfast.save(tmp_path / name, state))


def test_a_changed_byte_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, model={"a": np.zeros(50_000), "b": np.zeros(50_000)})
    ((key, start, _),) = checkpoint.reader.places("model/b")
    raw = bytearray((tmp_path / "run" / key).read_bytes())
    raw[start] ^= 1
    (tmp_path / "run" / key).write_bytes(raw)
    with pytest.raises(DigestMismatch, match="tensor 'b'"):
        export_part(checkpoint, tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path, model={"a": np.zeros(5)})
    (tmp_path / "w.safetensors").write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutOfSpace, match="No space left"):
        export_part(checkpoint, tmp_path / "w.safetensors", overwrite=True)
    assert (tmp_path / "w.safetensors").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "w.safetensors"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(tmp_path, model={"a": np.zeros(5)})
    link = os.link

    def late(source: object, target: Path) -> None:
        if Path(target).name == "w.safetensors":
            Path(target).write_text("mine")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(AlreadyExists):
        export_part(checkpoint, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_text() == "mine"
