"""Gradients are state while an optimizer has yet to consume them, and only then."""

from __future__ import annotations

import pytest

from holdfast import Checkpointer, Run, every, on
from holdfast.stores import MemoryStore

torch = pytest.importorskip("torch")


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
