"""Every scheduler of torch continues with the same learning rates, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR


class Warm:
    """A callable object: its attributes are state."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return self.scale / (epoch + 1)


SCHEDULERS = {
    "LambdaLR function": lambda o: lrs.LambdaLR(o, lambda e: 0.95**e),
    "LambdaLR object": lambda o: lrs.LambdaLR(o, Warm(2.0)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 9, 1.5),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "CyclicLR function": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, scale_fn=lambda x: 0.5),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=20),
    "SWALR": lambda o: SWALR(o, 0.05, 4),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1), lrs.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1), lrs.ExponentialLR(o, 0.9)]),
    "nested": lambda o: lrs.ChainedScheduler(
        [
            lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.LambdaLR(o, lambda e: 1 / (e + 1))], [2]),
            lrs.StepLR(o, 3),
        ]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.3),
}


def make(name: str, lr: object = 0.2):
    w = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(w.parameters(), lr=lr, momentum=0.9)
    return w, optimizer, SCHEDULERS[name](optimizer)


def run(optimizer, scheduler, steps: int) -> list[object]:
    seen = []
    for i in range(steps):
        optimizer.step()
        scheduler.step(*([abs(3.0 - i)] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group["momentum"]))
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_rates_continue(name, lr, save):
    def rate():
        return torch.tensor(0.2, dtype=torch.float64) if lr == "tensor" else 0.2

    w, optimizer, scheduler = make(name, rate())
    run(optimizer, scheduler, 4)
    saved = save({"m": w, "o": optimizer, "s": scheduler})
    want = run(optimizer, scheduler, 8)
    v, live, other = make(name, rate())
    saved.into({"m": v, "o": live, "s": other})
    assert run(live, other, 8) == want


def test_every_scheduler_of_torch_is_here():
    known = {type(make(n)[2]).__name__ for n in SCHEDULERS} | {"LRScheduler"}
    exported = set(lrs.__all__)
    assert exported <= known


def test_functions_are_reported_and_objects_kept(save):
    _, _, scheduler = make("LambdaLR function")
    assert [e.path for e in save({"s": scheduler}).captured.report.ignored()] == ["s/lr_lambdas"]
    _, _, scheduler = make("LambdaLR object")
    saved = save({"s": scheduler})
    assert saved.captured.report.ignored() == []
    _, _, live = make("LambdaLR object")
    live.lr_lambdas[0].scale = 9.0
    saved.into({"s": live})
    assert live.lr_lambdas[0].scale == 2.0


def test_own_scheduler_with_a_function_attribute(save):
    class Mine(lrs.LRScheduler):
        def __init__(self, optimizer, fn):
            self.fn = fn
            self.table = {"f": fn, "n": 3}
            self.fns = [fn]
            super().__init__(optimizer)

        def get_lr(self):
            return [self.fn(self.last_epoch) for _ in self.base_lrs]

    w = torch.nn.Linear(1, 1)
    scheduler = Mine(torch.optim.SGD(w.parameters(), lr=0.1), lambda e: 0.5)
    saved = save({"s": scheduler})
    assert {e.path for e in saved.captured.report.ignored()} == {"s/fn", "s/fns", "s/table/f"}
    fn = scheduler.fn
    saved.into({"s": scheduler})
    assert scheduler.fn is fn


def test_grad_scaler(save):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    w = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(w.parameters(), lr=0.1)
    for _ in range(3):
        scaler.scale(w(torch.ones(1, 1)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    saved = save({"scaler": scaler})
    live = torch.amp.GradScaler("cpu")
    saved.into({"scaler": live})
    assert live.state_dict() == scaler.state_dict()
    assert live.get_scale() == 16.0
