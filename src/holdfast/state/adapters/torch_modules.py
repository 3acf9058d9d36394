"""torch modules: parameters, persistent buffers and extra state under canonical names.

A module is stored as a dict of those names, as state_dict has them. Gradients, when asked for, stand under
`GRADIENTS` in that dict, with tensors named "<parameter>.grad".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from holdfast.core.errors import StateError
from holdfast.core.names import join_path
from holdfast.format.values import TensorLeaf
from holdfast.state.adapter import NO_KINDS, Kinds, Outline
from holdfast.state.adapters.torch_distributed import is_spread
from holdfast.state.adapters.torch_meta import (
    REMEDY,
    has_meta,
    home_of,
    is_lazy,
    is_slot,
    plan_lazy,
    plan_meta,
    slot_of,
)
from holdfast.state.adapters.torch_names import (
    canonical_modules,
    has_own_state,
    modules_at_a_glance,
    unwrapped,
)
from holdfast.state.adapters.torch_placing import NAMES
from holdfast.state.adapters.torch_tensor_plans import plan_new_shard, plan_tensor
from holdfast.state.adapters.torch_tensors import (
    ENGINE,
    capture_tensor,
    memory_of,
    tensor_spec,
    why_not,
)
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Restoring, Stage
from holdfast.state.tensors import TensorSpec

__all__ = ["GRADIENTS", "Modules"]

GRADIENTS = "~gradients"
EXTRA = "_extra_state"


class Modules:
    """Modules of any kind, restored in place."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, nn.Module)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        root = cast("nn.Module", value)
        into.note(path, "captured", type(unwrapped(root)).__name__)
        node: dict[str, object] = {}
        gradients: dict[str, object] = {}
        for prefix, module in canonical_modules(root):
            if has_own_state(module):
                into.note(
                    join_path(path, prefix.rstrip(".")),
                    "captured",
                    type(module).__name__,
                    "by its state_dict",
                )
                for name, content in _own_state(module, join_path(path, prefix.rstrip("."))).items():
                    node[prefix + name] = into.value(content, join_path(path, prefix + name))
                own = module.named_parameters() if into.gradients else ()
                _capture_gradients(dict(own), prefix, path, gradients=gradients, into=into)
                continue
            _capture_tensors(module, prefix, path, node=node, into=into)
            if into.gradients:
                _capture_gradients(module._parameters, prefix, path, gradients=gradients, into=into)
            if _has_extra(module):
                node[prefix + EXTRA] = into.anew(module.get_extra_state(), join_path(path, prefix + EXTRA))
        if into.gradients:
            node[GRADIENTS] = gradients
        return node

    def outline(self, value: object) -> Outline | None:
        modules = modules_at_a_glance(cast("nn.Module", value))
        if modules is None:
            return None
        found = Outline([])
        for module in modules:
            _outline_module(module, found)
        return found

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        root = cast("nn.Module", live)
        if not isinstance(node, dict):
            ctx.mismatch(path, f"the module {type(unwrapped(root)).__name__}", f"a {type(node).__name__}")
            return lambda m: live
        stored = dict(cast("dict[str, object]", node))
        gradients = stored.pop(GRADIENTS, None)
        for prefix, module in canonical_modules(root):
            if has_own_state(module):
                _plan_own(module, prefix, path, stored=stored, ctx=ctx)
            else:
                _plan_module(module, prefix, path, stored=stored, ctx=ctx)
        for name, child in stored.items():
            ctx.unexpected(join_path(path, name), _describe(child, ctx))
        if isinstance(gradients, dict):
            _plan_gradients(root, gradients, path, ctx)
        return lambda m: live


def _own_state(module: nn.Module, path: str) -> Mapping[str, object]:
    found: object = module.state_dict()
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        raise StateError(
            f"{path}: state_dict() of {type(module).__name__} returned no dict with names as keys"
        )
    return found


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _capture_tensors(
    module: nn.Module, prefix: str, path: str, *, node: dict[str, object], into: Capturing
) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            # Averaged weights and the like are written by nobody we can wait for.
            volatile = id(parameter) not in into.updated
            leaf = capture_tensor(parameter, f"{path}/{prefix}{name}", into, volatile=volatile)
            node[prefix + name] = leaf
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        if name in module._non_persistent_buffers_set:
            into.note(f"{path}/{prefix}{name}", "ignored", "buffer", "registered with persistent=False")
        else:
            node[prefix + name] = capture_tensor(buffer, f"{path}/{prefix}{name}", into, volatile=True)


def _outline_module(module: nn.Module, found: Outline) -> None:
    below = [name for name, child in module._modules.items() if child is not None]
    parameters = module._parameters
    if type(None) in map(type, parameters.values()):
        parameters = {n: p for n, p in parameters.items() if p is not None}
    found.facts += (type(module), len(below), len(parameters))
    found.keys += below
    found.keys += parameters
    found.children += parameters.values()
    # What a parameter is called in an optimizer, and whether one writes it, follows from who is who.
    found.facts += map(id, parameters.values())
    if module._buffers:
        left_out = module._non_persistent_buffers_set
        buffers = {n: b for n, b in module._buffers.items() if b is not None and n not in left_out}
        found.facts += (len(module._buffers), len(buffers))
        found.keys += module._buffers
        found.keys += buffers
        found.children += buffers.values()
    if _has_extra(module):
        found.facts.append(EXTRA)
        found.children.append(module.get_extra_state())


def _capture_gradients(
    parameters: Mapping[str, nn.Parameter | None],
    prefix: str,
    path: str,
    *,
    gradients: dict[str, object],
    into: Capturing,
) -> None:
    for name, parameter in parameters.items():
        if parameter is not None and parameter.grad is not None:
            where = join_path(path, f"{prefix}{name}.grad")
            gradients[prefix + name] = capture_tensor(parameter.grad, where, into, volatile=True)


def _describe(node: object, ctx: Restoring) -> str:
    if isinstance(node, TensorLeaf):
        spec = ctx.spec(node)
        return spec.describe() if spec else "a tensor"
    return f"a {type(node).__name__}"


def _plan_module(
    module: nn.Module, prefix: str, path: str, *, stored: dict[str, object], ctx: Restoring
) -> None:
    buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name in module._non_persistent_buffers_set:
        b = module._buffers.get(name)
        if b is not None and b.is_meta:  # the model would look whole and be without values there
            ctx.missing(join_path(path, prefix + name), "a buffer on the meta device that is never stored")
    for name, t in (*module._parameters.items(), *buffers.items()):
        if t is None:
            continue
        below = join_path(path, prefix + name)
        if prefix + name not in stored:
            ctx.missing(below, "a tensor" if why_not(t) else tensor_spec(t, below).describe())
            continue
        _plan_slot(t, stored.pop(prefix + name), below, ctx)
    if _has_extra(module):
        below = join_path(path, prefix + EXTRA)
        if prefix + EXTRA not in stored:
            ctx.missing(below, "extra state")
        elif ctx.selected(below):
            ctx.act(Stage.HOOKS, ctx.fresh(stored.pop(prefix + EXTRA), below), module.set_extra_state)
        else:
            stored.pop(prefix + EXTRA)
    for hook in module._load_state_dict_post_hooks.values():
        if ctx.selected(join_path(path, prefix.rstrip("."))):
            ctx.act(Stage.HOOKS, lambda m: None, lambda v, h=hook: _call_hook(h, module))  # type: ignore[misc]


def _call_hook(hook: object, module: nn.Module) -> None:
    hook(module, _IncompatibleKeys([], []))  # type: ignore[operator]


def _plan_slot(t: torch.Tensor, node: object, path: str, ctx: Restoring) -> None:
    """Plan the restore of one parameter or buffer, which must stay the same object."""
    if not ctx.selected(path):
        return
    if is_slot(t):
        placed = plan_meta(t, node, path, ctx)
    elif is_lazy(t):
        placed = plan_lazy(t, node, path, ctx)
    else:
        refusal = why_not(t)
        if refusal is not None:
            ctx.problems.append(f"{path}: the live tensor cannot be filled: {refusal}")
            return
        placed = plan_tensor(t, node, path, ctx) is not None
    if placed:
        return
    stored = ctx.spec(node) if isinstance(node, TensorLeaf) else None
    shape = stored.shape if is_lazy(t) and stored is not None else () if is_lazy(t) else tuple(t.shape)
    live = TensorSpec(path, NAMES[t.dtype], shape)
    if not isinstance(node, TensorLeaf) or stored is None:
        ctx.mismatch(path, live.describe(), _describe(node, ctx))
    elif stored.shape != live.shape:
        ctx.mismatch(path, live.describe(), stored.describe())
    elif stored.dtype != live.dtype:
        ctx.mismatch(path, live.describe(), stored.describe(), remedy=f"To convert it pass cast=({path!r},)")
    else:
        _fill_shared(t, node, path, ctx)


def _fill_shared(t: torch.Tensor, node: TensorLeaf, path: str, ctx: Restoring) -> None:
    """Handle a live tensor whose memory another stored tensor fills too, or whose elements overlap."""
    name = ctx.stored_name(node)
    holder = ctx.holder(slot_of(t) if t.is_meta or is_lazy(t) else memory_of(t))
    if holder not in (None, name):
        ctx.must_equal.append((path, holder, name))
        ctx.report.notes.append(
            f"{path}: tied to {holder} in the live state, stored apart; their bytes must be equal"
        )
        return

    def commit(value: object) -> None:
        t.data = cast("torch.Tensor", value).to(t.device)

    ctx.report.restored.append((path, "new memory: the live tensor was a broadcast"))
    ctx.act(Stage.VALUES, lambda m: ENGINE.make(m.tensors[name], "torch.Tensor"), commit)


def _plan_own(
    module: nn.Module, prefix: str, path: str, *, stored: dict[str, object], ctx: Restoring
) -> None:
    """Plan a load_state_dict of a module that says itself what its state is."""
    where = join_path(path, prefix.rstrip("."))
    mine = [k for k in stored if k.startswith(prefix)]
    parts = {k[len(prefix) :]: stored.pop(k) for k in mine}
    if has_meta(module) and ctx.selected(where):
        ctx.problems.append(f"{where}: has tensors on the meta device and loads its state itself; {REMEDY}")
    wanted = _own_state(module, where)
    strict = True
    for name in wanted.keys() - parts.keys():
        ctx.missing(join_path(path, prefix + name), "an entry of its state_dict")
        strict = False
    for name in parts.keys() - wanted.keys():
        ctx.unexpected(join_path(path, prefix + name), _describe(parts[name], ctx))
        strict = False
    chosen = {n: v for n, v in parts.items() if n in wanted and ctx.selected(join_path(path, prefix + n))}
    strict = strict and len(chosen) == len(parts)
    if not chosen and not (strict and ctx.selected(where)):
        return
    builds = {n: ctx.fresh(v, join_path(path, prefix + n)) for n, v in chosen.items()}

    def build(m: Materializer) -> object:
        values: OrderedDict[str, object] = OrderedDict((n, b(m)) for n, b in builds.items())
        # The entry versions of the code that runs now: what was stored is the content, not an old file
        # format.
        values._metadata = getattr(wanted, "_metadata", OrderedDict())  # type: ignore[attr-defined]
        return values

    def commit(values: object) -> None:
        content = cast("dict[str, object]", values)
        if strict:
            module.load_state_dict(content)
        else:
            module.load_state_dict(content, strict=False)

    ctx.act(Stage.OBJECTS, build, commit)


def _plan_gradients(root: nn.Module, stored: Mapping[str, object], path: str, ctx: Restoring) -> None:
    """Plan .grad of every parameter: set where one was stored, cleared where none was."""
    for prefix, module in canonical_modules(root):
        found = module.named_parameters() if has_own_state(module) else module._parameters.items()
        for name, parameter in found:
            if parameter is None or not ctx.selected(join_path(path, f"{prefix}{name}.grad")):
                continue
            node = stored.get(prefix + name)
            where = join_path(path, f"{prefix}{name}.grad")
            if isinstance(node, TensorLeaf):
                _plan_gradient(parameter, node, where, ctx)
            elif parameter.grad is not None:
                ctx.act(Stage.VALUES, lambda m: None, lambda v, p=parameter: setattr(p, "grad", None))  # type: ignore[misc]


def _plan_gradient(parameter: nn.Parameter, node: TensorLeaf, where: str, ctx: Restoring) -> None:
    if parameter.grad is not None and plan_tensor(parameter.grad, node, where, ctx) is not None:
        return
    spec = ctx.spec(node) if is_spread(parameter) else ctx.need(node, where)
    shape = spec.shape if is_lazy(parameter) and spec is not None else tuple(parameter.shape)
    wanted = TensorSpec(where, NAMES[parameter.dtype], shape)
    castable = spec is not None and spec.shape == wanted.shape
    if spec is None or not castable or (spec.dtype != wanted.dtype and not ctx.relaxed("cast", where)):
        remedy = f"To convert it pass cast=({where!r},)" if castable else ""
        ctx.mismatch(where, wanted.describe(), spec.describe() if spec else "nothing", remedy=remedy)
        return
    name, device = ctx.stored_name(node), home_of(parameter)
    spread = plan_new_shard(parameter, node, where, ctx)
    if spread is None:
        ctx.report.restored.append((where, ""))

    def build(m: Materializer) -> object:
        made = ENGINE.make(m.tensors[name], "torch.Tensor") if spread is None else spread(m)
        return cast("torch.Tensor", made).to(device, parameter.dtype)

    ctx.act(Stage.VALUES, build, lambda v: setattr(parameter, "grad", v))
