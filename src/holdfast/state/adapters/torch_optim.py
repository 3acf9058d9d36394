"""torch optimizers: state by parameter name, never through state_dict, which reorders and casts.

Stored: {"class", "param_groups": [{"params": [names], hyperparameters}], "state": {name: {key: value}}} and
"global_state" for entries that belong to no parameter. A parameter is called by its tree path in the model it
belongs to, or "group<g>.<i>" where no module of the state holds it.
See https://github.com/pytorch/pytorch/issues/164929 and https://github.com/pytorch/pytorch/issues/43706.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch.optim import Optimizer

from holdfast.core.names import join_path
from holdfast.state.adapter import NO_KINDS, Kinds, Outline
from holdfast.state.adapters.torch_optim_restore import plan_optimizer
from holdfast.state.adapters.torch_tensors import capture_tensor
from holdfast.state.capturing import PLAIN, Capturing
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["Optimizers", "has_own_state", "parameters_by_name"]

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def has_own_state(optimizer: Optimizer) -> bool:
    """Return whether the class or hooks of this optimizer say themselves what its state is."""
    cls = type(optimizer)
    return (
        cls.state_dict is not Optimizer.state_dict
        or cls.load_state_dict is not Optimizer.load_state_dict
        or any(getattr(optimizer, hooks, None) for hooks in _HOOKS)
    )


def parameters_by_name(
    optimizer: Optimizer, names: Mapping[int, str]
) -> list[list[tuple[str, torch.Tensor]]]:
    """Return (name, parameter) for every parameter of every group."""
    return [
        [(names.get(id(p), f"group{g}.{i}"), p) for i, p in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


class Optimizers:
    """torch.optim.Optimizer and what derives from it."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, Optimizer)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        optimizer = cast("Optimizer", value)
        if has_own_state(optimizer):
            into.note(path, "captured", type(optimizer).__name__, "by its own state_dict, or hooks on it")
            return into.value(optimizer.state_dict(), path)
        into.note(path, "captured", type(optimizer).__name__)
        groups = parameters_by_name(optimizer, into.parameters)
        node: dict[str, object] = {
            "class": type(optimizer).__name__,
            "param_groups": [
                self._group(group, [n for n, _ in named], join_path(path, "param_groups", g), into)
                for g, (group, named) in enumerate(zip(optimizer.param_groups, groups, strict=True))
            ],
            "state": self._state(optimizer, groups, f"{path}/state", into),
        }
        rest = self._global_state(optimizer, groups, path, into)
        if rest:
            node["global_state"] = rest
        return node

    def outline(self, value: object) -> Outline | None:
        optimizer = cast("Optimizer", value)
        if has_own_state(optimizer):
            return None
        found = Outline([], facts=[type(optimizer), len(optimizer.param_groups)])
        parameters: list[torch.Tensor] = []
        for group in optimizer.param_groups:
            parameters += group["params"]
            found.keys += group
            found.facts += (len(group), len(parameters))
            found.children += [v for k, v in group.items() if k != "params"]
        found.facts += map(id, parameters)
        state = optimizer.state
        entries = list(map(state.get, parameters))
        classes = list(map(type, entries))
        if not {dict, type(None)}.issuperset(classes):
            return None
        found.facts += classes
        kept = cast("list[dict[str, object]]", [e for e in entries if e is not None])
        found.facts += map(len, kept)
        found.keys += chain.from_iterable(kept)
        found.children += chain.from_iterable(map(dict.values, kept))
        if len(state) != len(kept):
            known = set(map(id, parameters))
            rest = {k: v for k, v in state.items() if not isinstance(k, torch.Tensor)}
            if not PLAIN.issuperset(map(type, rest)):
                return None
            found.facts.append(sum(isinstance(k, torch.Tensor) and id(k) not in known for k in state))
            found.keys += rest
            found.children += rest.values()
        return found

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        optimizer = cast("Optimizer", live)
        if not has_own_state(optimizer):
            groups = parameters_by_name(optimizer, ctx.parameters)
            plan_optimizer(optimizer, groups, node, path, ctx)
        elif ctx.selected(path):
            if any(p.is_meta for group in optimizer.param_groups for p in group["params"]):
                ctx.problems.append(
                    f"{path}: its parameters are on the meta device and it loads its state itself; "
                    "make it after the model was restored, or materialise the model first"
                )
            new = ctx.fresh(node, path)
            ctx.report.notes.append(
                f"{path}: restored by the optimizer's own load_state_dict, which may convert"
            )
            ctx.act(Stage.OBJECTS, new, lambda v: optimizer.load_state_dict(cast("dict[str, Any]", v)))
        return lambda m: live

    def _group(
        self, group: Mapping[str, object], names: list[str], path: str, into: Capturing
    ) -> dict[str, object]:
        stored: dict[str, object] = {"params": names}
        for key, value in group.items():
            if key == "params":
                continue
            stored[key] = into.value(value, join_path(path, key))
        return stored

    def _state(
        self, optimizer: Optimizer, groups: list[list[tuple[str, torch.Tensor]]], path: str, into: Capturing
    ) -> dict[str, object]:
        node: dict[str, object] = {}
        for named in groups:
            for name, parameter in named:
                # .get: the state is a defaultdict, and reading a missing entry would create it.
                entry = optimizer.state.get(parameter)
                if entry is None or not isinstance(entry, Mapping):
                    continue
                node[name] = {
                    key: capture_tensor(value, f"{path}/{name}/{key}", into, volatile=False)
                    if isinstance(value, torch.Tensor)
                    else into.value(value, f"{path}/{name}/{key}")
                    for key, value in entry.items()
                }
        return node

    def _global_state(
        self, optimizer: Optimizer, groups: list[list[tuple[str, torch.Tensor]]], path: str, into: Capturing
    ) -> dict[object, object]:
        known = {id(p) for named in groups for _, p in named}
        rest: dict[object, object] = {}
        for key, value in cast("dict[object, object]", optimizer.state).items():
            if isinstance(key, torch.Tensor):
                if id(key) not in known:
                    into.note(
                        join_path(path, "state"), "ignored", "state", "of a parameter in no group any more"
                    )
                continue
            rest[into.key(key, path)] = into.value(value, join_path(path, "global_state", key))
        return rest
