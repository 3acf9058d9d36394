"""Capturing changes nothing: not the objects, not their randomness, not what the next step computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.state.capture import capture
from holdfast.state.rng import capture_rng
from state.copies import copied


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_nothing_changes(save):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    model[0].bias.requires_grad_(False)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    for p in model[3].parameters():
        del optimizer.state[p]  # partially absent
    state = {"m": model, "o": optimizer, "s": scheduler, "d": {"a": [1]}, "g": torch.Generator()}
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    grads = [p.grad for p in model.parameters()]
    keys = [id(p) for p in optimizer.state]
    before = copy.deepcopy((dict(optimizer.state_dict()), scheduler.state_dict(), model.state_dict()))
    rng = capture_rng()
    mode = model.training
    save(state, gradients=True)
    assert same(rng, capture_rng())
    assert [id(p) for p in optimizer.state] == keys
    assert same(before, (dict(optimizer.state_dict()), scheduler.state_dict(), model.state_dict()))
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert all(a is p.grad for a, p in zip(grads, model.parameters(), strict=True))
    assert model.training == mode
    assert all(p.requires_grad == (p is not model[0].bias) for p in model.parameters())


def test_sources_alias_the_live_tensors():
    t = torch.zeros(3)
    (source,) = capture({"t": t}).tensors
    t.fill_(5)
    (buffer,) = copied([source])
    assert np.frombuffer(buffer, np.float32).tolist() == [5, 5, 5]
    assert not source.value.requires_grad


def test_one_source_for_one_memory():
    t = torch.zeros(4)
    found = capture(
        {"a": t, "b": [t, t[:2], t.view(2, 2)], "c": t.detach(), "e": torch.empty(0), "f": torch.empty(0)}
    )
    assert {s.spec.name for s in found.tensors} == {"a", "b/1", "b/2", "e", "f"}
    assert found.aliases == {"b/0": "a", "c": "a"}


def test_mixed_frameworks_are_copied_together():
    found = capture(
        {"t": torch.arange(3), "n": np.arange(3), "e": torch.empty(0), "z": np.zeros(0), "s": np.int8(3)}
    )
    buffers = copied(found.tensors)
    bytes_of = {s.spec.name: bytes(b) for s, b in zip(found.tensors, buffers, strict=True)}
    assert bytes_of["t"] == bytes_of["n"] == np.arange(3).tobytes()
    assert bytes_of["s"] == b"\x03"


def test_report_is_readable():
    text = str(capture({"m": nn.Linear(2, 2), "n": 1, "l": list(range(50))}).report)
    assert "m/weight" in text
    assert "float32[2, 2]" in text
    assert "50 plain values" in text
    assert str(capture({}).report) == "nothing was captured"


@pytest.mark.filterwarnings("ignore:.*set_vital")
def test_stateful_data_loader(save):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    data = list(range(12))
    loader = torchdata.StatefulDataLoader(data, batch_size=2, shuffle=False)
    walk = iter(loader)
    next(walk), next(walk)
    saved = save({"data": loader})
    want = [b.tolist() for b in walk]
    other = torchdata.StatefulDataLoader(data, batch_size=2, shuffle=False)
    saved.into({"data": other})
    assert [b.tolist() for b in other] == want
