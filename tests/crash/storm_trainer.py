"""A small training on the CPU that is killed again and again: storm_trainer.py RUN STEPS [MIRROR MOOD].

MOOD is a file that says how the mirror is now: "ok", "down" or "full". It prints each step that it begins, each
checkpoint that was acknowledged, and at its end a digest of the weights.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

from holdfast import Checkpointer, ResumableSampler, every
from holdfast.replication import Mirror
from holdfast.stores import LocalStore
from holdfast.testing import Fault, FaultPlan, FaultStore

EVERY = 3
MOODS = {"ok": None, "down": Fault("timeout", call="*"), "full": Fault("ENOSPC")}


class Moody(FaultPlan):
    """A plan that looks up in a file what is wrong now."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def _next(self, call: str, key: str, *, changes: bool) -> Fault | None:
        super()._next(call, key, changes=changes)
        fault = MOODS[self._file.read_text()]
        return fault if fault and call != "delete" and fault.meets(call, key, changes=changes) else None


def main(run: str, steps: int, mirrors: list[Mirror]) -> None:
    torch.manual_seed(7)
    torch.set_num_threads(1)
    data = torch.randn(240, 16)
    target = data[:, :4].sum(1, keepdim=True).tanh()
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sampler = ResumableSampler(240, batch_size=16, seed=3)
    loader = sampler.loader(torch.utils.data.TensorDataset(data, target))
    ckpt = Checkpointer(
        run, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": loader},
        save=every(steps=EVERY), mirrors=mirrors, mirror_seconds=60.0,
    )  # fmt: skip
    for step, (x, y) in ckpt.steps(steps, loader):
        print("step", step, flush=True)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        if step and step % (2 * EVERY) == 0:
            ckpt.wait()
            print("acknowledged", step // EVERY * EVERY, flush=True)
    ckpt.close()
    whole = hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
    print("weights", whole, flush=True)


if __name__ == "__main__":
    found = []
    if len(sys.argv) > 3:
        mirror, mood = map(Path, sys.argv[3:])
        found = [Mirror(FaultStore(LocalStore(mirror), Moody(mood)))]
    main(sys.argv[1], int(sys.argv[2]), found)
