"""Tensors back in their places: which stored one, or which boxes of it, go into which live one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from holdfast.format.values import TensorLeaf
from holdfast.state.adapter import NO_KINDS, Kinds
from holdfast.state.adapters.torch_distributed import held_boxes, is_spread, local_of, wrapped_like
from holdfast.state.adapters.torch_placing import NAMES, TORCH_DTYPES, copy_in, overlaps
from holdfast.state.adapters.torch_tensors import ENGINE, as_kind, capture_tensor, kind_of, memory_of, why_not
from holdfast.state.capturing import Capturing
from holdfast.state.restoring import Build, Kept, Restoring
from holdfast.state.tensors import TensorSpec

if TYPE_CHECKING:
    from holdfast.state.materialize import Materializer

__all__ = ["Tensors", "on_device", "plan_new_shard", "plan_tensor"]


def plan_tensor(t: torch.Tensor, node: object, path: str, ctx: Restoring) -> Build | None:
    """Plan an in-place copy of the stored tensor into `t`; return None if it does not fit there.

    Fits: a stored tensor of equal shape and element type (another type where `cast` allows it) and live
        memory that no other stored tensor goes to. Records nothing when it does not fit.
    """
    if not isinstance(node, TensorLeaf) or why_not(t) is not None:
        return None
    if is_spread(t):
        return _plan_shard(t, node, path, ctx)
    stored = ctx.need(node, path)
    if stored is None or stored.shape != t.shape:
        return None
    if overlaps(t) and not _same_broadcast(t, stored):
        return None
    if not _type_fits(t, stored, path, ctx):
        return None
    claim = ctx.claim(memory_of(t), stored.name, path)
    if claim == "taken":
        return None
    if claim == "new":
        ctx.copy(ENGINE, t, stored.name)
    ctx.report.restored.append((path, ""))
    return Kept(t)


def _type_fits(t: torch.Tensor, stored: TensorSpec, path: str, ctx: Restoring) -> bool:
    """Return whether the stored element type goes into `t`, and record where that converts it."""
    if stored.dtype == NAMES[t.dtype]:
        return True
    if not ctx.relaxed("cast", path):
        return False
    ctx.report.cast.append((path, f"{stored.dtype} to {NAMES[t.dtype]}"))
    return True


def _plan_shard(t: torch.Tensor, node: TensorLeaf, path: str, ctx: Restoring) -> Build | None:
    stored = ctx.spec(node)
    if stored is None or stored.shape != t.shape:
        return None
    if not _type_fits(t, stored, path, ctx):
        return None
    claim = ctx.claim(memory_of(t), ctx.stored_name(node), path)
    if claim == "taken":
        return None
    for box in held_boxes(t)[0]:
        key = ctx.need_part(node, (box.offsets, stored.shape), box.shape, path)
        if claim == "new" and 0 not in box.shape:
            ctx.copy(ENGINE, box.value, key)
    ctx.report.restored.append((path, ""))
    return Kept(t)


def plan_new_shard(like: torch.Tensor, node: object, path: str, ctx: Restoring) -> Build | None:
    """Plan a new tensor that is spread as `like`, such as an optimizer's of a parameter; None if it is no such one."""
    if not isinstance(node, TensorLeaf) or not is_spread(like):
        return None
    stored = ctx.spec(node)
    if stored is None or stored.shape != like.shape or why_not(like) is not None:
        return None
    local = local_of(like)
    boxes, _ = held_boxes(like)
    keys = [ctx.need_part(node, (b.offsets, stored.shape), b.shape, path) for b in boxes]
    ctx.report.restored.append((path, ""))

    def build(m: Materializer) -> object:
        made = torch.empty_like(local, dtype=TORCH_DTYPES[stored.dtype])
        twins, _ = held_boxes(wrapped_like(made, like))
        copy_in(
            [
                (cast("torch.Tensor", t.value), m.tensors[k])
                for t, k in zip(twins, keys, strict=True)
                if 0 not in t.shape
            ]
        )
        return wrapped_like(made, like)

    return build


def _same_broadcast(t: torch.Tensor, stored: TensorSpec) -> bool:
    if stored.stride is None:
        return False
    return all(
        live != 0 or size <= 1 or then == 0
        for live, then, size in zip(t.stride(), stored.stride, t.shape, strict=True)
    )


class Tensors:
    """Tensors in plain containers: restored in place where shape, element type and memory allow."""

    divisible = False
    kinds: Kinds = NO_KINDS

    def __init__(self) -> None:
        self.engine = ENGINE

    def claims(self, cls: type) -> bool:
        return issubclass(cls, torch.Tensor)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        return capture_tensor(cast("torch.Tensor", value), path, into)

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        t = cast("torch.Tensor", live)
        if not isinstance(node, TensorLeaf):
            return ctx.fresh(node, path)
        build = plan_tensor(t, node, path, ctx)
        if build is not None:
            return build
        stored = ctx.need(node, path)
        name = NAMES.get(t.dtype)
        if name is None or stored is None:
            return ctx.unfit(live, node, path, live_is=f"{t.dtype}{list(t.shape)}", empty=False)
        mine = TensorSpec(path, name, tuple(t.shape))
        if stored.shape == mine.shape and stored.dtype == mine.dtype:
            return on_device(ctx.fresh(node, path), t.device)
        castable = stored.shape == mine.shape
        build = ctx.unfit(live, node, path, live_is=mine.describe(), empty=t.numel() == 0, castable=castable)
        return on_device(build, t.device)


def on_device(build: Build, device: torch.device) -> Build:
    """Return a build whose tensor is on `device`."""
    if device.type in ("cpu", "meta"):
        return build

    def moved(m: object) -> object:
        made = build(m)  # type: ignore[arg-type]
        if not isinstance(made, torch.Tensor) or made.device == device:
            return made
        return as_kind(made.detach().to(device), kind_of(made))

    return moved
