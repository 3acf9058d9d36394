"""Parameters and buffers on the meta device, or lazy ones: a restore gives them memory and values at once.

So a large model is built in no time under `torch.device("meta")` and nothing is initialised in vain. The objects stay
the same ones, by `torch.utils.swap_tensors`: optimizers that hold them, and ties, see the restored values.

A lazy tensor takes the stored shape, as it would take that of a first batch. Its module turns into what it is to become
at the first forward pass, which finds nothing left to initialise.
"""

from __future__ import annotations

import weakref
from typing import cast

import torch
from torch import nn

from holdfast.format.values import TensorLeaf
from holdfast.state.adapters.torch_placing import NAMES, new_tensor
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Restoring, Stage

__all__ = ["REMEDY", "has_meta", "home_of", "is_lazy", "is_slot", "plan_lazy", "plan_meta", "slot_of"]

REMEDY = "materialise it first, e.g. with module.to_empty(device=...)"


def home_of(t: torch.Tensor) -> torch.device:
    """Return the device a tensor has, or will have once it is restored: torch's default device for one on meta."""
    if not t.is_meta:
        return t.device
    default = torch.get_default_device()
    return torch.device("cpu") if default.type == "meta" else default


def is_slot(t: torch.Tensor) -> bool:
    """Return whether a restore can give this tensor of a module its memory."""
    return (
        t.is_meta
        and type(t) in (torch.Tensor, nn.Parameter)
        and t.layout is torch.strided
        and t.dtype in NAMES
    )


def is_lazy(t: torch.Tensor) -> bool:
    """Return whether a tensor of a module has no shape yet."""
    return type(t) in (nn.UninitializedParameter, nn.UninitializedBuffer)


def slot_of(t: torch.Tensor) -> tuple[str, int]:
    """Return what stands for the memory that a tensor on the meta device, or a lazy one, will have."""
    return ("meta", id(t))


def has_meta(module: nn.Module) -> bool:
    """Return whether a parameter or buffer of a module is on the meta device."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def plan_meta(t: torch.Tensor, node: object, path: str, ctx: Restoring) -> bool:
    """Plan to give `t` the stored tensor; return False, and record nothing, if it does not fit there."""
    if not isinstance(node, TensorLeaf):
        return False
    stored = ctx.need(node, path)
    if stored is None or stored.shape != tuple(t.shape):
        return False
    if stored.dtype != NAMES[t.dtype]:
        if not ctx.relaxed("cast", path):
            return False
        ctx.report.cast.append((path, f"{stored.dtype} to {NAMES[t.dtype]}"))
    name = ctx.stored_name(node)
    first = not ctx.is_given(name)
    claim = ctx.claim(slot_of(t), name, path)
    if claim == "taken":
        return False
    device = home_of(t)
    ctx.report.restored.append((path, f"materialised on {device}"))
    if claim == "again":
        return True
    held = _held(t)
    if held is not None:
        ctx.problems.append(f"{path}: is on the meta device and {held}; restore before that, or {REMEDY}")

    def build(m: Materializer) -> object:
        # Two that share a stored tensor are two here: each gets memory of its own.
        made = new_tensor(m.tensors[name]) if first else new_tensor(m.tensors[name]).clone()
        made = made.to(device, t.dtype)
        if made.stride() != t.stride():
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(made)
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    def commit(value: object) -> None:
        made = cast("torch.Tensor", value)
        for name, mark in vars(t).items():  # what the program noted on the parameter itself
            setattr(made, name, mark)
        torch.utils.swap_tensors(t, made)  # type: ignore[no-untyped-call]

    ctx.act(Stage.VALUES, build, commit)
    return True


def plan_lazy(t: torch.Tensor, node: object, path: str, ctx: Restoring) -> bool:
    """Plan to give the lazy `t` the stored tensor, whatever its shape; return False if its type does not fit."""
    stored = ctx.need(node, path) if isinstance(node, TensorLeaf) else None
    if stored is None or not isinstance(node, TensorLeaf):
        return False
    if stored.dtype != NAMES[t.dtype]:
        if not ctx.relaxed("cast", path):
            return False
        ctx.report.cast.append((path, f"{stored.dtype} to {NAMES[t.dtype]}"))
    name = ctx.stored_name(node)
    first = not ctx.is_given(name)
    claim = ctx.claim(slot_of(t), name, path)
    if claim == "taken":
        return False
    ctx.report.restored.append((path, f"materialised on {t.device}"))
    if claim == "again":
        return True

    def build(m: Materializer) -> object:
        made = new_tensor(m.tensors[name]) if first else new_tensor(m.tensors[name]).clone()
        return made.to(t.device, t.dtype)

    def commit(value: object) -> None:
        t.data = cast("torch.Tensor", value)  # as its materialize() does, which takes memory of its own
        t.__class__ = t.cls_to_become  # type: ignore[attr-defined]

    ctx.act(Stage.VALUES, build, commit)
    return True


def _held(t: torch.Tensor) -> str | None:
    """Return what keeps a tensor from getting memory and staying the same object, or None."""
    if weakref.getweakrefs(t):
        return "something holds a weak reference to it"
    if t._backward_hooks or getattr(t, "_post_accumulate_grad_hooks", None):
        return "has hooks"
    if t._use_count() > 1:  # type: ignore[attr-defined]
        return "a view of it or the graph of a forward pass holds it"
    return None
