"""Gradients in the middle of an accumulation, whichever optimizer it is that has not stepped yet."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

from holdfast import Checkpointer, Run, every


class Around(torch.optim.Optimizer):
    """Stands for wrappers such as SAM: its groups are those of the optimizer inside, which steps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def second_step(self) -> None:
        self.inner.step()


def train(url: pathlib.Path, kind: str, total: int = 9, until: int = -1) -> list[torch.Tensor]:
    torch.manual_seed(0)
    slow, quick = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (slow, quick)]
    state: dict[str, object] = {
        "models": {"slow": slow, "quick": quick},
        "slow": optimizers[0],
        "quick": optimizers[1],
    }
    if kind == "nested":
        state = {"models": [slow, quick], "optimizers": optimizers}
    with Checkpointer(url, state, save=every(steps=1)) as ckpt:
        for step in ckpt.steps(total):
            if step == until:
                break
            (quick(slow(torch.randn(8, 4))).square().mean() / 3).backward()
            for optimizer in (
                optimizers if step % 3 == 2 else optimizers[1:] if kind == "one in each step" else ()
            ):
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for m in (slow, quick) for p in m.parameters()]


@pytest.mark.parametrize("kind", ["side by side", "nested", "one in each step"])
def test_a_resume_goes_on_with_what_was_accumulated(tmp_path: pathlib.Path, kind: str) -> None:
    whole = train(tmp_path / "whole", kind)
    train(tmp_path / "broken", kind, until=5)
    resumed = train(tmp_path / "broken", kind)
    assert all(map(torch.equal, whole, resumed))
    for checkpoint in Run(tmp_path / "whole"):
        assert any(".grad" in name for name in checkpoint.tensors) == (checkpoint.step % 3 != 0)


@pytest.mark.parametrize("kind", ["wrapped", "idle", "exchanged"])
def test_what_was_consumed_is_not_stored(tmp_path: pathlib.Path, kind: str) -> None:
    model, later = nn.Linear(3, 3), nn.Linear(3, 3)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    state: dict[str, object] = {"model": model, "later": later, "optimizer": inner}
    if kind == "wrapped":
        state["optimizer"] = Around(inner)
    elif kind == "idle":
        state["second"] = torch.optim.SGD(later.parameters(), lr=0.1)
    with Checkpointer(tmp_path, state, save=every(steps=1)) as ckpt:
        for _ in ckpt.steps(3):
            if kind == "exchanged":
                inner = ckpt.state["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
            inner.zero_grad()
            model(torch.ones(3)).sum().backward()
            inner.step()
    assert not any(".grad" in name for checkpoint in Run(tmp_path) for name in checkpoint.tensors)
