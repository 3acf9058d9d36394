"""Capture live objects: a detached tree of plain values, and tensors whose bytes are still to be copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

from holdfast.core.errors import StateError
from holdfast.state.capturing import Capturing
from holdfast.state.registry import dispatch, parameters
from holdfast.state.reports import CaptureReport
from holdfast.state.tensors import TensorSource
from holdfast.state.trace import Trace

__all__ = ["CaptureReport", "Captured", "capture"]


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured state.

    `tree` holds, for each top-level key, a value that `format.values.encode_value` accepts and that shares
    nothing mutable with the live objects. `tensors` are the live tensors its `TensorLeaf`s name, each
    memory once; `aliases` maps the names of further places of the same tensor to the stored name.
    `survey` is what `registry.parameters` said of the state.
    """

    tree: dict[str, object]
    tensors: list[TensorSource]
    aliases: dict[str, str]
    report: CaptureReport
    survey: tuple[Mapping[int, str], Set[int]]


def capture(
    state: Mapping[str, object],
    *,
    gradients: bool = False,
    anew: Collection[str] = (),
    trace: Trace | None = None,
) -> Captured:
    """Capture everything the objects in `state` hold, by user name.

    Changes nothing, draws no random number and copies no tensor: `Transfer` does, and must before the
    live tensors change. `gradients` adds the .grad of module parameters. A `trace` is written for
    `state.recapture`, and puts holes into the tree; `anew` are the keys whose values are made for this capture.

    Raises:
        UnsupportedValue: something cannot be stored without running code at load; names its path and the
            remedy. StateError: a top-level key is no plain name.
    """
    for key in state:
        if not isinstance(key, str) or not key or "/" in key:
            raise StateError(f"state key {key!r}: expected a non-empty string without '/'; rename it")
    names, updated = parameters(state)
    found = Capturing(dispatch(), names, updated, gradients=gradients, trace=trace)

    def parts() -> dict[str, object]:
        return {k: (found.anew if k in anew else found.value)(v, k) for k, v in state.items()}

    tree = parts() if trace is None else trace.begin(state, parts)
    return Captured(tree, found.tensors, found.aliases, found.report, (names, updated))
