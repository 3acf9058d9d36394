"""Tensors on devices: what is saved is the state of the safe point, and the loop waits for none of it. The device is a
model whose streams are as late as they may be; tests/state/test_cuda.py has what only a real one shows."""

from __future__ import annotations

import gc
import pathlib

import pytest
import torch

import holdfast
from holdfast import Checkpointer, Run, every, load
from holdfast.errors import SaveFailed
from holdfast.state.adapters import torch_devices
from loop.model_devices import ModelDevices
from loop.test_overlap import WIDTH, Training, check
from patience import until


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> ModelDevices:
    found = ModelDevices()
    monkeypatch.setattr(torch_devices, "DEVICES", found)
    monkeypatch.setattr(torch_devices, "_pinned", {})
    return found


class OnDevice(Training):
    """All but the optimizer's counters lie on the device."""

    def __init__(self, devices: ModelDevices, **options: object) -> None:
        super().__init__(lambda p, lr: torch.optim.AdamW(p, lr=lr, **options))
        self.devices = devices
        self.settle()

    def settle(self) -> None:
        """Put on the device what is new."""
        self.devices.adopt(*self.model.parameters(), *[b for b in self.model.buffers() if b.dim()])
        for entry in self.optimizer.state.values():
            self.devices.adopt(*[v for v in entry.values() if v.dim()])

    def step(self) -> None:
        super().step()
        self.settle()


@pytest.mark.parametrize(
    ("overlap", "writer"),
    [(True, "process"), (True, "thread"), (True, "inline"), ("check", "thread"), (False, "process")],
)
def test_what_is_saved_is_the_state_of_the_safe_point(
    tmp_path: pathlib.Path, devices: ModelDevices, overlap: bool | str, writer: str
) -> None:
    training = OnDevice(devices)
    saved = {}
    with Checkpointer(tmp_path, training.state, save=every(steps=1), overlap=overlap, writer=writer) as ckpt:
        for step in ckpt.steps(5):
            training.step()
            saved[step + 1] = training.clone()
    assert len(devices.side.told) > 0 or overlap is False or writer == "inline"
    assert devices.late == 0
    for step, expected in saved.items():
        check(expected, tmp_path, step)


def test_neither_the_loop_nor_the_optimizer_waits_for_a_device(
    tmp_path: pathlib.Path, devices: ModelDevices
) -> None:
    training = OnDevice(devices)
    late = []
    with Checkpointer(tmp_path, training.state, save=every(steps=2)) as ckpt:
        for step in ckpt.steps(4):
            late.append(devices.late)
            if step == 2:
                training.model(torch.randn(8, WIDTH)).square().mean().backward()
                late.append(devices.late)
                devices.may_be_hurried.set()
            training.step()
            if step == 1:
                expected = training.clone()
                devices.may_be_hurried.clear()
    # After the save at step 2 all of it is still to come, and a forward and backward pass do not hurry it.
    assert late[:2] == [0, 0]
    assert late[2] == late[3] > 8
    check(expected, tmp_path, 2)


@pytest.mark.parametrize("overlap", [True, "check"])
def test_what_else_changes_a_parameter_on_a_device_is_told(
    tmp_path: pathlib.Path, devices: ModelDevices, overlap: bool | str
) -> None:
    training = OnDevice(devices)
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1), overlap=overlap)
    failures = []
    for step in ckpt.steps(4):
        if step == 1:
            weight = training.model.last.weight
            (weight.data if overlap == "check" else weight.detach()).clamp_(-0.01, 0.01)
            devices.may_be_hurried.set()
        training.step()
        if step == 0:
            devices.may_be_hurried.clear()
        if step == 1:
            with pytest.raises(
                SaveFailed, match=r"model/last\.weight: changed by something else.*protect"
            ) as e:
                ckpt.wait()
            failures.append(e)
    ckpt.close()
    assert failures
    assert Run(tmp_path).steps == [2, 3, 4]


def test_protect_has_the_device_copy_first(tmp_path: pathlib.Path, devices: ModelDevices) -> None:
    training = OnDevice(devices)
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1))
    for step in ckpt.steps(3):
        if step == 1:
            holdfast.protect()
            assert devices.late == 0
            with torch.no_grad():
                training.model.last.weight.clamp_(-0.01, 0.01)
        training.step()
        if step == 0:
            expected = training.clone()
    ckpt.close()
    assert Run(tmp_path).steps == [1, 2, 3]
    check(expected, tmp_path, 1)


@pytest.mark.parametrize("how", ["captured", "capturable", "never announced"])
def test_where_steps_may_come_unannounced_nothing_is_copied_behind_them(
    tmp_path: pathlib.Path, devices: ModelDevices, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = OnDevice(devices)
    devices.captures = how == "captured"
    if how == "capturable":
        training.optimizer.param_groups[0]["capturable"] = True
        monkeypatch.setattr(torch.optim.AdamW, "step", _without_asking(torch.optim.AdamW.step))
    with Checkpointer(tmp_path, training.state, save=every(steps=1)) as ckpt:
        if how == "never announced":
            ckpt._engine._saver._fence.before_step = lambda unannounced: None
            ckpt._engine._saver._unguard()
        for _ in ckpt.steps(3):
            training.step()
            expected = training.clone()
            devices.captures = False
    assert devices.side.told == []
    check(expected, tmp_path, 3)


def _without_asking(step):
    """AdamW asserts that capturable parameters are on a real device."""

    def plain(self, closure=None):
        self.param_groups[0]["capturable"] = False
        try:
            return step.__wrapped__(self, closure)
        finally:
            self.param_groups[0]["capturable"] = True

    return torch.optim.Optimizer.profile_hook_step(plain)


def test_without_pinned_memory_all_is_copied_at_once(
    tmp_path: pathlib.Path, devices: ModelDevices, caplog: pytest.LogCaptureFixture
) -> None:
    devices.pins = False
    training = OnDevice(devices)
    with Checkpointer(tmp_path, training.state, save=every(steps=1)) as ckpt:
        for _ in ckpt.steps(2):
            training.step()
            assert devices.late == 0
            expected = training.clone()
    assert "could not be pinned" in caplog.text
    check(expected, tmp_path, 2)


def test_memory_is_pinned_as_long_as_it_is_there(tmp_path: pathlib.Path, devices: ModelDevices) -> None:
    training = OnDevice(devices)
    ckpt = Checkpointer(tmp_path, training.state, save=every(steps=1), when_busy="replace")
    for _ in ckpt.steps(4):
        training.step()
        ckpt.wait()
        # By a thread of its own; of what was mapped before it grew nothing is left.
        until(lambda: len(devices.memory) == 1, "the memory to be pinned, and no other")
    ckpt.close()
    del ckpt
    gc.collect()
    assert devices.memory == {}


def test_a_rollback_and_a_resume_go_through_pinned_memory(
    tmp_path: pathlib.Path, devices: ModelDevices
) -> None:
    training = OnDevice(devices)
    with Checkpointer(tmp_path, training.state, save=every(steps=2)) as ckpt:
        for _ in ckpt.steps(2):
            training.step()
        expected = training.clone()
        training.step()
        ckpt.restore("latest")
        assert devices.late == 0
        now = training.clone()
        assert all(torch.equal(now[part][k], v) for part in expected for k, v in expected[part].items())
    told = len(devices.main.told)
    again = OnDevice(devices)
    again.step()
    load(tmp_path, into=again.state)
    assert devices.late == 0
    assert len(devices.main.told) > told
    found = again.clone()
    assert all(torch.equal(found[part][k], v) for part in expected for k, v in expected[part].items())


def test_many_pieces_through_the_ring(devices: ModelDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_devices, "HALF_BYTES", 1000)
    sources = [torch.randn(n) for n in (1, 700, 3, 250, 0, 249, 2000, 7)] + [
        torch.randn(9, 5).t(),
        torch.arange(6.0).double(),
    ]
    targets = [torch.zeros_like(s) for s in sources[:-1]] + [torch.zeros(6)]
    devices.adopt(*[t for t in targets if t.numel()])
    torch_devices.write_to(list(zip(targets, sources, strict=True)))
    assert devices.late == 0
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(target.dtype))


def test_small_tensors_of_a_device_are_put_together_there(
    tmp_path: pathlib.Path, devices: ModelDevices
) -> None:
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(400)} | {"odd": torch.randn(6, 4).t()}
    devices.adopt(*tensors.values())
    state = {"m": tensors}
    with Checkpointer(tmp_path, state) as ckpt:
        for _ in range(3):
            for t in tensors.values():
                t.add_(1)
            before = len(devices.main.told)
            ckpt.save(tag="now")
            told = len(devices.main.told) - before
    assert told < 10
    back = load(tmp_path)["m"]
    assert all(torch.equal(back[name], t) for name, t in tensors.items())
