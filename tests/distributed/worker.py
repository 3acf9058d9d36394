"""One rank of a small training run; started by the tests under torch.distributed's gloo."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import holdfast
from holdfast import every

WIDTH = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH + 1)  # 7 rows: uneven over 2 and 4
        self.norm = nn.BatchNorm1d(WIDTH + 1)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(WIDTH + 1, 3)  # 3 rows: the last of 4 ranks has none

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.drop(torch.tanh(self.norm(self.first(x)))))
        return out


def made(kind: str) -> nn.Module:
    torch.manual_seed(7)
    net = Net()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net.first)
        fully_shard(net.second)
        fully_shard(net)
    return net


def digest_of(*objects: object) -> str:
    found = hashlib.sha256()
    stack = list(objects)
    while stack:
        value = stack.pop(0)
        if isinstance(value, torch.Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            found.update(local.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            stack[:0] = [v for _, v in sorted(value.items(), key=lambda item: str(item[0]))]
        elif isinstance(value, (list, tuple)):
            stack[:0] = list(value)
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def main() -> None:
    order = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    model = made(order["kind"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    random.seed(200 + rank)
    own = {"rank": rank, "seen": torch.full((3,), float(rank))}
    state = {"model": model, "optimizer": optimizer, "own": own}
    ranks = (rank, world, order.get("seconds", 60))
    ckpt = holdfast.Checkpointer(order["run"], state, save=every(steps=2), ranks=ranks)
    losses = []
    with ckpt:
        for step in ckpt.steps(order["steps"]):
            first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            if first_time and step == order.get("kill_at", -1) and rank in order["kill"]:
                ckpt.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            x = torch.randn(5, 4)
            optimizer.zero_grad()
            loss = model(x).square().mean() + 0.01 * random.random()
            loss.backward()
            optimizer.step()
            own["seen"] += x.sum()
            losses.append(loss.item().hex())
        report = ckpt.restore_report
    params = {n: whole(p).detach().numpy() for n, p in model.named_parameters()}
    result = {
        "losses": losses,
        "digest": digest_of(
            list(model.parameters()), list(model.buffers()),
            [optimizer.state[p] for p in model.parameters()], own, torch.get_rng_state(), random.getstate(),
        ),
        "params": {n.removeprefix("module."): v.tobytes().hex() for n, v in params.items()},
        "notes": report.notes if report else None,
        "own": own["rank"],
        "drawn": torch.rand(4).tolist(),
    }  # fmt: skip
    Path(order["out"], f"{order['name']}-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of torch that are still there when the interpreter ends abort it now and then


if __name__ == "__main__":
    main()
