"""A training that a scheduler starts, signals and starts again: `trainer.py <run> <log> <steps> [<seconds a step>]`.

Each line of the log is a finished step with its loss, exact, so that what several lives write together can be compared
with what one life writes. Under torchrun each rank has a log of its own, with DDP between them.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import holdfast
from holdfast import every


def main() -> None:
    run, log, steps, *pace = sys.argv[1:]
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(7)
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    random.seed(rank)
    np.random.seed(rank)
    state = {"model": model, "optimizer": optimizer}
    with (
        Path(f"{log}-{rank}").open("a") as out,
        holdfast.Checkpointer(run, state, save=every(steps=1_000_000), deadline_seconds=20) as ckpt,
    ):
        for step in ckpt.steps(int(steps)):
            loss = model(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.write(f"{step} {loss.item().hex()}\n")
            out.flush()
            time.sleep(float(pace[0]) if pace else 0.0)
    if dist.is_initialized():
        dist.destroy_process_group()
        os._exit(0)  # threads of torch that are still there when the interpreter ends abort it now and then


if __name__ == "__main__":
    main()
