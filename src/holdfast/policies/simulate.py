"""A whole run played through: the real triggers say when to save, the real retention what stays, in every place.

Nothing is stored and nothing waits. The run has no failures; what failures would cost follows from when its saves were
(`policies.optimum`). Time counts in seconds from the run's beginning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies.arguments import amount
from holdfast.policies.best import Best, monitored
from holdfast.policies.metrics import best_of
from holdfast.policies.optimum import wasted
from holdfast.policies.places import Place, Sizes, Stay, Storage
from holdfast.policies.plan import decide, relevant, require_trigger
from holdfast.policies.rules import Rule

__all__ = ["Costs", "Metrics", "Outcome", "Scenario", "Workload", "simulate", "stride_of"]

MAX_MOMENTS = 200_000
START = 1_767_571_200.0  # Monday 5 January 2026, midnight UTC: calendar rules have whole days and weeks
SMOOTHING = 0.3  # of the measured cost of a save, as in a run

Metrics = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Costs:
    """What saving and failing cost, in seconds. Raises PolicyError for what is negative, and without a time between
    failures.

    A save holds training for `held`, and is durable `durable` after it was begun. After a failure it takes `restart`
    until the program runs again, and `load` until its state is there. `mtbf` is the mean time between failures.
    """

    held: float
    durable: float
    load: float
    restart: float
    mtbf: float

    def __post_init__(self) -> None:
        for name in ("held", "durable", "load", "restart"):
            amount(name, getattr(self, name), zero=True)
        amount("mtbf", self.mtbf)

    @property
    def recovery(self) -> float:
        """From a failure until training goes on; what was not yet durable then is trained again as well."""
        return self.restart + self.load + self.durable


@dataclass(frozen=True, slots=True)
class Workload:
    """The run: how many steps, how long each is, and its state's size. Counts per step are for rules that use them.

    Raises:
        PolicyError: it has no length.
    """

    steps: int
    step_seconds: float
    sizes: Sizes
    epoch_steps: float = 0.0
    step_samples: float = 0.0
    step_tokens: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not (math.isfinite(self.step_seconds) and self.step_seconds > 0):
            raise PolicyError(
                f"a run of {self.steps} steps of {self.step_seconds} s has no length; both must be above zero"
            )

    def clock(self, step: int, active_seconds: float) -> Clock:
        """Return the run's clock at a step."""
        epoch = int(step / self.epoch_steps) if self.epoch_steps else 0
        return Clock(step, epoch, int(step * self.step_samples), int(step * self.step_tokens), active_seconds)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A set of rules to try: when to save, and the places; the first is the primary, the others mirrors of it."""

    save: Rule
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario. `saves` are the times of all saves, `seconds` the length of the run without failures,
    `overhead` the share of it that saving took, `wasted` the share of all time that is no progress, failures included.
    `periods` are the times between saves; the last one ends with the run."""

    scenario: Scenario
    seconds: float
    saves: tuple[float, ...]
    held_seconds: float
    overhead: float
    wasted: float
    failures: float
    stays: tuple[Stay, ...]
    stride: int = 1

    @property
    def periods(self) -> tuple[float, ...]:
        return _periods(self.saves, self.seconds)

    @property
    def interval(self) -> float:
        """The mean time between saves."""
        return self.seconds / max(1, len(self.saves))


def stride_of(steps: int) -> int:
    """Return how many steps of a run are played at once."""
    return max(1, math.ceil(steps / MAX_MOMENTS))


def simulate(
    scenario: Scenario, workload: Workload, costs: Costs, metrics: Metrics = lambda step: {}
) -> Outcome:
    """Play a run through under some rules. `metrics` gives what is observed at a step.

    A run of very many steps is played in strides of several (`Outcome.stride`), so a save may come up to a stride late.

    Raises:
        PolicyError: a rule cannot serve where it stands.
    """
    training = _Training(scenario, workload, costs, metrics)
    stride = stride_of(workload.steps)
    training.begin()
    for step in range(stride, workload.steps, stride):
        training.boundary(step)
    training.boundary(workload.steps)
    training.end()
    return training.outcome(stride)


@dataclass(slots=True)
class _Training:
    """The loop of the run: as `loop.engine` and `loop.tracker` have it, without anything to train."""

    scenario: Scenario
    workload: Workload
    costs: Costs
    metrics: Metrics
    clock: Clock = field(default_factory=Clock)
    last_save: Clock = field(default_factory=Clock)
    save_seconds: float | None = None
    seconds: float = 0.0
    history: tuple[Observation, ...] = ()
    saves: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    held: float = 0.0
    storage: Storage = field(init=False)
    best: Best | None = field(init=False)
    monitored: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        require_trigger(self.scenario.save)
        self.storage = Storage(self.scenario.places, self.workload.sizes, START)
        rules = [self.scenario.save, self.scenario.places[0].keep]
        leaves = [leaf for rule in rules if rule is not None for leaf in rule.leaves()]
        self.best = next((leaf for leaf in leaves if isinstance(leaf, Best)), None)
        self.monitored = monitored(self.scenario.save)

    def begin(self) -> None:
        self._decide(Clock(), {}, frozenset({"start"}))

    def boundary(self, step: int) -> None:
        """Come to the end of a step."""
        previous = self.clock
        self.seconds += (step - previous.step) * self.workload.step_seconds
        self.clock = self.workload.clock(step, self.seconds)
        events = {"epoch_end"} if self.clock.epoch > previous.epoch else set[str]()
        observed = self.metrics(step)
        if self.monitored & observed.keys():
            events.add("eval_end")
        self._decide(previous, observed, frozenset(events))
        if observed:
            seen = [Observation(name, value, self.clock) for name, value in observed.items()]
            self.history = relevant(self.scenario.save, (*self.history, *seen))

    def end(self) -> None:
        """Save the last state, as a run does, unless that was done."""
        if self.last_save != self.clock:
            self._save(self.metrics(self.clock.step), ("end of training",))
        self.storage.finish()

    def outcome(self, stride: int) -> Outcome:
        costs, seconds = self.costs, self.seconds
        lost = wasted(
            _periods(self.saves, seconds), self.held / max(1, len(self.saves)), costs.mtbf, costs.recovery
        )
        useful = self.workload.steps * self.workload.step_seconds
        needed = useful / (1 - lost) if lost < 1 else math.inf
        return Outcome(
            self.scenario,
            seconds,
            tuple(self.saves),
            self.held,
            self.held / seconds,
            lost,
            needed / costs.mtbf,
            self.storage.stays(seconds),
            stride,
        )

    def _decide(self, previous: Clock, observed: Mapping[str, float], events: frozenset[str]) -> None:
        moment = Moment(
            previous=previous,
            now=self.clock,
            last_save=self.last_save,
            observed=observed,
            history=self.history,
            events=events,
            save_in_flight=bool(self.durable) and self.durable[-1] > self.seconds,
            save_seconds=self.save_seconds,
        )
        reasons = decide(self.scenario.save, moment)
        if reasons:
            self._save(observed, reasons)

    def _save(self, observed: Mapping[str, float], reasons: tuple[str, ...]) -> None:
        """Take a snapshot; it waits while one is being written and another one waits already."""
        begun = self.seconds
        room = self.durable[-2] if len(self.durable) > 1 else 0.0
        held = max(0.0, room - begun) + self.costs.held
        self.saves.append(begun)
        self.held += held
        self.last_save = self.clock
        self.save_seconds = (
            held if self.save_seconds is None else (1 - SMOOTHING) * self.save_seconds + SMOOTHING * held
        )
        self.seconds = begun + held
        durable = max(begun, self.durable[-1] if self.durable else 0.0) + self.costs.durable
        self.durable.append(durable)
        sizes = self.workload.sizes
        record = CheckpointRecord(
            step=self.clock.step,
            attempt=f"{len(self.saves):08x}",
            time=START + begun,
            clock=self.clock,
            metrics=dict(observed),
            reasons=reasons,
            stored_bytes=sizes.state,
            new_bytes=sizes.state if len(self.saves) == 1 else sizes.new,
        )
        self.storage.commit(record, begun, durable, self._label)

    def _label(self, records: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
        """Move the tag "best", which no retention rule drops."""
        found = best_of(records, self.best.metric, self.best.mode) if self.best is not None else None
        best = found[0].attempt if found else ""
        return [
            replace(r, tags=frozenset({"best"} if r.attempt == best else ()))
            if bool(r.tags) != (r.attempt == best)
            else r
            for r in records
        ]


def _periods(saves: Sequence[float], end: float) -> tuple[float, ...]:
    """Return the times from the run's beginning to the first save, between saves, and from the last one to the end."""
    points = [0.0, *saves, end]
    return tuple(b - a for a, b in itertools.pairwise(points) if b > a)
