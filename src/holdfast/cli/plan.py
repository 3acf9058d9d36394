"""`holdfast plan`: what rules for saving and keeping would cost a run, in money, in bytes and in lost work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.analysis.costs import measure_run, measure_store
from holdfast.analysis.forecast import (
    Assumption,
    Given,
    assume,
    evaluations,
    pair_rules,
    parse_mirror,
    parse_price,
    price_of,
)
from holdfast.analysis.picture import draw_plan, letters
from holdfast.cli.options import Json
from holdfast.cli.output import emit, line, text
from holdfast.cli.table import Column, show_table
from holdfast.cli.words import bytes_, count
from holdfast.core.units import exact_seconds, format_seconds, parse_bytes, parse_seconds
from holdfast.policies.optimum import daly_interval, wasted
from holdfast.policies.parse import parse_rule
from holdfast.policies.places import Place, peak_together
from holdfast.policies.simulate import Costs, Outcome, Scenario, simulate
from holdfast.run import Run
from holdfast.stores import name_of, open_store

__all__ = ["plan"]


def _option(name: str, kind: str, says: str) -> Any:
    return typer.Option(name, metavar=kind, help=says, show_default=False)


_Run = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="A run whose log and checkpoints tell sizes and times.", show_default=False
    ),
]
_Save = Annotated[
    list[str] | None, _option("--save", "RULE", "When to save. Several are put side by side. [auto()]")
]
_Keep = Annotated[
    list[str] | None,
    _option("--keep", "RULE", "What to keep: one for all --save, or one for each. [last(3)]"),
]
_Mirror = Annotated[
    list[str] | None,
    _option("--mirror", "URL=RULE", "A mirror and what it keeps; without a rule, what the run keeps."),
]
_Hours = Annotated[float, typer.Option("--hours", metavar="H", help="How long the run trains.")]
_Step = Annotated[float | None, _option("--step-seconds", "S", "How long a step takes.")]
_State = Annotated[str | None, _option("--state", "SIZE", "Size of the state, such as 10GB.")]
_Changed = Annotated[
    float | None, _option("--changed", "SHARE", "Share of the state that changes between saves.")
]
_Weights = Annotated[
    float | None, _option("--weights", "SHARE", "Share of the state that demote(...) keeps.")
]
_Held = Annotated[str | None, _option("--held", "TIME", "How long a save holds training.")]
_Durable = Annotated[str | None, _option("--durable", "TIME", "How long until a save is durable.")]
_Load = Annotated[str | None, _option("--load", "TIME", "How long loading takes.")]
_Restart = Annotated[str | None, _option("--restart", "TIME", "From a failure until the program runs again.")]
_Mtbf = Annotated[str | None, _option("--mtbf", "TIME", "Mean time between failures, such as 24h.")]
_Store = Annotated[
    str | None,
    _option("--store", "URL", "Where the run will lie: its speed is measured with two small objects."),
]
_Speed = Annotated[
    str, typer.Option("--mirror-speed", metavar="SIZE", help="Bytes per second to each mirror.")
]
_Packed = Annotated[
    float,
    typer.Option("--packed", metavar="RATIO", help="How many times smaller packed files are on mirrors."),
]
_Prices = Annotated[
    list[str] | None,
    _option(
        "--price", "PLACE=GB[/1000]", "Dollars for a GB and month, and for 1000 writes, where URLs begin so."
    ),
]
_Png = Annotated[Path | None, _option("--png", "FILE", "Draw it, too.")]


def plan(
    path: _Run = None,
    save: _Save = None,
    keep: _Keep = None,
    mirror: _Mirror = None,
    hours: _Hours = 72.0,
    step_seconds: _Step = None,
    state: _State = None,
    changed: _Changed = None,
    weights: _Weights = None,
    held: _Held = None,
    durable: _Durable = None,
    load: _Load = None,
    restart: _Restart = None,
    mtbf: _Mtbf = None,
    store: _Store = None,
    mirror_speed: _Speed = "100MB",
    packed: _Packed = 1.0,
    price: _Prices = None,
    png: _Png = None,
    json: Json = False,
) -> None:
    """Simulate rules over a whole run: what lies where and its price, lost work, time wasted, the best interval.

    Nothing is saved or deleted. Sizes and times are those given, else those that RUN tells, else measured or
    assumed; the plan says which.
    """
    times = {"held": held, "durable": durable, "load": load, "restart": restart, "mtbf": mtbf}
    given = Given(
        state=None if state is None else parse_bytes(state),
        changed=changed,
        weights=weights,
        step_seconds=step_seconds,
        **{name: None if told is None else parse_seconds(told) for name, told in times.items()},
    )
    measured = None if path is None else measure_run(Run(path))
    speed = None if store is None else measure_store(open_store(store))
    workload, costs, said = assume(given, measured, speed, hours)
    prices = dict(map(parse_price, price or ()))
    primary = name_of(store or path or "local")
    speed_there = float(parse_bytes(mirror_speed))
    mirrors = [
        Place(url, None if rule is None else parse_rule(rule), speed_there, packed, price_of(url, prices))
        for url, rule in map(parse_mirror, mirror or ())
    ]
    pairs = pair_rules(save or [f"auto(mtbf={exact_seconds(costs.mtbf)!r})"], keep or ["last(3)"])
    scenarios = [
        Scenario(parse_rule(s), (Place(primary, parse_rule(k), price=price_of(primary, prices)), *mirrors))
        for s, k in pairs
    ]
    metrics, invented = evaluations(scenarios, workload.steps)
    outcomes = [simulate(scenario, workload, costs, metrics) for scenario in scenarios]
    if png is not None:
        draw_plan(outcomes, costs, png)
    if json:
        emit(_document(outcomes, costs, said))
        return
    _print_assumptions(said, invented)
    _print_sets(outcomes, costs)
    if png is not None:
        line("drawn: ", (png, "cyan"))


def _print_assumptions(said: Sequence[Assumption], invented: Sequence[str]) -> None:
    rows: list[list[object]] = [[a.name, text((a.value, "bold")), text((a.origin, "dim"))] for a in said]
    rows += [[name, "gets better, noisily", text(("assumed", "dim"))] for name in invented]
    show_table([Column("this plan stands on"), Column("", right=True), Column("", elastic=True)], rows)
    line()


def _print_sets(outcomes: Sequence[Outcome], costs: Costs) -> None:
    """Print a column for each rule set."""
    names = letters(len(outcomes))
    for name, o in zip(names, outcomes, strict=True):
        line((name, "bold"), f"  save {o.scenario.save!r}  keep {o.scenario.places[0].keep!r}")
    line()
    rows: list[list[object]] = [
        ["saves", *(f"{len(o.saves):,}" for o in outcomes)],
        ["one every", *(format_seconds(o.interval) for o in outcomes)],
        ["training held by saves", *(f"{o.overhead:.2%}" for o in outcomes)],
        ["a failure loses, on average", *(format_seconds(o.stays[0].lost(o.seconds)[0]) for o in outcomes)],
        ["a failure loses, at most", *(format_seconds(o.stays[0].lost(o.seconds)[1]) for o in outcomes)],
        ["failures expected", *(f"{o.failures:,.1f}" for o in outcomes)],
        ["time wasted in all", *(text((f"{o.wasted:.2%}", "bold")) for o in outcomes)],
    ]
    for i, place in enumerate(outcomes[0].scenario.places):
        stays = [o.stays[i] for o in outcomes]
        rows.append([text((place.name, "cyan")), *("" for _ in outcomes)])
        rows.append(["  most bytes", *(bytes_(s.peak_bytes) for s in stays)])
        rows.append(["  bytes at the end", *(bytes_(s.end_bytes) for s in stays)])
        rows.append(["  checkpoints at the end", *(f"{len(s.kept):,}" for s in stays)])
        if i:
            lost = [s.lost(o.seconds) for s, o in zip(stays, outcomes, strict=True)]
            rows.append(
                [
                    "  lost if only this is left",
                    *(f"{format_seconds(m)}, at most {format_seconds(w)}" for m, w in lost),
                ]
            )
        rows.append(["  price of the run", *(f"${s.cost:,.2f}" for s in stays)])
    if len(outcomes[0].stays) > 1:
        rows.append(["most bytes in all", *(bytes_(peak_together(o.stays)) for o in outcomes)])
        rows.append(
            ["price in all", *(text((f"${sum(s.cost for s in o.stays):,.2f}", "bold")) for o in outcomes)]
        )
    show_table([Column(""), *(Column(name, right=True) for name in names)], rows)
    best = daly_interval(costs.held, costs.mtbf)
    least = wasted([best], costs.held, costs.mtbf, costs.recovery)
    line()
    line("least is wasted with a save every ", (format_seconds(best), "bold"), f": {least:.2%}")
    strides = max(o.stride for o in outcomes)
    if strides > 1:
        line((f"played in strides of {count(strides, 'step')}", "dim"))


def _document(outcomes: Sequence[Outcome], costs: Costs, said: Sequence[Assumption]) -> dict[str, object]:
    best = daly_interval(costs.held, costs.mtbf)
    return {
        "assumptions": [{"name": a.name, "value": a.value, "origin": a.origin} for a in said],
        "costs": {
            "held_seconds": costs.held,
            "durable_seconds": costs.durable,
            "load_seconds": costs.load,
            "restart_seconds": costs.restart,
            "mtbf_seconds": costs.mtbf,
        },
        "optimum": {
            "interval_seconds": best,
            "wasted": wasted([best], costs.held, costs.mtbf, costs.recovery),
        },
        "sets": [_set_document(o) for o in outcomes],
    }


def _set_document(o: Outcome) -> dict[str, object]:
    return {
        "save": repr(o.scenario.save),
        "keep": None if o.scenario.places[0].keep is None else repr(o.scenario.places[0].keep),
        "saves": len(o.saves),
        "interval_seconds": o.interval,
        "seconds": o.seconds,
        "overhead": o.overhead,
        "failures": o.failures,
        "wasted": o.wasted,
        "peak_bytes": peak_together(o.stays),
        "stride": o.stride,
        "places": [
            {
                "name": s.place.name,
                "keep": None if s.place.keep is None else repr(s.place.keep),
                "peak_bytes": s.peak_bytes,
                "end_bytes": s.end_bytes,
                "mean_bytes": s.mean_bytes,
                "checkpoints": len(s.kept),
                "writes": s.writes,
                "cost": s.cost,
                "lost_seconds_mean": s.lost(o.seconds)[0],
                "lost_seconds_most": s.lost(o.seconds)[1],
            }
            for s in o.stays
        ],
    }
