"""Objects that look after their own state: anything with state_dict and load_state_dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from holdfast.state.adapter import NO_KINDS, Kinds
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["Stateful"]


class Stateful:
    """Objects with both methods, such as loaders, schedulers and scalers; never looked into.

    What state_dict returns is captured by value, so a dict that aliases the object's internals is safe.
    """

    divisible = False
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return callable(getattr(cls, "state_dict", None)) and callable(getattr(cls, "load_state_dict", None))

    def capture(self, value: object, path: str, into: Capturing) -> object:
        into.note(path, "captured", type(value).__name__, "by its state_dict")
        return into.value(cast("Callable[[], object]", value.state_dict)(), path)  # type: ignore[attr-defined]

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        new = ctx.fresh(node, path)

        def build(m: Materializer) -> object:
            value = new(m)
            for engine in ctx.dispatch.engines.values():
                value = engine.like(live.state_dict, value)  # type: ignore[attr-defined]
            return value

        ctx.act(Stage.OBJECTS, build, live.load_state_dict)  # type: ignore[attr-defined]
        return lambda m: live
