"""Programs as users of three frameworks write them, on two ranks in one launch. None knows of holdfast but by the
`with` around it. Each leaves what the tests look at."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from script import Net, digests_of
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

OUT = Path(sys.argv[1])


def standing_in(name: str) -> Any:
    from holdfast import last
    from holdfast.integrations.dcp import in_place_of_files

    return in_place_of_files(OUT / name, keep=last(2))


def sharded(net: Net, mesh: Any = None) -> Net:
    for layer in (net.frozen, net.first, net.second, net):
        fully_shard(layer, mesh=mesh)
    return net


def learning(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


# ---- a loop that passes nothing but a checkpoint_id, as torchtitan does --------------------------------------------


class ModelWrapper(Stateful):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=False))


class OptimizersContainer(Stateful):
    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(learning(model), lr=0.05)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.flat)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state, options=self.flat)


class TrainState(Stateful):
    def __init__(self) -> None:
        self.step, self.losses = 0, [0.0]

    def state_dict(self) -> dict[str, Any]:
        losses = io.BytesIO()
        torch.save(self.losses, losses)
        return {"step": torch.tensor(self.step, dtype=torch.int32), "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        state["losses"].seek(0)
        self.losses = torch.load(state["losses"], weights_only=True)


class Manager:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(3)
        self.folder = folder
        self.model = sharded(Net())
        self.optimizers = OptimizersContainer(self.model)
        self.train_state = TrainState()
        self.states = {
            "model": ModelWrapper(self.model),
            "optimizer": self.optimizers,
            "train_state": self.train_state,
        }

    def path(self, step: int) -> str:
        return os.path.join(self.folder, f"step-{step}")

    def train(self) -> None:
        step_with(self.model, self.optimizers.optimizer)
        self.train_state.step += 1
        self.train_state.losses.append(self.train_state.step / 7)

    def newest(self) -> int:
        found = [re.fullmatch(r"step-(\d+)", name) for name in os.listdir(self.folder)]
        return max(int(m[1]) for m in found if m and os.path.isfile(self.folder / m[0] / ".metadata"))

    def load(self, step: int) -> dict[str, str]:
        dcp.load(self.states, checkpoint_id=self.path(step))
        return self.digests()

    def digests(self) -> dict[str, str]:
        state = {key: one.state_dict() for key, one in self.states.items()}
        return digests_of("", {**state, "train_state": [self.train_state.step, self.train_state.losses]})


def step_with(
    model: nn.Module, optimizer: Any, backward: Callable[[torch.Tensor], Any] | None = None
) -> None:
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward() if backward is None else backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def said(act: Callable[[], object]) -> str:
    try:
        act()
    except BaseException as e:  # noqa: BLE001 - whatever it is, it is looked at by the test
        return f"{type(e).__name__}: {e}"
    return ""


def bare_ids(out: dict[str, Any]) -> None:
    folder = OUT / "outputs" / "checkpoint"
    manager = Manager(folder)
    manager.train()
    out["files"] = manager.digests()
    dcp.save(manager.states, checkpoint_id=manager.path(0))  # as it was before anybody knew of holdfast
    for step in (1, 2, 3):
        manager.train()
        out[str(step)] = manager.digests()
        with standing_in("titan"):
            if step == 1:
                dcp.save(manager.states, checkpoint_id=manager.path(step))
                continue
            kind = AsyncCheckpointerType.THREAD if step == 2 else AsyncCheckpointerType.PROCESS
            behind = dcp.async_save(
                manager.states,
                checkpoint_id=manager.path(step),
                process_group=dist.new_group(backend="gloo"),
                async_checkpointer_type=kind,
            )
        behind.result()  # it goes into the run though nobody stands in any more
    out["newest"] = manager.newest()
    again = Manager(folder)
    with standing_in("titan"):
        out["resumed"] = again.load(manager.newest())
        out["switched over"] = Manager(folder).load(0)
        again.train()
        out["4"] = again.digests()
        dcp.save(again.states, storage_writer=FileSystemWriter(again.path(4), True, thread_count=2))
        out["gone"] = said(lambda: Manager(folder).load(1))
        other = Manager(folder)
        dcp.load(other.states, storage_reader=FileSystemReader(path=other.path(4)))
        out["by class"] = other.digests()
    with standing_in("other"):
        dcp.save(again.states, checkpoint_id=again.path(0))  # where the files of the first save still are
        out["both"] = Manager(folder).load(0)
    with standing_in("other" if dist.get_rank() == 0 else "elsewhere"):
        out["disagree"] = said(lambda: Manager(folder).load(0))


# ---- Accelerate ------------------------------------------------------------------------------------------------------


def accelerate(out: dict[str, Any]) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, merge_fsdp_weights

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="no_wrap",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate leaves FSDP out where there is no accelerator; all that follows is its own code.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    torch.manual_seed(5)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(learning(net), lr=0.05))
    out["is sharded"] = accelerator.is_fsdp2 and type(next(model.parameters())).__name__

    def digests() -> dict[str, str]:
        state = {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer.optimizer)}
        return digests_of("", state)

    with standing_in("accelerate"):
        for number in (2, 3, 4):
            step_with(model, optimizer, accelerator.backward)
            out[str(number)] = digests()
            accelerator.save_state(OUT / f"out/checkpoint_{number}")
        step_with(model, optimizer, accelerator.backward)
        out["before"] = digests()
        accelerator.load_state(OUT / "out/checkpoint_3")
        out["loaded"] = digests()
        merge_fsdp_weights(str(OUT / "out/checkpoint_3/pytorch_model_fsdp_0"), str(OUT / "merged"))
        out["no step"] = said(lambda: accelerator.save_state(OUT / "out/final"))


# ---- Lightning -------------------------------------------------------------------------------------------------------


def lightning(out: dict[str, Any]) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    strategy = ModelParallelStrategy(
        lambda net, mesh: sharded(net, mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(7)
    model = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(learning(model), lr=0.05))
    state = {"model": model, "optim": optimizer, "epoch": 3}

    def digests() -> dict[str, str]:
        both = {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer.optimizer)}
        return digests_of("", both)

    old, new = (OUT / f"version_0/epoch={e}-step={e}000.ckpt" for e in (1, 2))
    step_with(model, optimizer, fabric.backward)
    fabric.save(old, state)
    out["old"] = digests()
    with standing_in("lightning"):
        step_with(model, optimizer, fabric.backward)
        out["new"] = digests()
        fabric.save(new, state)
        step_with(model, optimizer, fabric.backward)
        state["epoch"] = 0
        fabric.load(new, state)
        out["loaded"], out["epoch"] = digests(), state["epoch"]
        out["consolidated"] = digests_of("m", _load_distributed_checkpoint(new)["model"])
        fabric.load(old, state)
        out["switched over"] = digests()


@contextlib.contextmanager
def leaving(name: str) -> Iterator[dict[str, Any]]:
    out: dict[str, Any] = {}
    yield out
    dist.barrier()
    (OUT / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(out))


def main() -> None:
    warnings.filterwarnings("ignore")
    dist.init_process_group("cpu:gloo")
    for scenario in (bare_ids, accelerate, lightning):
        with leaving(scenario.__name__) as out:
            scenario(out)
    dist.barrier()
    os._exit(0)  # DCP's process is a daemon of this one, and torch's groups warn on their way out


if __name__ == "__main__":
    main()
