"""A training script that uses torch.distributed.checkpoint, as any does. Only `storage` knows which storage objects it
is given; run by the tests under torchrun, once for each of them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ROWS = 7  # uneven over 2 and 3
FROZEN = 300


def storage(kind: str, place: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    if kind == "files":
        return lambda: dcp.FileSystemWriter(place), lambda: dcp.FileSystemReader(place)
    from holdfast import last
    from holdfast.integrations.dcp import HoldfastReader, HoldfastWriter

    return lambda: HoldfastWriter(place, keep=last(3)), lambda: HoldfastReader(place)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FROZEN, FROZEN)
        self.first = nn.Linear(4, ROWS)
        self.norm = nn.BatchNorm1d(ROWS)
        self.second = nn.Linear(ROWS, 2)  # 2 rows: the last of 3 ranks has none
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return out


class App:
    """What torch's tutorials call the application state: it is saved and loaded through these two."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.epoch, self.history = model, optimizer, 0, (1, 2.5, "a")

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "epoch": self.epoch, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        self.epoch, self.history = state["epoch"], state["history"]


def made() -> App:
    torch.manual_seed(3)
    net = Net()
    for layer in (net.frozen, net.first, net.second, net):
        fully_shard(layer)
    learning = [p for p in net.parameters() if p.requires_grad]
    return App(net, torch.optim.AdamW(learning, lr=0.05))


def train(app: App, step: int) -> None:
    torch.manual_seed(1000 + step)
    loss = app.model(torch.randn(8, 4)).square().mean()
    app.optimizer.zero_grad()
    loss.backward()
    app.optimizer.step()
    app.epoch += 1


def digests(app: App) -> dict[str, str]:
    return digests_of("app", app.state_dict())


def digests_of(name: str, state: Any) -> dict[str, str]:
    """Return digests of the whole tensors, and the values, by key."""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[path] = f"{value.dtype}{list(value.shape)} {hashlib.sha256(data).hexdigest()}"
        elif isinstance(value, dict):
            for key, inside in sorted(value.items()):
                walk(f"{path}.{key}", inside)
        else:
            found[path] = repr(value)

    walk(name, state)
    return found


def save_all(app: App, writer: Callable[[], Any], root: str, out: dict[str, Any]) -> None:
    """Save three times: at once, behind a thread, behind a process."""
    train(app, 1)
    out["1"] = digests(app)
    dcp.save({"app": app}, checkpoint_id=f"{root}/step-1", storage_writer=writer())
    train(app, 2)
    out["2"] = digests(app)
    behind = dcp.async_save({"app": app}, checkpoint_id=f"{root}/step-2", storage_writer=writer())
    behind.result()
    train(app, 3)
    out["3"] = digests(app)
    behind = dcp.async_save(
        {"app": app},
        checkpoint_id=f"{root}/step-3",
        storage_writer=writer(),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    behind.result()


def fail(app: App, writer: Callable[[], Any], place: str, out: dict[str, Any]) -> None:
    """Have one rank fail to write, then one value be refused, then save as if nothing had been."""
    from holdfast.integrations.dcp import HoldfastWriter
    from holdfast.stores import open_store
    from holdfast.testing import Fault, FaultPlan, FaultStore

    store = open_store(place)
    if dist.get_rank() == 1:
        store = FaultStore(store, FaultPlan(Fault("ENOSPC", when="torn", call="write_streams")))
    train(app, 4)
    for name, state in (("full", {"app": app}), ("refused", {"app": app, "loader": {"fn": len}})):
        try:
            dcp.save(state, checkpoint_id="step-4", storage_writer=HoldfastWriter(store))
            out[name] = ""
        except BaseException as e:  # noqa: BLE001 - whatever it is, it is looked at by the test
            out[name] = f"{type(e).__name__}: {e}"
        dist.barrier()
        out[f"steps after {name}"] = sorted(p.name for p in Path(place, "checkpoints").iterdir())
    dcp.save({"app": app}, checkpoint_id="step-5", storage_writer=writer())
    out["5"] = digests(app)


def main() -> None:
    order = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    dist.init_process_group("cpu:gloo")
    out: dict[str, Any] = {}
    app = made()
    for kind, place in order["places"].items():
        writer, reader = storage(kind, place)
        found = out[kind] = {}
        if order["do"] == "save":
            app = made()
            save_all(app, writer, place, found)
            if kind == "holdfast":
                fail(app, writer, place, found)
        else:
            app = made()
            train(app, 9)
            found["before"] = digests(app)
            for step in order["steps"]:
                app = made()
                train(app, 9)
                dcp.load({"app": app}, checkpoint_id=f"{place}/step-{step}", storage_reader=reader())
                found[str(step)] = digests(app)
    Path(order["out"], f"{order['name']}-{dist.get_rank()}.json").write_text(json.dumps(out))
    dist.barrier()
    os._exit(0)  # DCP's process is a daemon of this one, and torch's groups warn on their way out


if __name__ == "__main__":
    main()
