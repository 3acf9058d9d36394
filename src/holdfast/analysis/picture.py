"""The picture of a plan: what lies where over time, what is left at the end, and what each interval wastes."""

from __future__ import annotations

import os
import string
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.core.errors import MissingDependency, OutOfSpace, PermissionDenied, StoreError
from holdfast.core.units import format_bytes, format_seconds
from holdfast.policies.optimum import daly_interval, wasted
from holdfast.policies.places import Stay, peak_together
from holdfast.policies.simulate import Costs, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DRAWN", "draw_plan", "letters"]

DRAWN = 4  # rule sets that fit beside each other
# Okabe and Ito's colours, which stay apart for every kind of colour vision.
_PLACES = ("#0072B2", "#56B4E9", "#8FC6C0", "#B8C9E0", "#C9C9C9")
_SETS = ("#D55E00", "#9B4F96", "#009E73", "#333333")
_SAVING, _FAILING = "#8A8A8A", "#E69F00"
_INK, _QUIET, _GRID = "#333333", "#8A8A8A", "#E3E3E3"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SECONDS = (1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400, 365 * 86400)


def letters(many: int) -> str:
    """Return a letter for each rule set."""
    return string.ascii_uppercase[:many]


def draw_plan(outcomes: Sequence[Outcome], costs: Costs, path: str | os.PathLike[str]) -> None:
    """Draw the first `DRAWN` rule sets as a PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
        StoreError: the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependency("a picture needs matplotlib; run: pip install 'holdfast[plot]'") from e
    shown = outcomes[:DRAWN]
    with rc_context(_STYLE):
        figure = Figure(figsize=(11, 7.6), dpi=150, facecolor="white")
        top = figure.add_gridspec(1, len(shown), left=0.065, right=0.985, top=0.87, bottom=0.56, wspace=0.12)
        low = figure.add_gridspec(1, 2, left=0.065, right=0.985, top=0.40, bottom=0.085, wspace=0.17)
        _storage(figure, [figure.add_subplot(top[i]) for i in range(len(shown))], shown)
        _left(figure.add_subplot(low[0]), shown)
        _waste(figure.add_subplot(low[1]), shown, costs)
        figure.text(0.012, 0.965, "What lies where, over the run", weight="bold", fontsize=12)
        figure.text(
            0.012, 0.455, "What is left when it ends, and what a failure loses", weight="bold", fontsize=12
        )
        figure.text(0.535, 0.455, "What an interval costs", weight="bold", fontsize=12)
        _write(figure, path)


def _write(figure: Figure, path: str | os.PathLike[str]) -> None:
    try:
        figure.savefig(path, format="png")
    except PermissionError as e:
        raise PermissionDenied(e.errno, f"could not write {path}: {e.strerror}; choose another place") from e
    except OSError as e:
        kind = OutOfSpace if e.errno in (28, 122) else StoreError
        raise kind(e.errno, f"could not write {path}: {e.strerror}") from e


# ---- storage over time ----------------------------------------------------------------------------------------------


def _storage(figure: Figure, panels: Sequence[Axes], outcomes: Sequence[Outcome]) -> None:
    most = max(peak_together(o.stays) for o in outcomes) or 1
    divisor, unit = _unit(most)
    for axes, outcome, letter, color in zip(panels, outcomes, letters(len(outcomes)), _SETS, strict=False):
        times = sorted({0.0, *(t for s in outcome.stays for t in s.times), outcome.stays[0].end})
        layers = [_at(s, times, divisor) for s in outcome.stays]
        axes.stackplot(
            [t / 3600 for t in times],
            *layers,
            step="post",
            colors=[_PLACES[i % len(_PLACES)] for i in range(len(layers))],
            linewidth=0,
            alpha=0.9,
        )
        axes.set_ylim(0, most / divisor * 1.12)
        axes.set_xlim(0, times[-1] / 3600)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel("hours of training")
        axes.set_title(_rules(outcome, 150 // len(outcomes) - 4), fontsize=8, color=_INK, pad=8)
        axes.annotate(
            letter, (0, 1), xytext=(-4, 8), textcoords="offset points", xycoords="axes fraction",
            color=color, weight="bold", fontsize=13, ha="right", va="bottom",
        )  # fmt: skip
        everywhere = " in all" if len(layers) > 1 else ""
        price = sum(s.cost for s in outcome.stays)
        axes.annotate(
            f"at most {format_bytes(peak_together(outcome.stays))}{everywhere}" + (f", ${price:,.2f}" if price else ""),
            (0, 1), xytext=(6, -4), textcoords="offset points", xycoords="axes fraction", fontsize=9, weight="bold",
            va="top", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        if axes is not panels[0]:
            axes.tick_params(left=False, labelleft=False)
    panels[0].set_ylabel(unit)
    stays = outcomes[0].stays
    handles = [panels[-1].fill_between([], [], color=_PLACES[i % len(_PLACES)]) for i in range(len(stays))]
    figure.legend(
        handles[::-1], [_short(s.place.name) for s in stays][::-1], loc="upper right",
        bbox_to_anchor=(0.99, 0.995), ncols=len(stays), frameon=False, fontsize=9,
    )  # fmt: skip


def _rules(outcome: Outcome, width: int) -> str:
    """Return the rules of a set in at most two lines each."""
    keep = outcome.scenario.places[0].keep
    said = (f"save {outcome.scenario.save!r}", f"keep {'everything' if keep is None else repr(keep)}")
    short = [textwrap.shorten(rule, 2 * width - 8, placeholder=" …") for rule in said]
    return "\n".join(line for rule in short for line in textwrap.wrap(rule, width))


def _at(stay: Stay, times: Sequence[float], divisor: float) -> list[float]:
    """Return what lies in a place at each of some times."""
    found, index = [], -1
    for time in times:
        while index + 1 < len(stay.times) and stay.times[index + 1] <= time:
            index += 1
        found.append(stay.sizes[index] / divisor if index >= 0 else 0.0)
    return found


def _unit(most: float) -> tuple[float, str]:
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= divisor:
            return divisor, unit
    return 1.0, "bytes"


# ---- what is left at the end ----------------------------------------------------------------------------------------


def _left(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """A row for each place of each rule set: a dot for each checkpoint, by its age when the run ends."""
    rows = [(i, o, s) for i, o in enumerate(outcomes) for s in o.stays]
    end = max(o.seconds for o in outcomes)
    last = max(o.held_seconds / len(o.saves) for o in outcomes)  # the last save itself is as old as it took
    ages = [o.seconds - k for _, o, s in rows for k in s.kept if o.seconds - k > 2 * last]
    youngest = min(ages, default=end / 10)
    now = youngest / 3  # where the state that the run ended with is drawn, on an axis that has no zero
    for y, (index, outcome, stay) in enumerate(rows):
        color = _SETS[index % len(_SETS)]
        mean, worst = stay.lost(outcome.seconds)
        shown = [age if (age := outcome.seconds - k) > 2 * last else now for k in stay.kept]
        axes.axhline(y, color=_GRID, linewidth=0.7, zorder=1)
        axes.plot(
            shown, [y] * len(shown), "o", color=color, markersize=5.5, alpha=0.75, markeredgewidth=0, zorder=3
        )
        axes.annotate(
            f"{_short(stay.place.name)}: a failure loses {format_seconds(mean)}, at most {format_seconds(worst)}",
            (0.0, y), xytext=(2, 5), textcoords="offset points", xycoords=("axes fraction", "data"),
            fontsize=8, color=_INK, va="bottom",
        )  # fmt: skip
    axes.set_yticks([i * len(o.stays) for i, o in enumerate(outcomes)], letters(len(outcomes)))
    for label, color in zip(axes.get_yticklabels(), _SETS, strict=False):
        label.set(color=color, weight="bold", fontsize=13)
    axes.set_xscale("log")
    axes.set_xlim(end * 1.25, now / 1.6)
    ticks = [t for t in _SECONDS if youngest / 1.5 < t <= end * 1.25]
    axes.set_xticks([*ticks, now], [*map(format_seconds, ticks), "the end"])
    axes.set_xticks([], minor=True)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("age of the checkpoint")


# ---- waste against interval -----------------------------------------------------------------------------------------


def _waste(axes: Axes, outcomes: Sequence[Outcome], costs: Costs) -> None:
    optimum = max(daly_interval(costs.held, costs.mtbf), 1e-3)
    marks = [o.interval for o in outcomes]
    first = min(optimum / 20, *(m / 2 for m in marks))
    last = max(optimum * 20, *(m * 2 for m in marks))
    periods = [first * (last / first) ** (i / 400) for i in range(401)]
    total = [_share(p, costs) for p in periods]
    saving = [min(1.0, costs.held / p) for p in periods]
    failing = [max(0.0, t - s) for t, s in zip(total, saving, strict=True)]
    least = _share(optimum, costs)
    high = min(1.0, max(least * 4, *(o.wasted * 1.35 for o in outcomes)))
    axes.plot(periods, [100 * s for s in saving], color=_SAVING, linewidth=1.3)
    axes.plot(periods, [100 * f for f in failing], color=_FAILING, linewidth=1.3)
    axes.plot(periods, [100 * t for t in total], color=_INK, linewidth=2.2)
    axes.axvline(optimum, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"optimum {format_seconds(optimum)}: {least:.2%}", (optimum, 1), xytext=(4, -4),
        textcoords="offset points", xycoords=("data", "axes fraction"), fontsize=8.5, va="top", color=_INK,
    )  # fmt: skip
    for outcome, letter, color in zip(outcomes, letters(len(outcomes)), _SETS, strict=False):
        axes.plot(outcome.interval, 100 * outcome.wasted, "o", color=color, markersize=9, zorder=5)
        axes.annotate(
            f"{letter}", (outcome.interval, 100 * outcome.wasted), ha="center", va="center", color="white",
            fontsize=7, weight="bold", zorder=6,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(first, last)
    axes.set_ylim(0, 100 * high)
    _time_ticks(axes, first, last)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("time between saves")
    axes.set_ylabel("% of all time wasted")
    _name_curve(axes, periods, saving, high, "saving", _SAVING, left=True)
    _name_curve(axes, periods, failing, high, "failures", _FAILING, left=False)


def _share(period: float, costs: Costs) -> float:
    return wasted([period], costs.held, costs.mtbf, costs.recovery)


def _name_curve(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], high: float, name: str, color: str, *, left: bool
) -> None:
    """Write a curve's name beside it, at half the height."""
    inside = [i for i, y in enumerate(ys) if y <= high * 0.55]
    if inside:
        i = inside[0] if left else inside[-1]
        axes.annotate(
            name, (xs[i], 100 * ys[i]), xytext=(-6, 0) if left else (6, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8.5, color=color, weight="bold",
        )  # fmt: skip


def _time_ticks(axes: Axes, first: float, last: float) -> None:
    ticks = [s for s in _SECONDS if first <= s <= last]
    axes.set_xticks(ticks, [format_seconds(s) for s in ticks])
    axes.set_xticks([], minor=True)


def _short(name: str) -> str:
    """Return a place's name, cut in front where it is long."""
    return name if len(name) <= 28 else f"…{name[-27:]}"
