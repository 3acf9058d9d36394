"""What torch.save gives back and what holdfast gives back are the same bytes, strides and ties, for awkward states."""

from __future__ import annotations

import collections
import io
import pathlib

import pytest
import torch
from torch import nn

import holdfast

G = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


STATES: dict[str, object] = {
    "every dtype": {
        str(d): (random(5, 3) * 3).to(d)
        for d in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
        )
    },
    "unsigned": {str(d): torch.arange(7).to(d) for d in (torch.uint16, torch.uint32, torch.uint64)},
    "shapes": {"0-d": torch.tensor(1.5), "empty": torch.zeros(0, 4), "one": torch.ones(1), "deep": random(1, 2, 1, 3, 1)},
    "layouts": {
        "transposed": random(4, 6).t(),
        "channels_last": random(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).expand(4, 3),
        "sliced": random(6, 8)[::2, 1:5],
        "permuted": random(2, 3, 4).permute(2, 0, 1),
    },
    "special values": {
        "nan payload": torch.tensor([0x7FC00001, 0x7F800001, -0x80000000], dtype=torch.int32).view(torch.float32),
        "denormal": torch.tensor([5e-324, -0.0, float("inf")], dtype=torch.float64),
    },
    "conjugate": {"z": torch.view_as_complex(random(4, 2)).conj(), "n": torch.view_as_complex(random(4, 2)).conj().imag},
    "adam": None,
    "containers": {"a": [1, (2.5, None)], 3: {"x": collections.OrderedDict(b=1, a=2)}, "t": [torch.ones(2), {"k": torch.zeros(1)}]},
    "numbers": {"pi": 3.141592653589793, "tiny": 5e-324, "big": 2**100, "c": 1 + 2j, "nan": float("nan"), "bytes": b"\0\xff"},
}  # fmt: skip


def adam() -> dict[str, object]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(random(16, 4)).square().sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def raw(t: torch.Tensor) -> bytes:
    return t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: object, b: object, path: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), path
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert raw(a) == raw(b), path
        if not a.is_conj() and not a.is_neg():
            assert a.stride() == b.stride(), f"{path}: {a.stride()} {b.stride()}"
    elif isinstance(a, dict):
        assert type(a) is type(b), path
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b), path
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert type(a) is type(b), path
        assert a == b or (a != a and b != b), path


@pytest.mark.parametrize("name", STATES)
def test_same_as_torch_save(tmp_path: pathlib.Path, name: str) -> None:
    state = {"s": STATES[name] if STATES[name] is not None else adam()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    theirs = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    holdfast.save(tmp_path, state)
    ours = holdfast.load(tmp_path, as_="torch")
    if name == "layouts":  # torch.save keeps the storage behind a slice, we keep what is seen of it
        theirs["s"]["sliced"] = theirs["s"]["sliced"].clone(memory_format=torch.preserve_format)
        ours["s"]["sliced"] = ours["s"]["sliced"].clone(memory_format=torch.preserve_format)
    assert_same(theirs, ours)


def test_ties_survive(tmp_path: pathlib.Path) -> None:
    shared = random(300, 100)
    holdfast.save(tmp_path, {"m": {"wte": shared, "head": shared}})
    back = holdfast.load(tmp_path, as_="torch")["m"]
    assert back["wte"].data_ptr() == back["head"].data_ptr()
    assert holdfast.open(tmp_path).stored_bytes < 1.5 * shared.nbytes


def test_the_files_load_with_safetensors(tmp_path: pathlib.Path) -> None:
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    holdfast.save(tmp_path, {"model": model})
    (path,) = (tmp_path / "data").glob("*/model.safetensors")
    fresh = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    fresh.load_state_dict(load_file(path))
    for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert raw(a) == raw(b)
