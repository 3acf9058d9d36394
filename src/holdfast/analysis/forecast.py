"""From what is given, measured and assumed to simulated runs, each figure with where it comes from."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from holdfast.analysis.costs import Figures, Measured, Speed, copy_speed
from holdfast.core.errors import PolicyError
from holdfast.core.units import format_bytes, format_seconds
from holdfast.policies.arguments import amount
from holdfast.policies.best import Best
from holdfast.policies.places import Price, Sizes
from holdfast.policies.retention import Demote
from holdfast.policies.rules import Rule
from holdfast.policies.simulate import Costs, Metrics, Scenario, Workload, stride_of

__all__ = [
    "Assumption",
    "Given",
    "assume",
    "evaluations",
    "list_price",
    "pair_rules",
    "parse_mirror",
    "parse_price",
    "price_of",
]

EVALUATIONS = 200  # of a metric in a run, where rules ask for one
WRITE_BYTES_PER_SECOND = 500_000_000  # where nothing was measured
READ_BYTES_PER_SECOND = 1_000_000_000
# What the services listed for their standard class in one region (us-east-1, us-central1, East US) in 2025, in dollars.
_LISTED = {"s3": Price(0.023, 0.005), "gs": Price(0.020, 0.005), "az": Price(0.0208, 0.0065)}


@dataclass(frozen=True, slots=True)
class Given(Figures):
    """What the user said, also of the time that a restart takes, in seconds."""

    restart: float | None = None


@dataclass(frozen=True, slots=True)
class Assumption:
    """A figure that the plan stands on, in words, and where it comes from."""

    name: str
    value: str
    origin: str


_NAMES = {
    "state": "state",
    "changed": "changes between saves",
    "weights": "weights in the state",
    "step_seconds": "a step",
    "held": "a save holds training",
    "durable": "a save is durable after",
    "load": "loading",
    "restart": "restarting",
    "mtbf": "between failures",
}


def assume(
    given: Given, measured: Measured | None, speed: Speed | None, hours: float
) -> tuple[Workload, Costs, tuple[Assumption, ...]]:
    """Return the run and its costs: what is given, else what was measured, else what is assumed.

    Raises:
        PolicyError: nothing says how large the state is, or a figure makes no sense.
    """
    known = Measured() if measured is None else measured
    figures: dict[str, float] = {}
    origins: dict[str, str] = {}
    for name in (f.name for f in fields(Given)):
        told, found = getattr(given, name), getattr(known, name, None)
        if told is not None:
            figures[name], origins[name] = told, "given"
        elif found is not None:
            figures[name], origins[name] = found, known.origins[name]
    if "state" not in figures:
        raise PolicyError("how large is the state? Give its size (--state 10GB), or a run that has one")
    _fill(figures, origins, speed)
    state = int(figures["state"])
    sizes = Sizes(state, figures["changed"], figures["weights"])
    steps = max(1, round(amount("hours", hours) * 3600 / amount("step-seconds", figures["step_seconds"])))
    per_step = (known.epoch_steps, known.step_samples, known.step_tokens)
    costs = Costs(*(figures[n] for n in ("held", "durable", "load", "restart", "mtbf")))
    said = tuple(Assumption(_NAMES[n], _value(n, figures[n]), origins[n]) for n in _NAMES)
    return Workload(steps, figures["step_seconds"], sizes, *per_step), costs, said


def _fill(figures: dict[str, float], origins: dict[str, str], speed: Speed | None) -> None:
    """Put in what nobody said and nothing told."""

    def put(name: str, value: float, origin: str = "assumed") -> None:
        if name not in figures:
            figures[name], origins[name] = value, origin

    state = figures["state"]
    put("changed", 1.0)
    put("weights", 1 / 3)
    put("step_seconds", 1.0)
    put("restart", 60.0)
    put("mtbf", 24 * 3600.0)
    if "held" not in figures:
        rate = copy_speed()
        put("held", state / rate, f"measured: memory is copied at {format_bytes(round(rate))}/s")
    new = state * figures["changed"]
    if speed is not None:
        told = f"measured: the store takes {format_bytes(round(speed.write))}/s"
        put("durable", speed.latency + new / speed.write, told)
        put("load", state / speed.read, f"measured: the store gives {format_bytes(round(speed.read))}/s")
    put("durable", new / WRITE_BYTES_PER_SECOND, f"assumed: {format_bytes(WRITE_BYTES_PER_SECOND)}/s")
    put("load", state / READ_BYTES_PER_SECOND, f"assumed: {format_bytes(READ_BYTES_PER_SECOND)}/s")


def _value(name: str, value: float) -> str:
    if name == "state":
        return format_bytes(int(value))
    return f"{value:.1%}" if name in ("changed", "weights") else format_seconds(value)


def evaluations(scenarios: Sequence[Scenario], steps: int) -> tuple[Metrics, tuple[str, ...]]:
    """Return a course of every metric that rules speak of, and their names: better ever more slowly, and noisily.

    The same at each call, so that rule sets are compared under the same luck.
    """
    rules = [r for s in scenarios for r in (s.save, *(p.keep for p in s.places if p.keep is not None))]
    signs: dict[str, int] = {}
    for rule in rules:
        for leaf in _leaves(rule):
            if isinstance(leaf, Best):
                signs.setdefault(leaf.metric, 1 if leaf.mode == "min" else -1)
    stride = stride_of(steps)
    gap = max(1, steps // EVALUATIONS // stride) * stride

    def metrics(step: int) -> Mapping[str, float]:
        if not signs or not step or step % gap:
            return {}
        falling = math.exp(-3 * step / steps)
        return {
            name: sign * (falling + 0.03 * random.Random(f"{name} {step}").gauss(0, 1))
            for name, sign in signs.items()
        }

    return metrics, tuple(signs)


def _leaves(rule: Rule) -> Iterator[Rule]:
    """Yield the rules that a rule is made of, those inside `demote` too."""
    for leaf in rule.leaves():
        yield leaf
        if isinstance(leaf, Demote):
            yield from _leaves(leaf.rule)


def pair_rules(save: list[str], keep: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of rules to compare: one of the two may stand for all of the other."""
    many = max(len(save), len(keep))
    if not {len(save), len(keep)} <= {1, many}:
        raise PolicyError(
            f"{len(save)} --save and {len(keep)} --keep do not make pairs; give as many of both, or one of them"
        )
    return list(zip(save * (many // len(save)), keep * (many // len(keep)), strict=True))


def parse_mirror(text: str) -> tuple[str, str | None]:
    """Return a mirror's URL and the text of its rule, from `URL` or `URL=RULE`."""
    url, equals, rule = text.partition("=")
    if not url or (equals and not rule.strip()):
        raise PolicyError(
            f"mirror {text!r} is not understood; write URL, or URL=RULE as in 's3://b/run=last(3)'"
        )
    return url, rule or None


def parse_price(text: str) -> tuple[str, Price]:
    """Return the place that a price is for and the price, from `PLACE=GB_MONTH` or `PLACE=GB_MONTH/THOUSAND_WRITES`."""
    place, _, figures = text.rpartition("=")
    month, _, writes = figures.partition("/")
    try:
        price = Price(float(month), float(writes or 0))
    except ValueError:
        price = Price(-1)
    if not place or not (0 <= price.gb_month < math.inf and 0 <= price.thousand_writes < math.inf):
        raise PolicyError(
            f"price {text!r} is not understood; write PLACE=DOLLARS for a GB and month, as in s3=0.023, and behind a "
            "slash what a thousand writes cost"
        )
    return place, price


def price_of(place: str, given: Mapping[str, Price]) -> Price:
    """Return what a place charges: by the longest given name that its own begins with, else what is listed."""
    fitting = [name for name in given if place.startswith(name)]
    return given[max(fitting, key=len)] if fitting else list_price(place)


def list_price(place: str) -> Price:
    """Return what the service of a URL lists, nothing for a directory."""
    return _LISTED.get(place.partition("://")[0], Price())
