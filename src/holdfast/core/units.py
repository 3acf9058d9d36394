"""Sizes, durations and counts: what a person may write, and how they are shown."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection

from holdfast.core.errors import PolicyError

__all__ = [
    "exact_bytes",
    "exact_seconds",
    "format_bytes",
    "format_count",
    "format_seconds",
    "format_steps",
    "is_finite",
    "parse_bytes",
    "parse_seconds",
]

_DIGITS = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)"
_NUMBER = re.compile(rf"{_DIGITS}\s*([A-Za-z]*)", re.ASCII)
_SEVERAL = re.compile(rf"{_DIGITS}\s*[A-Za-z]+(?:\s*{_DIGITS}\s*[A-Za-z]+)*", re.ASCII)
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
_DURATIONS_TEXT = "seconds as a number, or text such as '90s', '30m', '1h 30m', '1.5d' or '1w'"


def is_finite(value: float) -> bool:
    """Return whether a number is finite also as a float: no NaN, no infinity, and no integer beyond its range."""
    return abs(value) <= sys.float_info.max


def parse_bytes(size: str | int) -> int:
    """Return a size in bytes.

    `size` is a whole number of bytes, or a number with a unit: `kB MB GB TB PB` count in powers of 1000, `KiB
    MiB GiB TiB PiB` in powers of 1024 (IEC 80000-13); case does not matter. Fractions of a byte are cut off.
    Raises PolicyError for anything else, and for negative sizes.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0 and is_finite(size):
        return size
    number, unit = _split(size) if isinstance(size, str) else (None, "")
    factor = _SIZES.get(unit.lower())
    if number is None or factor is None or not is_finite(float(number)):
        raise PolicyError(f"size {size!r} is not understood; expected {_SIZES_TEXT}")
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def format_bytes(size: int) -> str:
    """Return a size as people read it, in powers of 1000: `format_bytes(1_500_000)` is `'1.5 MB'`."""
    value, unit = float(size), 0
    while round(abs(value), 1) >= 1000 and unit < len(_DECIMAL) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.1f} {_DECIMAL[unit]}"


def format_count(n: int, what: str, many: str = "") -> str:
    """Return a count with its noun: `format_count(1, "step")` is `'1 step'`."""
    return f"{n:,} {what if n == 1 else many or what + 's'}"


def format_steps(steps: Collection[int]) -> str:
    """Return steps by their numbers: `'step 3'`, `'steps 3, 4'`."""
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(map(str, steps))}"


def exact_bytes(size: int) -> str | int:
    """Return a size as people read it where that is exact, else the number, for `parse_bytes`."""
    text = format_bytes(size)
    return text if parse_bytes(text) == size else size


def parse_seconds(duration: str | float) -> float:
    """Return a duration in seconds.

    `duration` is a number of seconds, or text of numbers with the units `ms s m h d w` (also `sec`, `min`),
    which add up: "1h 30m". Raises PolicyError for anything else, and for negative, infinite or NaN durations.
    """
    if isinstance(duration, (int, float)) and not isinstance(duration, bool):
        seconds = float(duration) if is_finite(duration) else math.inf
    else:
        parts = _parts(duration) if isinstance(duration, str) else []
        if not parts or any(unit not in _DURATIONS for _, unit in parts):
            raise PolicyError(f"duration {duration!r} is not understood; expected {_DURATIONS_TEXT}")
        seconds = sum(number * _DURATIONS[unit] for number, unit in parts)
    if not is_finite(seconds) or seconds < 0:
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


def exact_seconds(seconds: float) -> str | float:
    """Return a duration as people read it where that is exact, else the number, for `parse_seconds`."""
    text = format_seconds(seconds)
    return text if seconds >= 0 and parse_seconds(text) == seconds else seconds


def _parts(text: str) -> list[tuple[float, str]]:
    text = text.strip()
    if _NUMBER.fullmatch(text) is None and _SEVERAL.fullmatch(text) is None:
        return []
    return [(float(number), unit.lower()) for number, unit in _NUMBER.findall(text)]


def _split(text: str) -> tuple[str | None, str]:
    found = _NUMBER.fullmatch(text.strip())
    return (found[1], found[2]) if found else (None, "")
