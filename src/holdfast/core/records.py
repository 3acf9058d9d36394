"""What policies are told about a run: plain values, no I/O. The catalog fills them, the policies read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.core.clock import Clock

__all__ = ["CheckpointRecord", "Moment", "Observation"]


@dataclass(frozen=True, slots=True)
class Observation:
    """One value of one metric, observed when the run's clock stood at `clock`."""

    metric: str
    value: float
    clock: Clock


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A committed checkpoint as retention and listings see it.

    `time` is wall time in seconds since the Unix epoch; `stored_bytes` is what the whole checkpoint refers to,
    `new_bytes` what it added to the store when it was written.
    """

    step: int
    attempt: str
    time: float
    clock: Clock = field(default_factory=Clock)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    reasons: tuple[str, ...] = ()
    stored_bytes: int = 0
    new_bytes: int = 0
    verified: bool = False
    resumed_from: bool = False
    leased: bool = False
    demoted: bool = False
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """One safe point, as a trigger sees it.

    `previous` is the clock at the safe point before this one, `last_save` the clock of the newest save (all zero
    when there is none). `observed` holds this step's metrics, `history` every observation of this run before them,
    oldest first. `events` are names such as "start", "end", "epoch_end", "preempt", "exception".
    `save_seconds` is the measured cost of a save to the training thread (None before the first one).
    """

    previous: Clock
    now: Clock
    last_save: Clock = field(default_factory=Clock)
    observed: Mapping[str, float] = field(default_factory=dict)
    history: tuple[Observation, ...] = ()
    events: frozenset[str] = frozenset()
    save_in_flight: bool = False
    save_seconds: float | None = None
