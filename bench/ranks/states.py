"""What several ranks save: each holds a share of every tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from bench.states import VOCABULARY, Subject, Training, held, language_model


def sharded(quick: bool, device: str = "cpu") -> Subject:
    """2.1 GB in all: weights and both moments of a transformer under FSDP2, fp32."""
    width, layers = (128, 2) if quick else (1024, 14)
    with torch.device("meta"):  # the whole model is never in the memory of one rank
        model = language_model(width, layers)
    mesh = _mesh(device)
    for module in (*(m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)), model):
        fully_shard(module, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for p in model.parameters():
            held(p).normal_(std=0.02)
    return Training(model, torch.randint(0, VOCABULARY, (1, 17), device=device))


def small(quick: bool, device: str = "cpu") -> Subject:
    """Very many tensors, of each of which every rank holds 64 floats."""
    mesh = _mesh(device)
    count = 500 if quick else 20_000
    parts = [torch.randn(64, device=device) for _ in range(count)]
    made = [DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in parts]
    return Subject({"model": {f"layer{i}.weight": t for i, t in enumerate(made)}})


def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))
