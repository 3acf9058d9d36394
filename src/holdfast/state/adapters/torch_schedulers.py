"""Learning-rate schedulers: their own state_dict, less the functions that the program brings along."""

from __future__ import annotations

import functools
import types
import weakref
from typing import cast

from torch.optim.lr_scheduler import LRScheduler

from holdfast.core.names import join_path
from holdfast.state.adapter import NO_KINDS, Kinds
from holdfast.state.capturing import Capturing
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["Schedulers"]

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    weakref.WeakMethod,
    type,
)


class Schedulers:
    """Every scheduler of torch and what derives from LRScheduler."""

    divisible = False
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return issubclass(cls, LRScheduler)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        scheduler = cast("LRScheduler", value)
        into.note(path, "captured", type(value).__name__, "by its state_dict")
        state = scheduler.state_dict()
        functions = getattr(scheduler, "lr_lambdas", None)
        if isinstance(functions, list) and any(isinstance(f, _CODE) for f in functions):
            into.note(join_path(path, "lr_lambdas"), "ignored", "function", "code stays in the program")
        return into.value(_without_code(state, path, into), path)

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        scheduler = cast("LRScheduler", live)
        if not isinstance(node, dict):
            ctx.mismatch(
                path, f"a {type(live).__name__}", f"a {type(node).__name__} that is no scheduler's state"
            )
            return lambda m: live
        wanted = set(scheduler.state_dict())
        for key in sorted(str(k) for k in wanted ^ set(node)):
            side = "live" if key in wanted else "stored"
            ctx.report.notes.append(f"{join_path(path, key)}: only the {side} {type(live).__name__} has it")
        ctx.act(
            Stage.OBJECTS,
            ctx.fresh(node, path),
            lambda v: scheduler.load_state_dict(cast("dict[str, object]", v)),
        )
        return lambda m: live


def _is_code(value: object) -> bool:
    if isinstance(value, _CODE):
        return True
    return isinstance(value, (list, tuple)) and any(_is_code(v) for v in value)


def _without_code(value: object, path: str, into: Capturing) -> object:
    """Return `value` without the dict entries that hold functions, each reported as ignored."""
    if isinstance(value, dict):
        kept = {}
        for key, v in value.items():
            below = join_path(path, key)
            if _is_code(v):
                into.note(below, "ignored", "function", "code stays in the program")
            else:
                kept[key] = _without_code(v, below, into)
        return kept
    if type(value) is list:
        return [_without_code(v, join_path(path, i), into) for i, v in enumerate(value)]
    return value
