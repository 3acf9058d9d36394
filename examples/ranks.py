"""Train a small network on several ranks, stop when you like, and go on with as many as you have.

    torchrun --nproc-per-node=2 examples/ranks.py --url runs/ranks
    torchrun --nproc-per-node=3 examples/ranks.py --url runs/ranks --steps 400

Each rank holds a share of the model (FSDP2). SIGTERM or Ctrl-C to any rank saves on all of them at the same step.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from holdfast import Checkpointer, ResumableSampler, best, every, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--url", default="runs/ranks", help="where the checkpoints go; every rank must reach it"
    )
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    train, test = TensorDataset(x[:1500], y[:1500]), (x[1500:], y[1500:])
    # 60 samples a step over all ranks: the same ones, in the same order, whatever their number is.
    sampler = ResumableSampler(train, batch_size=60 // world, seed=1)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    with Checkpointer(
        options.url,
        {"model": model, "optimizer": optimizer, "data": sampler},
        save=every(steps=50) | best("accuracy", mode="max"),
        keep=last(2) | best("accuracy", mode="max"),
    ) as ckpt:
        for step, batch in ckpt.steps(options.steps, data=sampler):
            inputs, labels = x[batch], y[batch]
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 25 == 0:  # on every rank in the same steps: rank 0's number decides for all
                with torch.no_grad():
                    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
                ckpt.log(loss=loss.detach(), accuracy=accuracy)
                if rank == 0:
                    print(
                        f"{world} ranks  step {step + 1}  loss {loss:.3f}  accuracy {accuracy:.1%}",
                        flush=True,
                    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
