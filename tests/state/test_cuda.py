"""What only a GPU shows: placement of counters, copies across devices, device generators."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

from holdfast import Checkpointer, every, load
from holdfast.state.adapters import torch_devices
from holdfast.state.rng import capture_rng, restore_rng

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(seed: int, device: str, **options: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    x = torch.linspace(-1, 1, 16).reshape(4, 4).to(model.weight.device)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.weight.detach().cpu()


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}])
@pytest.mark.parametrize("warm", [0, 1])
def test_next_steps_are_bit_equal(options, warm, save):
    model, optimizer = make(0, "cuda", **options)
    train(model, optimizer, 3)
    saved = save({"m": model, "o": optimizer})
    want = train(model, optimizer, 3)
    other, live = make(1, "cuda", **options)
    train(other, live, warm)
    saved.into({"m": other, "o": live})
    step = live.state[other.weight]["step"]
    assert step.device.type == ("cuda" if options else "cpu")
    assert torch.equal(train(other, live, 3), want)


@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_across_devices(here, there, save):
    model, optimizer = make(0, here)
    train(model, optimizer, 2)
    other, live = make(1, there)
    save({"m": model, "o": optimizer}).into({"m": other, "o": live})
    assert torch.equal(model.weight.cpu(), other.weight.cpu())
    moment = live.state[other.weight]["exp_avg"]
    assert moment.device.type == there
    assert torch.equal(moment.cpu(), optimizer.state[model.weight]["exp_avg"].cpu())
    train(other, live, 1)


def test_strided_sources(save):
    t = torch.randn(6, 8, device="cuda")
    back = save({"a": t.t(), "b": t[:, ::2], "c": t.bfloat16()}).load()
    assert torch.equal(back["a"], t.t().cpu())
    assert torch.equal(back["b"], t[:, ::2].cpu())
    assert torch.equal(back["c"], t.bfloat16().cpu())


def test_device_generators(save):
    torch.rand(1, device="cuda")
    owned = torch.Generator("cuda")
    saved = save({"rng": capture_rng(), "g": owned})
    want = torch.rand(3, device="cuda"), torch.rand(3, device="cuda", generator=owned)
    assert restore_rng(saved.load("numpy")["rng"]) == []
    saved.into({"rng": {}, "g": owned})
    got = torch.rand(3, device="cuda"), torch.rand(3, device="cuda", generator=owned)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_state_dict_objects_keep_their_device(save):
    class Average:
        def __init__(self) -> None:
            self.mean = torch.ones(2, device="cuda")

        def state_dict(self):
            return {"mean": self.mean}

        def load_state_dict(self, state):
            self.mean = state["mean"]

    live = Average()
    saved = save({"a": live})
    live.mean = torch.zeros(2, device="cuda")
    saved.into({"a": live})
    assert live.mean.device.type == "cuda"
    assert live.mean.tolist() == [1, 1]


WIDE = 2048  # a layer of 16 MB, and as much again for each moment


@pytest.mark.parametrize("writer", ["process", "thread"])
@pytest.mark.parametrize("overlap", [True, "check", False])
def test_saved_behind_the_next_step(tmp_path: pathlib.Path, overlap: bool | str, writer: str) -> None:
    """Every step is saved, the host never waits for the device, and each checkpoint is the state of its safe point."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDE, WIDE) for _ in range(4)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(64, WIDE, device="cuda")
    wanted: dict[int, list[torch.Tensor]] = {}
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path, state, save=every(steps=1), overlap=overlap, writer=writer) as ckpt:
        for step in ckpt.steps(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
            wanted[step + 1] = [t.detach().clone() for t in [*model.parameters(), *moments]]
        arena = ckpt._engine._saver._arenas.first.memory
        assert arena is not None
        assert torch_devices.pinned(torch.frombuffer(arena.view, dtype=torch.uint8))
    for step, tensors in wanted.items():
        load(tmp_path, into=state, step=step)
        found = [*model.parameters(), *[optimizer.state[p]["exp_avg"] for p in model.parameters()]]
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True)), f"step {step}"


def test_a_step_that_is_replayed_from_a_graph(tmp_path: pathlib.Path) -> None:
    """No hook sees a replay: nothing is copied behind it."""
    weight = nn.Parameter(torch.zeros(WIDE, WIDE, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.full_like(weight, -1.0)
    graph = torch.cuda.CUDAGraph()
    with Checkpointer(tmp_path, {"w": {"w": weight}, "o": optimizer}, save=every(steps=1)) as ckpt:
        optimizer.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in ckpt.steps(5):
            graph.replay()
    for step in range(1, 6):
        assert load(tmp_path, step=step)["w"]["w"].unique().tolist() == [step + 1.0]


def test_host_memory_that_was_not_pinned_goes_through_a_ring() -> None:
    sources = [torch.randn(n) for n in (1, 5_000_000, 3, 0, 20_000_000)] + [torch.randn(99, 51).t()]
    targets = [torch.zeros_like(s, device="cuda") for s in sources]
    torch_devices.write_to(list(zip(targets, sources, strict=True)))
    assert all(torch.equal(t.cpu(), s) for t, s in zip(targets, sources, strict=True))
