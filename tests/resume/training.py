"""A small training run with everything that can go wrong on a resume: BatchNorm, dropout, augmentation in workers,
momentum, schedules, loss scaling with skipped steps, accumulation windows."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from holdfast import Checkpointer, ResumableSampler, at, on

SAMPLES, BATCH, STEPS_PER_EPOCH, TOTAL = 48, 4, 12, 26
SAVE_AT = [5, 9, 12, 24]


@dataclasses.dataclass(frozen=True)
class Case:
    optimizer: str
    scheduler: str
    scaler: bool
    accumulate: int
    workers: int

    def __str__(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self))


OPTIMIZERS = ["sgd", "adamw", "adamw-bf16", "adamw-fused"]
SCHEDULERS = ["step", "onecycle", "sequential", "plateau"]


def cases(optimizer: str, scheduler: str) -> Iterator[Case]:
    for scaler, accumulate, workers in itertools.product([False, True], [1, 4], [0, 2]):
        yield Case(optimizer, scheduler, scaler, accumulate, workers)


class Noisy(torch.utils.data.Dataset):
    """Sixteen numbers and a label; each draw is augmented from three generators."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.x = torch.randn(SAMPLES, 1, 4, 4, generator=g)
        self.y = torch.randint(0, 3, (SAMPLES,), generator=g)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[i] + 0.1 * torch.randn(1, 4, 4) + random.gauss(0, 0.1) + float(np.random.normal(0, 0.1))
        return x, self.y[i]


class Training:
    """One process's share of a run."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(1)
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        self.case = case
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip
        if case.optimizer == "adamw-bf16":
            self.model.to(torch.bfloat16)
        self.optimizer = self._optimizer()
        self.scheduler: Any = self._scheduler()
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=3) if case.scaler else None
        )
        options = {"persistent_workers": True, "prefetch_factor": 2} if case.workers else {}
        self.loader = ResumableSampler(Noisy(), batch_size=BATCH, seed=11).loader(
            num_workers=case.workers, **options
        )
        self.losses: dict[int, str] = {}
        self.skipped = 0

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.case.optimizer == "sgd":
            return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        fused = self.case.optimizer == "adamw-fused"
        return torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=fused or None, foreach=not fused)

    def _scheduler(self) -> object:
        lr = torch.optim.lr_scheduler
        kinds = {
            "step": lambda: lr.StepLR(self.optimizer, 3, 0.7),
            "onecycle": lambda: lr.OneCycleLR(self.optimizer, max_lr=0.1, total_steps=64),
            "sequential": lambda: lr.SequentialLR(
                self.optimizer,
                [lr.LinearLR(self.optimizer, 0.1, total_iters=4), lr.CosineAnnealingLR(self.optimizer, 20)],
                [4],
            ),
            "plateau": lambda: lr.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=1, cooldown=1),
        }
        return kinds[self.case.scheduler]()

    @property
    def state(self) -> dict[str, object]:
        held = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.loader,
        }
        return held | ({"scaler": self.scaler} if self.scaler is not None else {})

    def step(self, number: int, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        x = x.to(next(self.model.parameters()).dtype)
        half = torch.bfloat16 if self.case.optimizer == "adamw-bf16" else torch.float16
        with torch.autocast("cpu", dtype=half, enabled=self.scaler is not None):
            loss = nn.functional.cross_entropy(self.model(x).float(), y) / self.case.accumulate
        if number in (6, 14) and self.scaler is not None:
            loss = loss * 1e36  # overflows, so that the scaler skips the step
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        if (number + 1) % self.case.accumulate == 0:
            self._update(loss)
        self.losses[number] = loss.item().hex()
        return loss

    def _update(self, loss: torch.Tensor) -> None:
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < before
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.case.scheduler == "plateau":
            self.scheduler.step(loss.item())
        else:
            self.scheduler.step()

    def fingerprint(self) -> dict[str, str]:
        """Digests of everything a run is, made without any code of holdfast."""
        found = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "gradients": [p.grad for p in self.model.parameters()],
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        return {name: digest(value) for name, value in found.items()}


def digest(value: object) -> str:
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()[:16]


def _feed(hasher: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
        hasher.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        hasher.update(value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            hasher.update(repr(key).encode())
            _feed(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(hasher, item)
        hasher.update(b"]")
    elif isinstance(value, float):
        hasher.update(value.hex().encode())
    else:
        hasher.update(repr(value).encode())


def run(
    case: Case,
    url: str | None,
    until: int,
    *,
    which: int | None = None,
    weights_only: bool = False,
    passing: int | None = None,
) -> dict[str, object]:
    """Train up to a step, from a checkpoint if there is one; return fingerprint, losses, the number of skipped steps, and
    the fingerprint of a step that an untouched run passes on its way."""
    t = Training(case)
    passed = None
    if url is None:  # without holdfast: the run that nothing ever touched
        iterator = itertools.chain.from_iterable(iter(t.loader) for _ in itertools.count())
        for number in range(until):
            if number == passing:
                passed = t.fingerprint()
            t.step(number, next(iterator))
    else:
        ckpt = Checkpointer(url, t.state, save=at(SAVE_AT) | on("start"))
        if weights_only and which is not None:
            ckpt.restore(which, only=["model", "data"])
            for _, (number, batch) in zip(
                range(until - which), enumerate(_forever(t.loader), which), strict=False
            ):
                t.step(number, batch)
        else:
            if which is not None:
                ckpt.restore(which)
            for number, batch in ckpt.steps(until, data=t.loader):
                t.step(number, batch)
        ckpt.close()
    return {"fingerprint": t.fingerprint(), "losses": t.losses, "skipped": t.skipped, "passed": passed}


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
