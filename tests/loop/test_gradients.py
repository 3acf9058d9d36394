"""Gradients are state while an optimizer has yet to consume them, whichever that is, and only then."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

from holdfast import Checkpointer, Run, every, on
from holdfast.stores import MemoryStore


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


def stored(store: MemoryStore) -> dict[int, set[str]]:
    """Return the parts of which gradients were stored, by step."""
    return {c.step: {n.split("/")[0] for n in c.tensors if n.endswith(".grad")} for c in Run(store)}


def train_two(store: MemoryStore, until: int | None = None) -> torch.Tensor:
    """Train two models, of which one steps each time, and the other one after two."""
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(4, 1) for name in ("quick", "slow")}
    quick, slow = (torch.optim.SGD(m.parameters(), lr=0.1) for m in models.values())
    state = {**models, "first": quick, "second": slow}
    with Checkpointer(store, state, save=every(steps=1), writer="inline") as ckpt:
        for step in ckpt.steps(6):
            if step == until:
                break
            x = torch.randn(3, 4)
            models["quick"](x).square().sum().backward()
            quick.step()
            quick.zero_grad()
            models["slow"](x).square().sum().backward()
            if step % 2:
                slow.step()
                slow.zero_grad()
    return models["slow"].weight.detach()


def test_each_optimizer_is_watched_for_itself() -> None:
    whole = train_two(MemoryStore())
    for until in range(1, 6):
        store = MemoryStore()
        train_two(store, until)
        assert torch.equal(train_two(store), whole), until
    assert stored(store) == {step: {"slow"} if step % 2 else set() for step in range(1, 7)}


def test_an_epoch_that_ends_brings_no_gradients_back() -> None:
    """They are still there, for the next step to clear, and were consumed by the step before."""
    store, model = MemoryStore(), torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}

    def train(consume: bool) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        if consume:
            optimizer.step()

    with Checkpointer(store, state, save=on("epoch_end"), writer="inline") as ckpt:
        for epoch in ckpt.epochs(3):
            for _ in ckpt.steps(2 * (epoch + 1)):
                train(consume=epoch != 1)
    assert stored(store) == {2: set(), 4: {"model"}, 6: set()}


def test_an_optimizer_that_holds_none_waits_for_none() -> None:
    store = MemoryStore()
    used, unused = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (used, unused))
    state = {"used": used, "unused": unused, "first": first, "second": second}
    with Checkpointer(store, state, save=every(steps=1), writer="inline") as ckpt:
        for _ in ckpt.steps(2):
            first.zero_grad()
            used(torch.ones(2, 4)).sum().backward()
            first.step()
    assert stored(store) == {1: set(), 2: set()}


@pytest.mark.parametrize("place", ["top", "list", "inside"])
def test_gradients_that_no_optimizer_has_consumed_are_state(tmp_path: pathlib.Path, place: str) -> None:
    def train_to(url: pathlib.Path, until: int) -> object:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state: dict[str, dict[str, object]] = {
            "top": {"model": model, "optimizer": optimizer},
            "list": {"model": model, "optimizers": [optimizer]},
            "inside": {"all": {"model": model, "optimizer": optimizer}},
        }
        with Checkpointer(url, state[place], save=every(steps=2)) as ckpt:
            for step in ckpt.steps(9):
                if step == until:
                    return None
                (model(torch.randn(8, 4)).square().mean() / 3).backward()
                if step % 3 == 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return model.weight.detach()

    train_to(tmp_path / "cut", 5)  # the newest is step 4: one micro-batch of three is in the gradients
    assert torch.equal(train_to(tmp_path / "cut", 9), train_to(tmp_path / "whole", 9))
