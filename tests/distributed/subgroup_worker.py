"""One of four ranks under gloo whose DDP groups are pairs: (0, 1) and (2, 3), each around a layer of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import holdfast


def main() -> None:
    order = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=4)
    pair = rank // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(pair)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=groups[pair])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    if order["apart"]:  # a run for each pair
        how = {"url": f"{order['run']}-{pair}", "ranks": (rank % 2, 2, 60)}
    else:
        how = {"url": order["run"], "ranks": (rank, 4, 60)}
    before = [t.clone() for t in tensors(model, optimizer)]
    with holdfast.Checkpointer(state=state, writer="thread", **how) as ckpt:
        ckpt.save()
        ckpt.wait()
        for t in tensors(model, optimizer):
            t.zero_()
        ckpt.restore()
    same = all(map(torch.equal, before, tensors(model, optimizer)))
    Path(order["out"], f"{order['name']}-{rank}.json").write_text(json.dumps({"same": same}))
    dist.barrier()


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [p.detach() for p in model.parameters()]
    return found + [t for p in model.parameters() for t in optimizer.state[p].values()]


if __name__ == "__main__":
    main()
