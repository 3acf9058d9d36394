"""What only a GPU shows: placement of counters, copies across devices, device generators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
