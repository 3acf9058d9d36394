"""Early stopping as a fold: the verdict follows from the observations and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from holdfast.core.errors import PolicyError
from holdfast.core.records import Observation
from holdfast.policies.arguments import Mode, amount, metric_name, number, optimisation_mode, whole
from holdfast.policies.metrics import improves
from holdfast.policies.peers import PEERS, Peer, better, improves_like, single, worst

__all__ = ["EarlyStopping", "StopAction", "StoppingFold", "Verdict", "require_stopping"]

StopAction: TypeAlias = Literal["continue", "improve", "wait", "stop"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What early stopping says after an observation.

    `action` is "continue" (nothing to judge yet), "improve", "wait" or "stop". `waited` counts the judged
    observations since the last improvement. `best` is the best finite value seen so far, at `best_step`; None
    before the first.
    """

    action: StopAction
    waited: int
    patience: int
    reason: str
    best: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Stop training when a metric no longer improves.

    The rule is a value without state: what it says about a run follows from the run's observations, so a
    resumed run counts on where it was, and a changed patience takes effect at once. A verdict is not latched:
    an improvement after "stop" is "improve" again.

    - `mode`: "min" or "max"; never guessed.
    - `patience`: how many observations in a row may fail to improve; the last of them stops. 0 is the same as
      1.
    - `min_delta`: an improvement must be larger than this, in units of the metric, or with `relative=True` as
      a fraction of the reference. Equal values are no improvement.
    - `reference`: what a value is compared with: "last_significant", the last value that improved by
      `min_delta`, or "best_ever", which small gains move as well, so that a slow drift stops (Hugging Face).
    - `start_after`: how many observations to let pass before judging; `start_after_epoch`: judge none before
      this many epochs are finished and one more has ended.
    - `baseline`: improvements reset the count only if they also beat this value.
    - `target`: stop as soon as a value is at least this good. `diverge`: stop when a value is worse than
      this.
    - `non_finite`: "stop" on NaN or infinity, or "ignore", which counts them as no improvement.
    - `like`: the program whose comparisons apply, to the last bit; set by `holdfast.policies.presets`.

    Raises PolicyError for settings that make no sense.
    """

    metric: str
    mode: Mode = field(kw_only=True)
    patience: int = field(kw_only=True)
    min_delta: float = field(default=0.0, kw_only=True)
    relative: bool = field(default=False, kw_only=True)
    reference: Literal["last_significant", "best_ever"] = field(default="last_significant", kw_only=True)
    start_after: int = field(default=0, kw_only=True)
    start_after_epoch: int = field(default=0, kw_only=True)
    baseline: float | None = field(default=None, kw_only=True)
    target: float | None = field(default=None, kw_only=True)
    diverge: float | None = field(default=None, kw_only=True)
    non_finite: Literal["stop", "ignore"] = field(default="stop", kw_only=True)
    like: Peer = field(default="holdfast", kw_only=True)

    def __post_init__(self) -> None:
        optimisation_mode(metric_name(self.metric), self.mode)
        for name in ("patience", "start_after", "start_after_epoch"):
            object.__setattr__(self, name, whole(name, getattr(self, name), minimum=0))
        amount("min_delta", self.min_delta, zero=True)
        for name in ("baseline", "target", "diverge"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        _one_of("reference", self.reference, ("last_significant", "best_ever"))
        _one_of("non_finite", self.non_finite, ("stop", "ignore"))
        _one_of("like", self.like, PEERS)
        if self.like != "holdfast" and (
            self.relative or (self.reference == "best_ever") != (self.like == "hf")
        ):
            raise PolicyError(
                f"like={self.like!r} does not go with relative={self.relative} and "
                f"reference={self.reference!r}; use the functions of holdfast.policies.presets"
            )
        if (
            self.target is not None
            and self.diverge is not None
            and not better(self.target, self.diverge, self.mode)
        ):
            raise PolicyError(
                f"target={self.target!r} must be better than diverge={self.diverge!r} for mode={self.mode!r}"
            )

    def start(self) -> StoppingFold:
        """Return a fold that has seen nothing; it gives a verdict per observation, in constant time."""
        return StoppingFold(self)

    def verdict(self, observations: Iterable[Observation]) -> Verdict:
        """Return the verdict after all the observations, oldest first; other metrics are passed over."""
        fold = self.start()
        for observation in observations:
            fold.observe(observation)
        return fold.verdict


class StoppingFold:
    """The running state of an `EarlyStopping`: what a verdict needs to know about the observations so far."""

    __slots__ = ("_best", "_reference", "_seen", "_waited", "rule", "verdict")

    def __init__(self, rule: EarlyStopping) -> None:
        self.rule = rule
        self._seen = 0
        self._waited = 0
        self._reference: float | None = None
        self._best: Observation | None = None
        self.verdict = self._say("continue", f"no value of {rule.metric} yet")

    def observe(self, observation: Observation) -> Verdict:
        """Return the verdict after one more observation; one of another metric changes nothing."""
        rule = self.rule
        if observation.metric != rule.metric:
            return self.verdict
        if improves(observation.value, None if self._best is None else self._best.value, rule.mode):
            self._best = observation
        self._seen += 1
        too_early = rule.start_after_epoch > 0 and observation.clock.epoch <= rule.start_after_epoch
        warming_up = self._seen <= rule.start_after or too_early
        if warming_up:
            self.verdict = self._say("continue", f"{rule.metric} is not judged before its start")
        else:
            # Lightning logs metrics as tensors of single precision.
            value = single(observation.value) if rule.like == "lightning" else observation.value
            self.verdict = self._out_of_bounds(value) or self._judge(value)
        return self.verdict

    def _out_of_bounds(self, value: float) -> Verdict | None:
        rule = self.rule
        shown = f"{rule.metric} = {value:.6g}"
        if rule.non_finite == "stop" and not math.isfinite(value):
            return self._say("stop", f"{shown} is not finite")
        if rule.target is not None and self._reaches(value, rule.target):
            return self._say("stop", f"{shown} reached the target {rule.target:.6g}")
        if rule.diverge is not None and self._beyond(value, rule.diverge):
            return self._say("stop", f"{shown} is worse than {rule.diverge:.6g}")
        return None

    def _reaches(self, value: float, target: float) -> bool:
        if self.rule.like == "lightning":
            return better(value, single(target), self.rule.mode)
        return value == target or better(value, target, self.rule.mode)

    def _beyond(self, value: float, bound: float) -> bool:
        return better(single(bound) if self.rule.like == "lightning" else bound, value, self.rule.mode)

    def _judge(self, value: float) -> Verdict:
        rule, before = self.rule, self._reference
        improved = self._improves(value, before)
        self._reference = self._next_reference(value, improved)
        self._waited += 1
        if improved:
            if rule.baseline is None or self._improves(value, rule.baseline):
                self._waited = 0
            was = "first value" if before is None else f"was {before:.6g}"
            return self._say("improve", f"{rule.metric} improved to {value:.6g} ({was})")
        best = "nothing" if before is None else f"{before:.6g}"
        counted = f"{rule.metric} = {value:.6g} does not improve on {best}: {self._waited} of {rule.patience}"
        return self._say("stop" if self._waited >= rule.patience else "wait", counted)

    def _improves(self, value: float, reference: float | None) -> bool:
        rule = self.rule
        if rule.like == "holdfast":
            return improves(value, reference, rule.mode, rule.min_delta, rule.relative)
        return improves_like(rule.like, value, reference, rule.mode, rule.min_delta)

    def _next_reference(self, value: float, improved: bool) -> float | None:
        rule, before = self.rule, self._reference
        if rule.like == "hf":
            # The trainer starts at infinity, and moves on any gain (`Trainer._determine_best_metric`).
            start = worst(rule.mode) if before is None else before
            return value if better(value, start, rule.mode) else start
        gained = improved or (rule.reference == "best_ever" and improves(value, before, rule.mode))
        return value if gained else before

    def _say(self, action: StopAction, reason: str) -> Verdict:
        best = (None, None) if self._best is None else (self._best.value, self._best.clock.step)
        return Verdict(action, self._waited, self.rule.patience, reason, *best)


def require_stopping(rule: object) -> EarlyStopping:
    """Return `rule` if it can say when to stop. Raises PolicyError that names what it is instead."""
    if not isinstance(rule, EarlyStopping):
        raise PolicyError(
            f"stop={rule!r} is a {type(rule).__name__}; expected EarlyStopping("
            "'val_loss', mode='min', patience=5) or what a function of holdfast.policies.presets gives"
        )
    return rule


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PolicyError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
