"""How often to save: the interval that loses the least time, and how much is lost at any other.

Failures come at random with a mean time between them (an exponential distribution). Saving costs `save_seconds` of
training each time; a failure costs what was trained since the last save, and `recovery_seconds` to be training again.
Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly,
"A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["best_interval", "daly_interval", "expected_seconds", "wasted", "young_interval"]

SHORTEST_SECONDS = 1.0
_LARGEST_EXPONENT = 700.0  # of e, in a double


def young_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return Young's first-order optimum, from one save to the next: sqrt(2 * cost * mean time between failures)."""
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def daly_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return Daly's higher-order optimum (his equation 37), from one save to the next, the time it takes included.

    Where a save costs twice the mean time between failures or more, it is that mean time and the save.
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds + save_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    return young_interval(save_seconds, mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9)


def best_interval(save_seconds: float, mtbf_seconds: float, max_overhead: float) -> float:
    """Return the seconds between saves that lose the least time to saving and to failures together.

    That is Daly's interval, stretched so that saving takes no more than the fraction `max_overhead` of the time; at
    least one second.
    """
    least_lost = daly_interval(save_seconds, mtbf_seconds)
    return max(least_lost, save_seconds / max_overhead, SHORTEST_SECONDS)


def expected_seconds(period: float, mtbf_seconds: float, recovery_seconds: float) -> float:
    """Return how long it takes, on average, to get through one period (training, then a save) with failures.

    A failure anywhere in it, or in the recovery from one, starts it again after a recovery (Daly's complete model,
    his equation 13).
    """
    exponent = period / mtbf_seconds + recovery_seconds / mtbf_seconds
    if exponent > _LARGEST_EXPONENT:
        return math.inf
    return mtbf_seconds * math.exp(recovery_seconds / mtbf_seconds) * math.expm1(period / mtbf_seconds)


def wasted(
    periods: Iterable[float], save_seconds: float, mtbf_seconds: float, recovery_seconds: float
) -> float:
    """Return the share of all time that is no progress, 0 to 1, when saves are these periods apart."""
    useful = needed = 0.0
    for period in periods:
        useful += max(0.0, period - save_seconds)
        needed += expected_seconds(period, mtbf_seconds, recovery_seconds)
    return 1 - useful / needed if needed else 0.0
