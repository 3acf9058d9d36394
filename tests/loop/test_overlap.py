"""Overlap: what is saved is the state of the safe point, however late its bytes are copied; what tears it is an error."""

from __future__ import annotations

import ctypes
import pathlib
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import holdfast
from holdfast import Checkpointer, Run, every, load
from holdfast.errors import SaveFailed
from holdfast.saving import overlap

WIDTH = 640  # a layer of 1.6 MB: worth copying later


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


class Training:
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, WIDTH)).square().mean().backward()
        self.optimizer.step()

    def clone(self) -> dict[str, dict[str, torch.Tensor]]:
        moments = {
            f"{name}.{key}": value.clone()
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state[p].items()
        }
        return {"model": {k: v.clone() for k, v in self.model.state_dict().items()}, "moments": moments}


class Brake:
    """Copies slowly, or not at all until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.seconds = 0.0
        self.copied = 0

    def __call__(self, to: int, of: int, size: int) -> None:
        assert self.go.wait(20)
        time.sleep(self.seconds)
        self.copied += size
        ctypes.memmove(to, of, size)


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Brake:
    found = Brake()
    slow = type("Slow", (), {"memmove": found, "c_char": ctypes.c_char})
    monkeypatch.setattr(overlap, "ctypes", slow)
    monkeypatch.setattr(overlap, "CHUNK_BYTES", 200_000)
    return found


def check(saved: dict[str, dict[str, torch.Tensor]], url: pathlib.Path, step: int) -> None:
    found = Training()
    for _ in range(1):
        found.step()
    load(url, into=found.state, step=step)
    now = found.clone()
    for part, tensors in saved.items():
        assert now[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(now[part][name], tensor), f"step {step}: {name}"


@pytest.mark.parametrize("writer", ["thread", "process"])
@pytest.mark.parametrize("kind", [True, "check"])
def test_what_is_saved_is_the_state_of_the_safe_point(
    tmp_path: pathlib.Path, brake: Brake, writer: str, kind: bool | str
) -> None:
    brake.seconds = 0.002
    training = Training()
    saved = {}
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1), overlap=kind, writer=writer)
    for step in ckpt.steps(5):
        training.step()
        saved[step + 1] = training.clone()
    ckpt.close()
    assert brake.copied > 3 * 4 * 2 * WIDTH * WIDTH
    for step, expected in saved.items():
        check(expected, tmp_path, step)


def test_the_optimizer_waits_and_forward_and_backward_do_not(tmp_path: pathlib.Path, brake: Brake) -> None:
    training = Training()
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1))
    passed: list[str] = []
    for step in ckpt.steps(3):
        if step == 1:
            training.model(torch.randn(8, WIDTH)).square().mean().backward()
            passed.append("backward")
            threading.Timer(0.3, lambda: (passed.append("let go"), brake.go.set())).start()
            training.optimizer.step()
            passed.append("step")
            brake.go.set()
        else:
            training.step()
        if step == 0:
            expected = training.clone()
            brake.go.clear()
    ckpt.close()
    assert passed == ["backward", "let go", "step"]
    check(expected, tmp_path, 1)


def test_what_else_changes_a_parameter_tears_the_snapshot_and_is_told(
    tmp_path: pathlib.Path, brake: Brake
) -> None:
    training = Training()
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1))
    caught = None
    for step in ckpt.steps(4):
        if step == 1:
            with torch.no_grad():
                training.model.last.weight.clamp_(-0.01, 0.01)
            brake.go.set()
            with pytest.raises(
                SaveFailed, match=r"model/last\.weight: changed by something else.*protect"
            ) as caught:
                ckpt.wait()
        training.step()
        if step == 0:
            brake.go.clear()
    ckpt.close()
    assert caught is not None
    assert Run(tmp_path).steps == [2, 3, 4]
    assert not any(Run(tmp_path).verify().values())


def test_a_tensor_that_is_given_other_memory_is_copied_no_further(
    tmp_path: pathlib.Path, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()
    reached: set[int] = set()

    def reach(to: int, of: int, size: int) -> None:
        assert brake.go.wait(20)
        reached.add(of)  # and touch nothing: it may be gone

    monkeypatch.setattr(overlap.ctypes, "memmove", reach)
    with Checkpointer(tmp_path, training.state, save=every(steps=1)) as ckpt:
        for step in ckpt.steps(2):
            if step == 1:
                before = training.model.last.weight.data_ptr()
                training.model.last.weight.share_memory_()  # as handing the model to a spawned process does
                brake.go.set()
                with pytest.raises(
                    SaveFailed, match=r"model/last\.weight: changed by something else.*protect"
                ):
                    ckpt.wait()
                assert reached
                assert before not in reached
            training.step()
            if step == 0:
                brake.go.clear()


def test_protect_waits_for_the_copy(tmp_path: pathlib.Path, brake: Brake) -> None:
    training = Training()
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1))
    for step in ckpt.steps(3):
        training.step()
        if step == 1:
            threading.Timer(0.2, brake.go.set).start()
            holdfast.protect()
            assert brake.go.is_set()
            with torch.no_grad():
                training.model.last.weight.clamp_(-0.01, 0.01)
        if step == 0:
            expected = training.clone()
            brake.seconds = 0.001
    ckpt.close()
    assert Run(tmp_path).steps == [1, 2, 3]
    check(expected, tmp_path, 1)


def test_check_finds_what_no_counter_tells(tmp_path: pathlib.Path, brake: Brake) -> None:
    training = Training()
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1), overlap="check")
    for step in ckpt.steps(2):
        if step == 1:
            training.model.last.weight.data.mul_(0.5)
            brake.go.set()
            with pytest.raises(SaveFailed, match=r"model/last\.weight: changed"):
                ckpt.wait()
        training.step()
        if step == 0:
            brake.go.clear()
    ckpt.close()
    assert Run(tmp_path).steps == [2]


class ByHand(torch.nn.Module):
    """Descends without an optimizer that could tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))


@pytest.mark.parametrize("overlapping", [True, False])
def test_what_no_optimizer_updates_is_copied_at_once(
    tmp_path: pathlib.Path, brake: Brake, overlapping: bool
) -> None:
    model = ByHand()
    ckpt = Checkpointer(tmp_path, {"model": model}, save=every(steps=1), overlap=overlapping)
    for _ in ckpt.steps(3):
        with torch.no_grad():
            model.weight.add_(1)
    ckpt.close()
    assert brake.copied == 0
    for step in (1, 2, 3):
        assert load(tmp_path, step=step)["model"]["weight"][0, 0] == step + 1


@pytest.mark.parametrize("how", [{"overlap": False}, {"writer": "inline"}])
def test_overlap_can_be_left_out(tmp_path: pathlib.Path, brake: Brake, how: dict[str, object]) -> None:
    training = Training()
    with Checkpointer(tmp_path, training.state, save=every(steps=1), **how) as ckpt:
        for _ in ckpt.steps(2):
            training.step()
    assert brake.copied == 0
    assert Run(tmp_path).steps == [1, 2]


def test_a_save_outside_of_a_loop_is_complete_when_it_returns(tmp_path: pathlib.Path, brake: Brake) -> None:
    training = Training()
    training.step()
    with Checkpointer(tmp_path, training.state) as ckpt:
        ckpt.save()
        expected = training.clone()
        training.model.last.weight.data.mul_(0.5)
    assert brake.copied == 0
    check(expected, tmp_path, 0)


def test_optimizers_are_free_after_the_end(tmp_path: pathlib.Path, brake: Brake) -> None:
    training = Training()
    with Checkpointer(tmp_path, training.state, save=every(steps=1)) as ckpt:
        saver = ckpt._engine._saver
        for _ in ckpt.steps(1):
            training.step()
    assert saver._unguard is None
    brake.go.clear()
    training.step()
