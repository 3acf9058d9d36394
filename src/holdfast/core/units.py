"""Sizes and durations: what a person may write, and how they are shown again."""

from __future__ import annotations

import math
import re

from holdfast.core.errors import PolicyError

__all__ = ["format_bytes", "format_seconds", "parse_bytes", "parse_seconds"]

_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)
_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_SIZES = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SIZES_TEXT = "bytes as a whole number, or text such as '200GB' (powers of 1000) or '1.5GiB' (powers of 1024)"
_DURATIONS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0} | {
    "sec": 1.0,
    "min": 60.0,
}
_DURATIONS_TEXT = "seconds as a number, or text such as '90s', '30m', '2h', '1.5d' or '1w'"


def parse_bytes(size: str | int) -> int:
    """Return a size in bytes.

    `size` is a whole number of bytes, or a number with a unit: `kB MB GB TB PB` count in powers of 1000, `KiB
    MiB GiB TiB PiB` in powers of 1024 (IEC 80000-13); case does not matter. Fractions of a byte are cut off.
    Raises PolicyError for anything else, and for negative sizes.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    number, unit = _split(size) if isinstance(size, str) else (None, "")
    factor = _SIZES.get(unit.lower())
    if number is None or factor is None or not math.isfinite(float(number)):
        raise PolicyError(f"size {size!r} is not understood; expected {_SIZES_TEXT}")
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def format_bytes(size: int) -> str:
    """Return a size as people read it, in powers of 1000: `format_bytes(1_500_000)` is `'1.5 MB'`."""
    value, unit = float(size), 0
    while round(abs(value), 1) >= 1000 and unit < len(_DECIMAL) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.1f} {_DECIMAL[unit]}"


def parse_seconds(duration: str | float) -> float:
    """Return a duration in seconds.

    `duration` is a number of seconds, or a number with one of the units `ms s m h d w` (also `sec`, `min`).
    Raises PolicyError for anything else, and for negative, infinite or NaN durations.
    """
    if isinstance(duration, (int, float)) and not isinstance(duration, bool):
        seconds = float(duration)
    else:
        number, unit = _split(duration) if isinstance(duration, str) else (None, "")
        factor = _DURATIONS.get(unit.lower())
        if number is None or factor is None:
            raise PolicyError(f"duration {duration!r} is not understood; expected {_DURATIONS_TEXT}")
        seconds = float(number) * factor
    if not math.isfinite(seconds) or seconds < 0:
        raise PolicyError(f"duration {duration!r} is negative or not finite; expected {_DURATIONS_TEXT}")
    return seconds


def format_seconds(seconds: float) -> str:
    """Return a duration as people read it, in its two largest units: `format_seconds(5400)` is `'1h 30m'`."""
    if abs(seconds) < 60:
        return f"{round(seconds * 1000)}ms" if abs(seconds) < 1 else f"{seconds:.3g}s"
    rest, parts = round(abs(seconds)), list[str]()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break
    return ("-" if seconds < 0 else "") + " ".join(parts[:2])


def _split(text: str) -> tuple[str | None, str]:
    found = _NUMBER.fullmatch(text)
    return (found[1], found[2]) if found else (None, "")
