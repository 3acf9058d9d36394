"""How sizes, times, clocks, metrics and shapes are put in words."""

from __future__ import annotations

import time
from datetime import datetime

from holdfast.core.clock import Clock
from holdfast.core.units import format_bytes, format_count, format_seconds
from holdfast.state.tensors import TensorSpec

__all__ = ["age", "bytes_", "clock_document", "count", "date", "number", "spec_document", "tensor"]


def bytes_(size: int) -> str:
    """Return a size in bytes as people read it."""
    return format_bytes(size)


def age(then: float) -> str:
    """Return how long ago a time was, in one unit or two."""
    passed = time.time() - then
    if passed < -60:
        return date(then)  # written by a clock that is ahead of ours
    if passed < 2:
        return "just now"
    larger, *smaller = format_seconds(round(passed)).split()
    return " ".join([larger, *(smaller if larger[-1] in "hd" else ()), "ago"])


def date(then: float) -> str:
    """Return a time as a date in the local time zone."""
    try:
        return datetime.fromtimestamp(then).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    except (ValueError, OverflowError, OSError):
        return "after the year 9999" if then > 0 else "before the year 1"


def number(value: float | int | None) -> str:
    """Return a number with the digits that matter for a look."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def count(n: int, what: str, many: str = "") -> str:
    """Return a count with its noun."""
    return format_count(n, what, many)


def tensor(spec: TensorSpec) -> str:
    """Return element type and shape."""
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"


def clock_document(clock: Clock) -> dict[str, object]:
    """Return the clock for JSON."""
    return {
        "step": clock.step,
        "epoch": clock.epoch,
        "samples": clock.samples,
        "tokens": clock.tokens,
        "active_seconds": clock.active_seconds,
    }


def spec_document(spec: TensorSpec) -> dict[str, object]:
    """Return what a tensor is, for JSON."""
    return {"dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes}
