"""Put optimizer state back: exact bytes, exact element types, absent where it was absent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.optim import LBFGS, Optimizer

from holdfast.core.names import join_path
from holdfast.core.units import format_count
from holdfast.format.values import TensorLeaf
from holdfast.state.adapters.torch_distributed import is_spread
from holdfast.state.adapters.torch_meta import home_of
from holdfast.state.adapters.torch_tensor_plans import plan_new_shard, plan_tensor
from holdfast.state.adapters.torch_tensors import ENGINE
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["plan_optimizer"]

Named = list[list[tuple[str, torch.Tensor]]]
# How the arithmetic is carried out is this process's choice; what is computed is the checkpoint's.
_RUNTIME = ("foreach", "fused", "capturable", "differentiable")
_NOT_STORED = ("params", "param_names")
_NAMELESS = re.compile(r"group\d+\.\d+")
# Counters that torch keeps on the CPU unless the step itself runs on the device.
_HOST_KEYS = ("step", "mu_product")
# What is one number for each parameter, however that is spread; else it would look like a moment of a scalar parameter.
_NUMBERS = (*_HOST_KEYS, "eta", "mu")


def plan_optimizer(optimizer: Optimizer, groups: Named, node: object, path: str, ctx: Restoring) -> None:
    """Plan the restore of groups and state; report every parameter that one side lacks."""
    stored = _parts(node)
    if stored is None:
        ctx.mismatch(
            path, f"a {type(optimizer).__name__}", f"a {type(node).__name__} that is no optimizer's state"
        )
        return
    saved_class, saved_groups, saved_state = stored
    if saved_class != type(optimizer).__name__ and ctx.selected(path):
        note = f"{saved_class} to {type(optimizer).__name__}"
        if not ctx.relaxed("cast", path):
            remedy = f"To restore it all the same pass cast=({path!r},)"
            ctx.mismatch(
                path, f"a {type(optimizer).__name__}", f"the state of a {saved_class}", remedy=remedy
            )
            return
        ctx.report.cast.append((path, note))
    names = _pair_groups(optimizer, groups, saved_groups, path=path, ctx=ctx)
    for g, named in enumerate(groups):
        for _, parameter in named:
            if id(parameter) in names:
                name = names[id(parameter)]
                _plan_state(
                    optimizer, parameter, saved_state.get(name), f"{path}/state/{name}", ctx=ctx, group=g
                )
    rest = cast("Mapping[str, object]", node).get("global_state")
    _plan_global(optimizer, rest if isinstance(rest, dict) else {}, path, ctx)


def _parts(node: object) -> tuple[str, list[dict[str, Any]], dict[str, Any]] | None:
    if not isinstance(node, dict):
        return None
    groups, state = node.get("param_groups"), node.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or not isinstance(node.get("class"), str):
        return None
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
        return None
    return node["class"], groups, state


def _pair_groups(
    optimizer: Optimizer, groups: Named, saved: list[dict[str, Any]], *, path: str, ctx: Restoring
) -> dict[int, str]:
    """Return id(parameter) -> stored name, and plan the hyperparameters of groups that both sides have."""
    names: dict[int, str] = {}
    where = join_path(path, "param_groups")
    saved_names = {n for g in saved for n in g["params"]}
    seen: set[str] = set()
    for g, named in enumerate(groups):
        below = join_path(where, g)
        if g >= len(saved):
            ctx.missing(below, f"a parameter group of {format_count(len(named), 'parameter')}")
            continue
        mine = _pair_names(named, saved[g]["params"], saved_names, path=below, ctx=ctx)
        for parameter_id, name in mine.items():
            if name in seen:
                continue
            names[parameter_id] = name
        seen.update(mine.values())
        _check_order(optimizer, [n for n, _ in named], saved[g]["params"], below, ctx)
        _plan_hyperparameters(optimizer.param_groups[g], saved[g], below, ctx)
    for g in range(len(groups), len(saved)):
        ctx.unexpected(
            join_path(where, g), f"a parameter group of {format_count(len(saved[g]['params']), 'parameter')}"
        )
    for name in sorted(saved_names - seen):
        if not any(name in saved[g]["params"] for g in range(len(groups), len(saved))):
            ctx.unexpected(
                f"{path}/state/{name}", "the state of a parameter that this optimizer does not hold"
            )
    return names


def _pair_names(
    named: list[tuple[str, torch.Tensor]],
    saved: list[str],
    everywhere: set[str],
    *,
    path: str,
    ctx: Restoring,
) -> dict[int, str]:
    places = list(zip(named, saved, strict=False))
    pairable = all(n == s or _NAMELESS.fullmatch(n) or _NAMELESS.fullmatch(s) for (n, _), s in places)
    if pairable and len(named) == len(saved) and [n for n, _ in named] != saved:
        ctx.report.notes.append(
            f"{path}: parameters that no stored or live module holds are paired by their place"
        )
        return {id(p): s for (_, p), s in places}
    optimizer_path = path.split("/param_groups/", maxsplit=1)[0]
    found = {}
    for name, parameter in named:
        if name in saved:
            found[id(parameter)] = name
        elif name in everywhere:
            found[id(parameter)] = name
            ctx.mismatch(
                join_path(path, "params", name), "this parameter in this group", "it in another group"
            )
        else:
            ctx.missing(f"{optimizer_path}/state/{name}", "a parameter that is not in the stored optimizer")
    return found


def _check_order(optimizer: Optimizer, live: list[str], saved: list[str], path: str, ctx: Restoring) -> None:
    if set(live) != set(saved) or live == saved:
        return
    if isinstance(optimizer, LBFGS):
        ctx.mismatch(
            join_path(path, "params"),
            "this order of parameters",
            "another; LBFGS keeps one flat vector of all",
        )
    else:
        ctx.report.notes.append(
            f"{path}: its parameters are in another order than when stored; paired by name"
        )


def _plan_hyperparameters(group: dict[str, Any], saved: Mapping[str, Any], path: str, ctx: Restoring) -> None:
    builds: dict[str, Build] = {}
    for key, node in saved.items():
        below = join_path(path, key)
        if key in _NOT_STORED or not ctx.selected(below):
            continue
        if key in _RUNTIME:
            if key in group and group[key] != node:
                ctx.report.notes.append(
                    f"{below}: keeps the live {group[key]!r}; it was {node!r} when stored"
                )
            continue
        builds[key] = _plan_hyperparameter(group.get(key), node, below, ctx)
    ctx.report.notes += [
        f"{join_path(path, key)}: not in the checkpoint, keeps the live {group[key]!r}"
        for key in group
        if key not in saved and key not in _NOT_STORED
    ]

    def build(m: Materializer) -> object:
        return {key: b(m) for key, b in builds.items()}

    ctx.act(Stage.VALUES, build, lambda values: group.update(cast("dict[str, object]", values)))


def _plan_hyperparameter(live: object, node: object, path: str, ctx: Restoring) -> Build:
    """Plan one hyperparameter. Whether it is a tensor (as for compiled steps) stays as it is live."""
    if isinstance(live, torch.Tensor):
        if isinstance(node, TensorLeaf):
            placed = plan_tensor(live, node, path, ctx)
            if placed is not None:
                return placed
            fresh, device = ctx.fresh(node, path), live.device
            return lambda m: cast("torch.Tensor", fresh(m)).to(device)
        if isinstance(node, (int, float)) and not isinstance(node, bool):
            ctx.report.notes.append(f"{path}: stored as a number, stays the live tensor")
            ctx.act(Stage.VALUES, lambda m: None, lambda v: cast("None", live.fill_(node)))
            return lambda m: live
    elif isinstance(node, TensorLeaf) and isinstance(live, (int, float)):
        ctx.report.notes.append(f"{path}: stored as a tensor, stays a number")
        fresh = ctx.fresh(node, path)
        return lambda m: cast("torch.Tensor", fresh(m)).item()
    return ctx.fresh(node, path)


def _plan_state(
    optimizer: Optimizer, parameter: torch.Tensor, saved: object, path: str, *, ctx: Restoring, group: int
) -> None:
    """Plan the state of one parameter; state that the checkpoint lacks is removed."""
    entry = optimizer.state.get(parameter)
    if not isinstance(saved, dict):
        if entry is not None and ctx.selected(path):
            ctx.act(
                Stage.VALUES, lambda m: None, lambda v: cast("None", optimizer.state.pop(parameter, None))
            )
        return
    live: Mapping[str, object] = entry if isinstance(entry, Mapping) else {}
    builds: dict[str, Build] = {}
    for key, node in saved.items():
        below = f"{path}/{key}"
        if ctx.selected(below):
            alike = is_spread(parameter) and (parameter.dim() > 0 or key not in _NUMBERS)
            spread = plan_new_shard(parameter, node, below, ctx) if alike and live.get(key) is None else None
            if spread is not None:
                builds[key] = spread
                continue
            device = _device(str(key), parameter, optimizer.param_groups[group])
            builds[key] = _plan_entry(live.get(key), node, below, ctx=ctx, device=device)
    kept = {
        key: value for key, value in live.items() if key not in builds and not ctx.selected(f"{path}/{key}")
    }
    if not builds and kept == live:
        return

    def commit(values: object) -> None:
        target = optimizer.state.setdefault(parameter, {})
        target.clear()
        target.update(kept)
        target.update(cast("dict[str, object]", values))

    ctx.act(Stage.VALUES, lambda m: {key: b(m) for key, b in builds.items()}, commit)


def _device(key: str, parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
    if key in _HOST_KEYS and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return home_of(parameter)


def _plan_entry(live: object, node: object, path: str, *, ctx: Restoring, device: torch.device) -> Build:
    if isinstance(node, TensorLeaf):
        if (
            isinstance(live, torch.Tensor)
            and live.device == device
            and not _cast_would_apply(live, node, ctx)
        ):
            placed = plan_tensor(live, node, path, ctx)
            if placed is not None:
                return placed
        name = ctx.stored_name(node)
        if ctx.need(node, path) is not None:
            ctx.report.restored.append((path, ""))
        return lambda m: ENGINE.make(m.tensors[name], node.kind).to(device)
    fresh = ctx.fresh(node, path)
    return lambda m: _to_device(fresh(m), device)


def _cast_would_apply(live: torch.Tensor, node: TensorLeaf, ctx: Restoring) -> bool:
    """Moments are never cast: a stored element type that differs from the live one replaces it."""
    spec = ctx.spec(node)
    return spec is not None and spec.dtype != str(live.dtype).removeprefix("torch.")


def _to_device(value: object, device: torch.device) -> object:
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_to_device(v, device) for v in value]
    return tuple(_to_device(v, device) for v in value) if type(value) is tuple else value


def _plan_global(optimizer: Optimizer, saved: dict[object, object], path: str, ctx: Restoring) -> None:
    where = join_path(path, "global_state")
    live = {k: v for k, v in optimizer.state.items() if not isinstance(k, torch.Tensor)}
    if (not saved and not live) or not ctx.selected(where):
        return
    ctx.fresh(saved, where)

    def commit(values: object) -> None:
        for key in live:
            optimizer.state.pop(key, None)
        optimizer.state.update(cast("dict[Any, Any]", values))

    ctx.act(Stage.VALUES, lambda m: m.mapping(saved), commit)
