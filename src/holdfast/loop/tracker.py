"""The tracker: where training stands, what was observed, and what the policies make of it.

Everything here is a fold over the run log; `rewind` rebuilds it, so nothing a policy needs is lost on a resume.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

from holdfast.core.clock import Clock, TimeSource, check_count
from holdfast.core.errors import PolicyError
from holdfast.core.records import Moment, Observation
from holdfast.format.events import Event, Observed
from holdfast.format.manifest import clock_from_doc, clock_to_doc, floats_from_doc, floats_to_doc
from holdfast.policies import EarlyStopping, Rule, Verdict, decide, require_stopping
from holdfast.policies.best import Best, monitored
from holdfast.policies.grids import Grid
from holdfast.policies.moments import Auto, On, WhenIdle
from holdfast.policies.rules import AllOf, AnyOf, AtMost, Not, Window

__all__ = ["Tracker", "metric_number"]

KNOWN_RULES = (Grid, On, Best, WhenIdle, Auto, AnyOf, AllOf, Window, AtMost)

logger = logging.getLogger("holdfast")


class Tracker:
    """Advances the clock at safe points and asks the policies. One that does not judge leaves it to another process
    what new observations mean for early stopping; what the log holds means the same everywhere."""

    def __init__(
        self, save: Rule | None, stop: EarlyStopping | None, time: TimeSource, *, judges: bool = True
    ) -> None:
        stop = require_stopping(stop) if stop is not None else None
        self._judges = judges
        self._save = save
        self._stop = stop
        self._time = time
        self.clock = Clock()
        self.last_save = Clock()
        self.save_seconds: float | None = None
        self.verdict: Verdict | None = None
        self.metrics: dict[str, float] = {}  # what was observed at this very step
        self._pending: dict[str, float] = {}
        self._history: tuple[Observation, ...] = ()
        self._fold = stop.start() if stop is not None else None
        self._counted = {"samples": 0, "tokens": 0}
        self._since = time.monotonic()
        self._warned: set[str] = set()
        self._monitored = monitored(save) if save is not None else frozenset[str]()
        self._monitored |= {stop.metric} if stop is not None else set()
        if save is not None:
            _check_events(save, monitors=bool(self._monitored), stops=stop is not None, tell=judges)

    def rewind(self, events: Iterable[Event], clock: Clock, last_save: Clock) -> None:
        """Set the clock, and fold the run's observations up to it afresh."""
        self.clock, self.last_save = clock, last_save
        self.verdict, self.metrics, self._pending, self._history = None, {}, {}, ()
        self._fold = self._stop.start() if self._stop is not None else None
        self._since = self._time.monotonic()
        end = clock_to_doc(clock)
        for event in events:
            if isinstance(event, Observed) and event.attempt is None and event.clock <= end:
                at = clock_from_doc(event.clock)
                values = floats_from_doc(event.metrics)
                self._judge([Observation(m, v, at) for m, v in values.items()])
                if at.step == clock.step:
                    self.metrics |= values

    def log(self, values: Mapping[str, object]) -> None:
        """Take metrics of the present step; the next safe point records them.

        Raises:
            PolicyError: a value is not a number.
        """
        for name, value in values.items():
            self._pending[name] = metric_number(name, value)

    def count(self, *, samples: int = 0, tokens: int = 0) -> None:
        """Add to the clock's counts of samples and tokens; they take effect at the next safe point."""
        for name, n in (("samples", samples), ("tokens", tokens)):
            self._counted[name] += check_count(name, n)

    def start_timing(self) -> None:
        """Count training time from now on."""
        self._since = self._time.monotonic()

    def advance(
        self, *, step: int, epochs: int, events: frozenset[str], in_flight: bool
    ) -> tuple[Moment, Observed | None]:
        """Move the clock to a safe point; return it, and the log event for what was observed there."""
        now = self._time.monotonic()
        previous = self.clock
        self.clock = Clock(
            step,
            previous.epoch + epochs,
            previous.samples + self._counted["samples"],
            previous.tokens + self._counted["tokens"],
            previous.active_seconds + max(0.0, now - self._since),
        )
        self._since = now
        self._counted = {"samples": 0, "tokens": 0}
        observed, self._pending = self._pending, {}
        self.metrics = {**self.metrics, **observed} if step == previous.step else dict(observed)
        history = self._history
        event = None
        if observed:
            event = Observed(clock_to_doc(self.clock), floats_to_doc(observed))
            if self._judges:
                self._judge([Observation(m, v, self.clock) for m, v in observed.items()])
            if self._monitored & observed.keys():
                events |= {"eval_end"}
            if self.verdict is not None and self.verdict.action in ("stop", "improve"):
                events |= {"stop" if self.verdict.action == "stop" else "improved"}
        moment = Moment(
            previous=previous,
            now=self.clock,
            last_save=self.last_save,
            observed=observed,
            history=history,
            events=events,
            save_in_flight=in_flight,
            save_seconds=self.save_seconds,
        )
        return moment, event

    def reasons(self, moment: Moment) -> tuple[str, ...]:
        """Return why to save at this moment; empty when there is no reason."""
        return decide(self._save, moment) if self._save is not None else ()

    def must_agree(self, moment: Moment) -> bool:
        """Return whether the ranks must decide together at this moment. Every rank finds the same by itself: rules by
        counts and events say the same everywhere, and a monitored metric is logged everywhere in the same steps."""
        if self._monitored & moment.observed.keys():
            return True
        nodes = list(self._save.nodes()) if self._save is not None else []
        if any(isinstance(node, Not) or not isinstance(node, KNOWN_RULES) for node in nodes):
            return True
        return any(
            isinstance(leaf, (Grid, On))
            and getattr(leaf, "unit", "step") != "active_seconds"
            and leaf.fires(moment) is not None
            for leaf in nodes
        )

    def stop_for(self, reason: str) -> None:
        """Take rank 0's verdict that training ends."""
        self.verdict = Verdict("stop", 0, 0, reason)

    def saved(self, seconds: float) -> None:
        """Note that a save was made now and held the training thread for `seconds`."""
        self.last_save = self.clock
        self.save_seconds = seconds if self.save_seconds is None else 0.7 * self.save_seconds + 0.3 * seconds

    def best_rule(self, keep: Rule | None) -> Best | None:
        """Return the rule that says which checkpoint is the best: of the save rule, `keep`, or early stopping."""
        for rule in (self._save, keep):
            for leaf in rule.leaves() if rule is not None else ():
                if isinstance(leaf, Best):
                    return leaf
        return Best(self._stop.metric, self._stop.mode) if self._stop is not None else None

    def _judge(self, observations: list[Observation]) -> None:
        for one in observations:
            if (
                not math.isfinite(one.value)
                and one.metric in self._monitored
                and one.metric not in self._warned
            ):
                self._warned.add(one.metric)
                logger.warning(
                    "metric %r is %s at step %d: it never counts as an improvement; check the loss, the learning rate "
                    "or the data", one.metric, one.value, one.clock.step,
                )  # fmt: skip
            if self._fold is not None and self._stop is not None and one.metric == self._stop.metric:
                self.verdict = self._fold.observe(one)
        if self._save is not None:
            self._history = self._save.relevant((*self._history, *observations))


def _check_events(save: Rule, *, monitors: bool, stops: bool, tell: bool) -> None:
    """Warn of events that never come, as nothing is there that they could come from.

    Raises:
        PolicyError: the rule waits for nothing else.
    """
    never: dict[str, str] = {}
    if not stops:
        never = dict.fromkeys(("improved", "stop"), "is a verdict of early stopping; give stop= as well")
    if not monitors:
        never["eval_end"] = (
            "comes with a metric that save= or stop= speaks of, and they speak of none; "
            "write such as save=best('val_loss', mode='min')"
        )
    leaves = list(save.leaves())
    lost = {leaf: [e for e in leaf.names if e in never] for leaf in leaves if isinstance(leaf, On)}
    why = [f"{leaf!r} never fires on {e!r}, which {never[e]}" for leaf, names in lost.items() for e in names]
    turned = any(isinstance(node, Not) for node in save.nodes())
    if not turned and all(isinstance(leaf, On) and lost[leaf] == [*leaf.names] for leaf in leaves):
        raise PolicyError(f"save={save!r} never fires: {'; '.join(why)}")
    for one in why if tell else ():
        logger.warning("%s", one)


def metric_number(name: str, value: object) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise PolicyError(f"metric {name!r} is {value!r}; expected a number")
    item = getattr(value, "item", None)
    try:
        return float(item() if callable(item) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as e:
        raise PolicyError(f"metric {name!r} is a {type(value).__name__} that is not one number: {e}") from e
