"""Awkward tensors, byte for byte, against what torch.save and torch.load give back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from holdfast.core.errors import StateError, UnsupportedValue
from holdfast.state.adapters.torch_placing import TORCH_DTYPES
from holdfast.state.adapters.torch_tensors import TorchEngine
from holdfast.state.tensors import HostTensor, TensorSpec

FLOATS = {"float64": np.uint64, "float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bit pattern: NaN payloads, denormals, minus zero."""
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    if dtype == torch.bool:
        raw &= 1
    return torch.from_numpy(raw).view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def bits(t: torch.Tensor) -> bytes:
    plain = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def through_torch(t: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    base = random_bytes(dtype, (4, 6, 5))
    return {
        "plain": base,
        "0-d": random_bytes(dtype, (1,)).reshape(()),
        "empty": torch.empty((0, 3), dtype=dtype),
        "transposed": base.transpose(0, 2),
        "sliced": base[:, 1:4:2, ::2],
        "expanded": base[:, :1].expand(4, 3, 5),
        "offset": base.reshape(-1)[7:29],
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_dtype_and_layout(name, save):
    live = layouts(TORCH_DTYPES[name])
    saved = save({"t": live})
    for kind, back in saved.load()["t"].items():
        want = through_torch(live[kind])
        assert back.dtype == want.dtype, kind
        assert back.shape == want.shape, kind
        assert back.stride() == want.stride(), kind
        assert bits(back) == bits(want), kind


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_in_place_into_other_layouts(name, save):
    dtype = TORCH_DTYPES[name]
    value = random_bytes(dtype, (4, 6))
    saved = save({"t": {"a": value, "b": value.t()}})
    target_a = random_bytes(dtype, (6, 4), 1).t()
    target_b = random_bytes(dtype, (6, 4), 2)
    state = {"t": {"a": target_a, "b": target_b}}
    saved.into(state)
    assert state["t"]["a"] is target_a
    assert state["t"]["b"] is target_b
    assert target_a.stride() == (1, 4)
    assert bits(target_a) == bits(value)
    assert bits(target_b) == bits(value.t())


def test_channels_last_conj_and_neg(save):
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    z = torch.randn(3, 2, dtype=torch.complex64)
    live = {"image": image, "conj": z.conj(), "neg": z.conj().imag, "adjoint": z.mH}
    back = save({"t": live}).load()["t"]
    assert back["image"].is_contiguous(memory_format=torch.channels_last)
    for name, t in live.items():
        assert torch.equal(back[name], t), name
        assert not back[name].is_conj()
        assert not back[name].is_neg()
    target = torch.zeros(2, 3, dtype=torch.complex64).t().conj()
    save({"t": z}).into({"t": target})
    assert torch.equal(target, z)


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_nan_payloads_survive_strided_copies(name, save):
    dtype = TORCH_DTYPES[name]
    signalling = {
        "float64": 0x7FF0000000000001,
        "float32": 0x7F800001,
        "float16": 0x7C01,
        "bfloat16": 0x7F81,
    }[name]
    raw = np.full((3, 4), signalling, FLOATS[name])
    t = torch.from_numpy(raw.view(np.uint8).copy()).view(dtype).view(3, 4)[:, ::2]
    back = save({"t": t}).load()["t"]
    assert bits(back) == raw[:, ::2].tobytes()


def test_parameter_and_requires_grad_survive(save):
    live = {
        "p": torch.nn.Parameter(torch.randn(2)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "leaf": torch.randn(2, requires_grad=True),
        "plain": torch.randn(2),
        "buffer": torch.nn.Buffer(torch.randn(2)),
        "ids": torch.nn.Parameter(torch.arange(3), requires_grad=False),
    }
    back = save({"t": live}).load()["t"]
    for name, t in live.items():
        assert isinstance(back[name], torch.nn.Parameter) == isinstance(t, torch.nn.Parameter), name
        assert back[name].requires_grad == t.requires_grad, name
        assert torch.equal(back[name], t), name


def test_ties_survive_without_live_objects(save):
    t = torch.randn(3)
    back = save({"t": [t, t, t.clone()]}).load()["t"]
    assert back[0] is back[1]
    assert back[2] is not back[0]


def test_numpy_sees_foreign_types(save):
    live = {n: random_bytes(TORCH_DTYPES[n], (3, 4)) for n in TORCH_DTYPES}
    back = save({"t": live}).load("numpy")["t"]
    for name, t in live.items():
        assert isinstance(back[name], np.ndarray), name
        assert back[name].tobytes() == bits(t), name
    assert back["bfloat16"].dtype.name == "bfloat16"
    assert back["float8_e4m3fn"].dtype.name == "float8_e4m3fn"


def test_inference_tensors_are_filled(save):
    value = torch.randn(4)
    with torch.inference_mode():
        target = torch.zeros(4)
    save({"t": value}).into({"t": target})
    assert torch.equal(target, value)


def test_restore_is_seen_by_autograd(save):
    saved = save({"w": torch.ones(3)})
    w = torch.zeros(3, requires_grad=True)
    loss = (w * w).sum()
    saved.into({"w": w})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expanded_live_tensor(save):
    row = torch.arange(3.0)
    saved = save({"t": {"a": row.expand(2, 3)}})
    target = torch.zeros(3).expand(2, 3)
    saved.into({"t": {"a": target}})
    assert torch.equal(target, row.expand(2, 3))


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "to_dense"),
    "meta": (lambda: torch.empty(3, device="meta"), "to_empty"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "list|wraps",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_name_path_and_remedy(name, save):
    make, remedy = REFUSED[name]
    with pytest.raises(UnsupportedValue, match=rf"^a/b/1: .*({remedy})"):
        save({"a": {"b": [1, make()]}})


def test_wrapper_subclass_is_refused(save):
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(UnsupportedValue, match="a: a TwoTensor wraps other tensors"):
        save({"a": TwoTensor(torch.ones(2), torch.ones(2))})


def test_plain_subclass_is_stored_as_a_tensor(save):
    class Mine(torch.Tensor):
        pass

    t = torch.randn(3).as_subclass(Mine)
    back = save({"t": t}).load()["t"]
    assert type(back) is torch.Tensor
    assert torch.equal(back, t.as_subclass(torch.Tensor))


def test_wrong_bytes_are_refused_before_anything_changes(save):
    saved = save({"a": torch.ones(3), "b": torch.ones(2)})
    a, b = torch.zeros(3), torch.zeros(2)
    plan = saved.plan({"a": a, "b": b})
    with pytest.raises(StateError, match="b: its bytes are missing"):
        plan.apply({"a": saved.tensors["a"]})
    assert a.sum() == 0


def test_huge_strides_do_not_bring_back_the_whole_matrix(save):
    wide = torch.zeros(8, 100_000)
    back = save({"t": wide[:, 0]}).load()["t"]
    assert back.untyped_storage().nbytes() < 10_000
    assert torch.equal(back, wide[:, 0])


def test_a_bool_keeps_its_byte(save):
    odd = torch.tensor([[0, 1, 2, 255]] * 2, dtype=torch.uint8).view(torch.bool)[:, ::2]
    back = save({"t": odd}).load()["t"]
    assert bits(back.view(torch.uint8)) == bits(odd.view(torch.uint8)) == bytes([0, 2, 0, 2])


def test_neighbours_are_of_one_memory():
    # The second begins where the first ends, in a memory of its own.
    values = torch.arange(8.0)
    one, two = (memoryview(bytearray(values[i : i + 4].numpy().tobytes())) for i in (0, 4))
    behind = memoryview(bytearray(16) + two)
    specs = [TensorSpec(name, "float32", (4,)) for name in "ab"]
    live = [torch.zeros(4), torch.zeros(4)]
    for order in (0, 1), (1, 0):
        hosts = [HostTensor(specs[0], one), HostTensor(specs[1], behind, start=16)]
        TorchEngine().copy_in([(live[i], hosts[i]) for i in order])
        assert torch.equal(torch.cat(live), values)


def test_a_dictionary_of_tensors_has_the_stored_keys_in_the_stored_order(save):
    saved = save({"d": {"a": torch.ones(2), "b": torch.zeros(2)}})
    for live in (
        {"b": torch.ones(2), "a": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)},
    ):
        held = live["a"], live["b"]
        saved.into({"d": live})
        assert list(live) == ["a", "b"]
        assert all(now is before for now, before in zip(live.values(), held, strict=True))
