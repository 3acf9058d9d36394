"""Checks of what people pass to policies: each returns the value, or says in one sentence what is wrong."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

from holdfast.core.errors import PolicyError
from holdfast.core.units import is_finite

__all__ = ["Mode", "amount", "metric_name", "number", "only_one", "optimisation_mode", "whole"]

Mode = Literal["min", "max"]


def whole(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` as an int; integers of numpy count, and whole floats such as `1e9`. Raises PolicyError below
    `minimum`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise PolicyError(f"{name}={value!r} must be a whole number of at least {minimum}")
    return int(value)


def amount(name: str, value: object, *, zero: bool = False) -> float:
    """Return `value` as a finite float above zero, or at least zero with `zero=True`. Raises PolicyError."""
    wanted = "a finite number of at least 0" if zero else "a finite number above 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
        raise PolicyError(f"{name}={value!r} must be {wanted}")
    if value < 0 or (value == 0 and not zero):
        raise PolicyError(f"{name}={value!r} must be {wanted}")
    return float(value)


def number(name: str, value: object) -> float:
    """Return `value` as a finite float of either sign. Raises PolicyError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
        raise PolicyError(f"{name}={value!r} must be a finite number")
    return float(value)


def only_one(constructor: str, given: dict[str, float | None]) -> tuple[str, float]:
    """Return the one parameter that is not None. Raises PolicyError if there is none, or more than one."""
    found = [(name, value) for name, value in given.items() if value is not None]
    if len(found) != 1:
        got = ", ".join(f"{name}={value!r}" for name, value in found) or "none"
        raise PolicyError(f"{constructor}() takes exactly one of {', '.join(given)}; found {got}")
    return found[0]


def metric_name(metric: object) -> str:
    """Return `metric` if it can name a metric. Raises PolicyError."""
    if not isinstance(metric, str) or not metric:
        raise PolicyError(f"metric={metric!r} must be the name of a metric, such as 'val_loss'")
    return metric


def optimisation_mode(metric: str, mode: object) -> Mode:
    """Return `mode`. Raises PolicyError unless it is "min" or "max": it is never guessed from a name."""
    if mode == "min":
        return "min"
    if mode == "max":
        return "max"
    raise PolicyError(
        f"mode={mode!r} of metric {metric!r} must be 'min' (lower is better) or 'max' (higher is better)"
    )
