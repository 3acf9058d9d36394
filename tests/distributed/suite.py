"""Scenarios that four ranks under torchrun play one after the other, in one launch: a process that imports torch costs
more than all that is tried here. Each leaves a JSON file that the tests look at."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import holdfast
from distributed.counting import Counting
from holdfast import every
from holdfast.stores import open_store

RANK = int(os.environ["RANK"])
OUT = Path(sys.argv[1])


class Net(nn.Module):
    """Sizes that no number of ranks divides; the three rows of the last leave the fourth of four ranks none."""

    def __init__(self, seed: int, first: bool = True, second: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = {
            "a": nn.Linear(6, 10), "b": nn.Linear(10, 7), "norm": nn.LayerNorm(7), "c": nn.Linear(7, 3),
        }  # fmt: skip
        kept = (["a", "b"] if first else []) + (["norm", "c"] if second else [])
        self.layers = nn.ModuleDict({name: layers[name] for name in kept})
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


MESHES: dict[tuple[Any, ...], DeviceMesh] = {}
SHAPES = {
    "dp": [(1,), (2,), (3,), (4,)], "tp": [(2,)], "replicate shard": [(2, 2)], "dp tp": [(2, 2)], "pp dp": [(2, 2)],
    "x y": [(2, 2)], "r s": [(2, 2)], "x y z": [(2, 1, 2), (1, 2, 2)],
}  # fmt: skip


def make_meshes() -> None:
    """Making a mesh is a collective of all ranks, also of those that are not in it."""
    for names, shapes in SHAPES.items():
        for shape in shapes:
            size = 1
            for n in shape:
                size *= n
            ranks = torch.arange(size).reshape(shape)
            MESHES[names, *shape] = DeviceMesh("cpu", ranks, mesh_dim_names=tuple(names.split()))
    MESHES["pair",] = DeviceMesh("cpu", [1, 3])


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return MESHES[" ".join(names), *shape]


def sharded(net: Net, mesh: DeviceMesh) -> Net:
    for layer in net.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


PLAN = {"layers.a": ColwiseParallel(), "layers.b": RowwiseParallel()}


def plain(seed: int) -> nn.Module:
    return Net(seed)


def ddp(n: int) -> Callable[[int], nn.Module]:
    return lambda seed: nn.parallel.DistributedDataParallel(Net(seed), process_group=GROUPS[n])


def fsdp(n: int) -> Callable[[int], nn.Module]:
    return lambda seed: sharded(Net(seed), mesh_of((n,), ("dp",)))


def hsdp(seed: int) -> nn.Module:
    return sharded(Net(seed), mesh_of((2, 2), ("replicate", "shard")))


def tensor_parallel(seed: int) -> nn.Module:
    net = Net(seed)
    parallelize_module(net, mesh_of((2,), ("tp",)), PLAN)
    return net


def two_d(seed: int) -> nn.Module:
    net = Net(seed)
    mesh = mesh_of((2, 2), ("dp", "tp"))
    parallelize_module(net, mesh["tp"], PLAN)
    return sharded(net, mesh["dp"])


def pipeline(seed: int) -> nn.Module:
    return Net(seed, first=RANK == 0, second=RANK == 1)


def pipeline_of_shards(seed: int) -> nn.Module:
    stage = RANK // 2
    net = Net(seed, first=stage == 0, second=stage == 1)
    mesh = mesh_of((2, 2), ("pp", "dp"))
    return sharded(net, mesh["dp"])


LAYOUTS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "plain": (1, plain),
    "ddp-2": (2, ddp(2)),
    "ddp-3": (3, ddp(3)),
    "fsdp-1": (1, fsdp(1)),
    "fsdp-2": (2, fsdp(2)),
    "fsdp-3": (3, fsdp(3)),
    "fsdp-4": (4, fsdp(4)),
    "hsdp-4": (4, hsdp),
    "tp-2": (2, tensor_parallel),
    "2d-4": (4, two_d),
    "pp-2": (2, pipeline),
    "pp-fsdp-4": (4, pipeline_of_shards),
}
ROLLBACK = ("fsdp-4", "hsdp-4", "ddp-3", "tp-2")
EXACT = ("ddp-2", "fsdp-3", "hsdp-4", "2d-4", "pp-fsdp-4", "tp-2")
GROUPS: dict[int, Any] = {}


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()


def raw(t: torch.Tensor) -> str:
    return hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """A digest of every parameter and moment as a whole, by name."""
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = raw(whole(p))
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            found[f"{name}:{key}"] = raw(whole(value))
    return found


def local(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    for p in [*model.parameters(), *model.buffers()]:
        for t in [p, *optimizer.state.get(p, {}).values()]:
            found.update(
                (t.to_local() if isinstance(t, DTensor) else t).detach().contiguous().numpy().tobytes()
            )
    return found.hexdigest()


def made(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = LAYOUTS[layout][1](seed)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def data_rank(layout: str) -> int:
    """Which share of the data this rank sees: ranks of one tensor-parallel group see the same."""
    return {"tp-2": 0, "2d-4": RANK // 2}.get(layout, RANK)


def train_step(layout: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step. Stages of a pipeline each train alone here: how they pass activations on is not our concern."""
    stage = 1 if layout.startswith("pp") and (RANK if layout == "pp-2" else RANK // 2) else 0
    x = torch.randn(4, 7 if stage else 6)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def checkpointer(
    url: Any, layout: str, model: nn.Module, optimizer: Any, **more: Any
) -> holdfast.Checkpointer:
    world = LAYOUTS[layout][0]
    state = {"model": model, "optimizer": optimizer}
    return holdfast.Checkpointer(url, state, ranks=(RANK, world, 60), writer="thread", **more)


def tell(name: str, **found: object) -> None:
    (OUT / f"{name}-{RANK}.json").write_text(json.dumps(found))


def scenario_layouts() -> None:
    """Every layout saves; every other restores that."""
    for layout, (world, _) in LAYOUTS.items():
        if world > RANK:
            model, optimizer = made(layout, 7)
            torch.manual_seed(50 + data_rank(layout))
            with checkpointer(str(OUT / layout), layout, model, optimizer, save=every(steps=100)) as ckpt:
                for _ in ckpt.steps(2):
                    train_step(layout, model, optimizer)
            tell(f"saved-{layout}", **contents(model, optimizer))
        dist.barrier()
    for source in LAYOUTS:
        for layout, (world, _) in LAYOUTS.items():
            if world > RANK:
                model, optimizer = made(layout, 8)
                failed = ""
                try:
                    with checkpointer(
                        str(OUT / source), layout, model, optimizer, save=every(steps=100)
                    ) as ckpt:
                        ckpt.restore()
                        notes = ckpt.restore_report.notes if ckpt.restore_report else []
                except Exception:  # noqa: BLE001 - told to the test
                    failed, notes = traceback.format_exc(), []
                found = contents(model, optimizer) if not failed else {}
                tell(f"{source}-to-{layout}", failed=failed, found=found, notes=notes)
            dist.barrier()


def scenario_exact() -> None:
    """What is resumed at the same layout goes on as if nothing had been."""
    for layout in EXACT:
        world = LAYOUTS[layout][0]
        if world > RANK:
            runs = {}
            for name, stops in (("whole", [6]), ("cut", [3, 6])):
                losses = []
                for number, stop in enumerate(stops):
                    model, optimizer = made(layout, 7 + 10 * number)
                    torch.manual_seed(60 + data_rank(layout))
                    url = str(OUT / f"exact-{layout}-{name}")
                    with checkpointer(url, layout, model, optimizer, save=every(steps=3)) as ckpt:
                        for _ in ckpt.steps(stop):
                            losses.append(train_step(layout, model, optimizer).hex())
                runs[name] = [losses, local(model, optimizer), torch.rand(3).tolist()]
            tell(f"exact-{layout}", **runs)
        dist.barrier()


def scenario_accumulation() -> None:
    """A run that is cut in the middle of an accumulation of gradients goes on with them, in whichever layout."""
    for source, layout in (("fsdp-2", "fsdp-2"), ("ddp-2", "fsdp-2"), ("fsdp-2", "ddp-2")):
        if RANK < 2:
            found = {}
            for name, parts in (("whole", [(source, 9)]), ("cut", [(source, 4), (layout, 9)])):
                for number, (kind, stop) in enumerate(parts):
                    model, optimizer = made(kind, 7 + number)
                    torch.manual_seed(60 + RANK)
                    url = str(OUT / f"accumulation-{source}-{layout}-{name}")
                    with checkpointer(url, kind, model, optimizer, save=every(steps=2)) as ckpt:
                        for step in ckpt.steps(stop):
                            if step == 4:
                                found[f"{name}-gradients"] = [
                                    raw(whole(p.grad)) for p in model.parameters() if p.grad is not None
                                ]
                            model(torch.randn(4, 6)).square().mean().backward()
                            if step % 3 == 2:
                                optimizer.step()
                                optimizer.zero_grad()
                found[name] = contents(model, optimizer)
            tell(f"accumulation-{source}-{layout}", **found)
        dist.barrier()


def scenario_amplification() -> None:
    """What is read of a large model is what is needed."""
    for source, layout in (
        ("fsdp-4", "fsdp-4"),
        ("fsdp-4", "fsdp-2"),
        ("fsdp-2", "fsdp-4"),
        ("hsdp-4", "fsdp-4"),
    ):
        found = {}
        for which, seed, _ in ((source, 1, 1), (layout, 2, 1)):
            world = LAYOUTS[which][0]
            if world > RANK:
                torch.manual_seed(seed)
                mesh = mesh_of((2, 2), ("r", "s")) if which.startswith("hsdp") else mesh_of((world,), ("dp",))
                model = nn.Linear(1024, 4096, bias=False)
                fully_shard(model, mesh=mesh)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                counting = Counting(open_store(str(OUT / f"wide-{source}-{layout}")))
                with checkpointer(counting, which, model, optimizer, save=every(steps=100)) as ckpt:
                    if seed == 1:
                        ckpt.save()
                    else:
                        counting.read_data = 0
                        ckpt.restore()
                        found["read"] = counting.read_data
                        found["needed"] = model.weight.to_local().nbytes
                found[f"digest-{seed}"] = raw(model.weight.full_tensor())
            dist.barrier()
        tell(f"read-{source}-{layout}", **found)


def scenario_rollback() -> None:
    """What a rank has just saved itself it takes back from its memory; the rest it reads."""
    for layout in ROLLBACK:
        if LAYOUTS[layout][0] > RANK:
            model, optimizer = made(layout, 7)
            counting = Counting(open_store(str(OUT / f"rollback-{layout}")))
            with checkpointer(counting, layout, model, optimizer, save=every(steps=100)) as ckpt:
                for _ in range(2):
                    train_step(layout, model, optimizer)
                    ckpt.step_end()
                ckpt.save()
                ckpt.wait()
                saved = local(model, optimizer)
                train_step(layout, model, optimizer)
                changed, counting.read_data = local(model, optimizer), 0
                ckpt.restore()
                found, read = local(model, optimizer), counting.read_data
                train_step(layout, model, optimizer)
                ckpt.restore(from_memory=False)
                tell(
                    f"rollback-{layout}",
                    saved=saved,
                    changed=changed,
                    found=[found, local(model, optimizer)],
                    read=[read, counting.read_data - read],
                )
        dist.barrier()


def scenario_boxes() -> None:
    """The boxes of any placements are what this rank holds."""
    from torch.distributed.tensor.placement_types import _StridedShard

    from holdfast.state.adapters.torch_distributed import held_boxes

    mesh = mesh_of((2, 2), ("x", "y"))
    wrong = []
    placements = [
        [Shard(0), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(1), Shard(1)],
        [Replicate(), Shard(0)], [Shard(1), Replicate()], [Replicate(), Replicate()],
        [_StridedShard(0, split_factor=2), Shard(0)], [_StridedShard(0, split_factor=2), Replicate()],
        [_StridedShard(1, split_factor=2), Shard(1)], [_StridedShard(1, split_factor=3), Replicate()],
    ]  # fmt: skip
    for shape in ((8, 8), (7, 5), (12, 9), (3, 1), (1, 6), (5, 4)):
        full = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
        for given in placements:
            try:
                d = distribute_tensor(full, mesh, given)
            except Exception:  # noqa: BLE001 - torch itself does not make these
                continue
            boxes, _ = held_boxes(d)
            there = sum(b.value.numel() for b in boxes)
            for b in boxes:
                cut = full[tuple(slice(o, o + n) for o, n in zip(b.offsets, b.shape, strict=True))]
                if not torch.equal(cut, b.value):
                    wrong.append([list(shape), str(given), list(b.offsets), list(b.shape)])
            if there != d.to_local().numel():
                wrong.append([list(shape), str(given), there])
    for shape3 in ((2, 1, 2), (1, 2, 2)):
        mesh = mesh_of(shape3, ("x", "y", "z"))
        full = torch.arange(5 * 6 * 7, dtype=torch.float32).reshape(5, 6, 7)
        for given in (
            [Shard(0), Shard(1), Shard(2)], [Shard(2), Replicate(), Shard(0)], [Replicate(), Shard(1), Shard(1)],
            [Shard(0), Shard(0), Shard(0)], [_StridedShard(1, split_factor=shape3[2]), Replicate(), Shard(1)],
        ):  # fmt: skip
            try:
                d = distribute_tensor(full, mesh, given)
            except AssertionError:  # torch itself does not cut so
                continue
            boxes, _ = held_boxes(d)
            for b in boxes:
                cut = full[tuple(slice(o, o + n) for o, n in zip(b.offsets, b.shape, strict=True))]
                if not torch.equal(cut, b.value):
                    wrong.append([list(shape3), str(given), list(b.offsets), list(b.shape)])
            if sum(b.value.numel() for b in boxes) != d.to_local().numel():
                wrong.append([list(shape3), str(given)])
    tell("boxes", wrong=wrong)


def scenario_optimizers() -> None:
    """Stages of a pipeline with two optimizers each; then one process that has both stages."""

    def state_of(layout: str, seed: int) -> dict[str, Any]:
        model = LAYOUTS[layout][1](seed)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        return {
            "model": model,
            "matrices": torch.optim.SGD(matrices, lr=0.1, momentum=0.9),
            "others": torch.optim.AdamW(others, lr=0.01),
        }

    def told_of(state: dict[str, Any]) -> dict[str, str]:
        return contents(state["model"], state["matrices"]) | contents(state["model"], state["others"])

    found = {}
    for name, layout, seed in (
        ("saved", "pp-2", 7),
        ("again", "pp-2", 8),
        ("plain", "plain", 9),
        ("wide", "fsdp-2", 10),
    ):
        world = LAYOUTS[layout][0]
        if world > RANK:
            state = state_of(layout, seed)
            with holdfast.Checkpointer(
                str(OUT / "optimizers"),
                state,
                ranks=(RANK, world, 60),
                writer="thread",
                save=every(steps=100),
            ) as ckpt:
                if name == "saved":
                    state["model"](torch.randn(4, 7 if RANK else 6)).sum().backward()
                    state["matrices"].step()
                    state["others"].step()
                    ckpt.save()
                else:
                    ckpt.restore()
            keyed = contents(state["model"], state["matrices"])
            found[name] = told_of(state) | keyed
        dist.barrier()
    tell("optimizers", **found)


def scenario_containers() -> None:
    """Modules and optimizers in containers; and the root of `fully_shard` is whole when it is saved, for nothing but an
    evaluation has been since."""
    for layout in ("ddp-2", "fsdp-2"):
        if RANK < 2:
            model, optimizer = made(layout, 7)
            train_step(layout, model, optimizer)
            with torch.no_grad():
                model(torch.randn(2, 6))
            nested = {"all": {"models": [model], "optimizers": [optimizer]}}
            with holdfast.Checkpointer(
                str(OUT / f"containers-{layout}"), nested, ranks=(RANK, 2, 60), writer="thread"
            ) as ckpt:
                ckpt.save()
    dist.barrier()


def scenario_alike() -> None:
    """Stages that call their layers alike, each sharded over ranks of its own; and layers that are replicas indeed."""
    mesh = mesh_of((2, 2), ("pp", "dp"))
    found: dict[str, object] = {}
    for name, seed in (("stages", 5 + RANK // 2), ("replicas", 5)):
        torch.manual_seed(seed)
        layer = nn.Linear(16, 16)
        fully_shard(layer, mesh=mesh["dp"])
        try:
            with holdfast.Checkpointer(
                str(OUT / f"alike-{name}"), {"model": layer}, ranks=(RANK, 4, 60), writer="thread"
            ) as ckpt:
                ckpt.save()
            found[name] = ""
        except holdfast.HoldfastError as e:
            found[name] = str(e)
        dist.barrier()
    tell("alike", **found)


def scenario_broadcast() -> None:
    """What all ranks need whole is read by rank 0 alone."""
    found = {}
    if RANK < 4:
        for seed in (7, 8):
            torch.manual_seed(seed)
            model = nn.parallel.DistributedDataParallel(nn.Linear(512, 512))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            counting = Counting(open_store(str(OUT / "handed")))
            with holdfast.Checkpointer(
                counting,
                {"model": model, "optimizer": optimizer},
                ranks=(RANK, 4, 60),
                writer="thread",
                broadcast=True,
            ) as ckpt:
                if seed == 7:
                    model(torch.randn(3, 512)).sum().backward()
                    optimizer.step()
                    ckpt.save()
                else:
                    counting.read_data = 0
                    ckpt.restore()
                    found["read"] = counting.read_data
            found[f"digest-{seed}"] = local(model, optimizer)
    tell("broadcast", **found)
    dist.barrier()


def scenario_data() -> None:
    """The global order of samples goes on under another number of ranks."""
    taken: dict[str, list[list[int]]] = {}
    for part, (world, steps) in enumerate(((2, 4), (3, 6), (4, 8))):
        if world > RANK:
            sampler = holdfast.ResumableSampler(
                list(range(97)), batch_size=12 // world, seed=3, rank=RANK, world_size=world
            )
            state = {"data": sampler}
            mine = []
            with holdfast.Checkpointer(
                str(OUT / "data"), state, ranks=(RANK, world, 60), writer="thread", save=every(steps=100)
            ) as ckpt:
                for _, batch in ckpt.steps(steps, data=sampler):
                    mine.append([int(i) for i in batch])
            taken[str(part)] = mine
        dist.barrier()
    tell("data", **taken)


def scenario_tp_pair() -> None:
    """A DTensor that rank 0 does not hold any of, and one on a part of the ranks only, are stored and come back."""
    mesh = MESHES["pair",]
    torch.manual_seed(4)
    full = torch.randn(9, 3)
    held = {"x": distribute_tensor(full, mesh, [Shard(0)])} if RANK in (1, 3) else {}
    with holdfast.Checkpointer(
        str(OUT / "apart"), {"some": held, "n": {"rank": RANK}}, ranks=(RANK, 4, 60), writer="thread"
    ) as ckpt:
        ckpt.save()
    dist.barrier()
    again = {"x": distribute_tensor(torch.zeros(9, 3), mesh, [Shard(0)])} if RANK in (1, 3) else {}
    with holdfast.Checkpointer(
        str(OUT / "apart"), {"some": again, "n": {"rank": -1}}, ranks=(RANK, 4, 60), writer="thread"
    ) as ckpt:
        ckpt.restore()
    same = torch.equal(again["x"].to_local(), held["x"].to_local()) if RANK in (1, 3) else True
    tell("apart", same=same)
    dist.barrier()


def main() -> None:
    faulthandler.dump_traceback_later(240, exit=True)
    dist.init_process_group("gloo")
    for n in (1, 2, 3, 4):
        GROUPS[n] = dist.new_group(list(range(n)))
    make_meshes()
    for name in sys.argv[2:]:
        try:
            globals()[f"scenario_{name}"]()
        except Exception:
            traceback.print_exc()
            raise
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of torch that are still there when the interpreter ends abort it now and then


if __name__ == "__main__":
    main()
