"""torch's small values (Size, dtype, device, layout, memory_format) and its generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch

from holdfast.format.values import Typed
from holdfast.state.adapter import Kinds
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.records import Record
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["Generators", "SmallValues"]

_BY_NAME: dict[str, type] = {
    "torch.dtype": torch.dtype,
    "torch.layout": torch.layout,
    "torch.memory_format": torch.memory_format,
}


def _named(kind: str) -> Callable[[Materializer, object], object]:
    cls = _BY_NAME[kind]

    def build(m: Materializer, value: object) -> object:
        found = vars(torch).get(str(value))
        return found if isinstance(found, cls) else Record(kind, {"value": value})

    return build


class SmallValues:
    """Immutable values of torch, stored by name."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {
            "torch.Size": lambda m, v: torch.Size([int(cast("int", n)) for n in m.items(v)]),
            "torch.device": lambda m, v: torch.device(str(v)),
            **{kind: _named(kind) for kind in _BY_NAME},
        }

    def claims(self, cls: type) -> bool:
        return cls in (torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        kind = f"torch.{type(value).__name__}"
        into.note(path, "captured", kind, str(value))
        if isinstance(value, torch.Size):
            return Typed(kind, list(value))
        return Typed(kind, str(value).removeprefix("torch."))

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        return ctx.fresh(node, path)


class Generators:
    """torch.Generator: its state, on the device it draws for."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {"torch.Generator": _new_generator}

    def claims(self, cls: type) -> bool:
        return issubclass(cls, torch.Generator)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        generator = cast("torch.Generator", value)
        into.note(path, "captured", "torch.Generator", str(generator.device))
        state = into.value(generator.get_state(), path)
        return Typed("torch.Generator", {"device": str(generator.device), "state": state})

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        generator = cast("torch.Generator", live)
        stored = node.value if isinstance(node, Typed) and node.kind == "torch.Generator" else None
        if not isinstance(stored, dict) or "state" not in stored:
            ctx.mismatch(path, "a torch.Generator", f"a {type(node).__name__}")
            return lambda m: live
        device = torch.device(str(stored.get("device"))).type
        if device != generator.device.type:
            ctx.mismatch(path, f"a torch.Generator for {generator.device.type}", f"one for {device}")
            return lambda m: live
        # Made whole first, so that a malformed state is found before anything live changes.
        ctx.act(
            Stage.VALUES,
            ctx.fresh(node, path),
            lambda v: cast("None", generator.set_state(cast("torch.Generator", v).get_state())),
        )
        return lambda m: live


def _new_generator(m: Materializer, value: object) -> object:
    parts = cast("Mapping[str, object]", m.mapping(value))
    device = torch.device(str(parts.get("device")))
    if device.type != "cpu" and not torch.cuda.is_available():
        return Record("torch.Generator", dict(parts))
    generator = torch.Generator(device)
    generator.set_state(cast("torch.Tensor", parts["state"]))
    return generator
