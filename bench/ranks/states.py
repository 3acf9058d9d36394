"""What several ranks save: each holds a share of every tensor."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from bench.states import State, Subject


class Shared(Subject):
    """A state of DTensors, spread over the ranks, and how it changes."""

    def __init__(self, state: State) -> None:
        super().__init__(state)

    def local(self) -> State:
        """What this rank holds of them, nothing copied."""
        return {p: {n: held(t) for n, t in of.items()} for p, of in self.tensors().items()}

    def nbytes(self, *parts: str) -> int:
        """Bytes that this rank holds."""
        local = self.local()
        return sum(t.nbytes for part in parts or tuple(local) for t in local[part].values())

    def change(self) -> None:
        """Give every tensor a new value, in place."""
        with torch.no_grad():
            torch._foreach_add_([t for of in self.local().values() for t in of.values()], 1e-3)

    def work(self) -> None:
        """Do what a training step does before its optimizer's step, where there is something to train."""

    def step(self) -> float:
        """Change the state as training does; return when, on `time.perf_counter`, nothing held that up any more."""
        started = time.perf_counter()
        self.change()
        return started


class Sharded(Shared):
    """A transformer under FSDP2 with AdamW."""

    def __init__(self, width: int, layers: int, device: str) -> None:
        super().__init__({})
        vocabulary = 2048
        with torch.device("meta"):  # the whole model is never in the memory of one rank
            layer = nn.TransformerEncoderLayer(
                width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.model = nn.Sequential(nn.Embedding(vocabulary, width), encoder, nn.Linear(width, vocabulary))
        mesh = _mesh(device)
        for module in (*encoder.layers, self.model):
            fully_shard(module, mesh=mesh)
        self.model.to_empty(device=device)
        torch.manual_seed(dist.get_rank())
        with torch.no_grad():
            for p in self.model.parameters():
                held(p).normal_(std=0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self._batch = torch.randint(0, vocabulary, (1, 17), device=device)
        self.work()
        self.optimizer.step()  # the optimizer's state exists from its first step on
        self.optimizer.zero_grad()

    @property
    def live(self) -> Mapping[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> State:
        named = dict(self.model.named_parameters())
        moments = {
            key: {name: self.optimizer.state[p][key] for name, p in named.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }
        return {"model": {name: p.detach() for name, p in named.items()}, **moments}

    def work(self) -> None:
        self.optimizer.zero_grad()
        logits = self.model(self._batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), self._batch[:, 1:].flatten()).backward()

    def step(self) -> float:
        marks: list[float] = []
        last_hook = self.optimizer.register_step_pre_hook(lambda *_: marks.append(time.perf_counter()))
        self.optimizer.step()
        last_hook.remove()
        self.optimizer.zero_grad()
        return marks[0]


def sharded(quick: bool, device: str = "cpu") -> Shared:
    """2.1 GB in all: weights and both moments of a transformer, fp32."""
    return Sharded(128, 2, device) if quick else Sharded(1024, 14, device)


def small(quick: bool, device: str = "cpu") -> Shared:
    """Very many tensors, of each of which every rank holds 64 floats."""
    mesh = _mesh(device)
    count = 500 if quick else 20_000
    parts = [torch.randn(64, device=device) for _ in range(count)]
    made = [DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in parts]
    return Shared({"model": {f"layer{i}.weight": t for i, t in enumerate(made)}})


def held(t: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: the very memory."""
    return t._local_tensor if isinstance(t, DTensor) else t


def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))
