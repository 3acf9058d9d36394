"""Metric traces: what one metric may do over a run. None is an evaluation without the metric."""

from __future__ import annotations

import math
import random

import pytest

NAN, INF = math.nan, math.inf


def _noise(seed: int, start: float, drift: float, spread: float, length: int = 40) -> list[float | None]:
    source = random.Random(seed)
    return [start + drift * i + source.gauss(0, spread) for i in range(length)]


def _with_holes(seed: int) -> list[float | None]:
    source = random.Random(seed)
    odd: list[float | None] = [NAN, INF, -INF, None]
    return [source.choice(odd) if source.random() < 0.3 else round(source.random(), 2) for _ in range(40)]


TRACES: dict[str, list[float | None]] = {
    "steady": [1.0 - 0.02 * i for i in range(30)],
    "worse and worse": [0.1 + 0.05 * i for i in range(20)],
    "plateau": [0.9, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3],
    "all equal": [0.5] * 15,
    "ties of two": [0.5, 0.4, 0.5, 0.4, 0.4, 0.5, 0.3, 0.3, 0.4, 0.3, 0.3, 0.3],
    "tiny gains": [0.5 - 1e-9 * i for i in range(20)],
    "gains below single precision, then one": [
        1.0,
        1.0 - 1e-9,
        1.0 - 2e-9,
        1.0 - 3e-8,
        1.0 - 6e-8,
        1.0 - 2e-7,
    ]
    * 2,
    "drift below the threshold": [1.0 - 0.009 * i for i in range(40)],
    "drift of exactly the threshold": [1.0 - 0.01 * i for i in range(30)],
    "tenths": [i / 10 for i in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5)],
    "spike": [0.9, 0.8, 0.7, 25.0, 0.69, 0.68, 0.9, 0.9, 0.67, 0.9, 0.9, 0.9, 0.9],
    "one lucky value": [0.9, 0.8, -3.0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    "double descent": [
        1,
        0.6,
        0.4,
        0.5,
        0.6,
        0.7,
        0.6,
        0.5,
        0.4,
        0.3,
        0.2,
        0.1,
        0.15,
        0.15,
        0.15,
        0.15,
        0.15,
    ],
    "oscillation": [0.5 + 0.1 * (-1) ** i for i in range(20)],
    "nan first": [NAN, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
    "nan in the middle": [0.9, 0.8, NAN, 0.7, NAN, NAN, 0.6, 0.65, 0.65, 0.65, 0.65],
    "nan to the end": [0.9, 0.8, NAN, NAN, NAN, NAN, NAN, NAN, NAN],
    "nothing but nan": [NAN] * 10,
    "inf first": [INF, INF, 0.9, 0.8, 0.8, 0.8, 0.8, 0.7],
    "minus inf first": [-INF, 0.9, 0.8, 0.7, -INF, 0.6, 0.6, 0.6, 0.6],
    "inf in the middle": [0.9, INF, 0.8, -INF, 0.7, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4],
    "both infinities and nan": [INF, NAN, -INF, INF, 0.5, NAN, 0.4, -INF, 0.3],
    "missing at times": [None, 0.9, None, 0.8, None, None, 0.8, 0.85, None, 0.85, 0.85, 0.85],
    "always missing": [None] * 6,
    "one value": [0.5],
    "nothing": [],
    "large and small": [1e30, 1e38, 3e38, 1e-30, 1e-38, 1e-45, 0.0, -0.0, 0.0],
    "beyond single precision": [1e39, 1e40, 1e39, 1e38, 1e37, 1e37, 1e37, 1e37],
    "integers": [9, 8, 7, 7, 7, 6, 6, 6, 6, 6, 6],
    "noise": _noise(1, 1.0, 0.0, 0.2),
    "noisy descent": _noise(2, 1.0, -0.02, 0.05),
    "noisy ascent": _noise(3, 0.0, 0.02, 0.05),
    "fine noise": _noise(4, 0.5, 0.0, 0.003),
    "holes 1": _with_holes(5),
    "holes 2": _with_holes(6),
    "holes 3": _with_holes(7),
}


@pytest.fixture(params=TRACES, scope="session")
def trace(request: pytest.FixtureRequest) -> list[float | None]:
    """One trace after the other."""
    return TRACES[request.param]
