"""The results as horizontal bars: a row of panels for each case, a panel for each figure."""

from __future__ import annotations

import pathlib
import statistics

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.contestants import HOLDFAST, LIMIT
from bench.figures import CaseResult, Column
from bench.report import amount, heading

# Okabe and Ito's colours, which stay apart for every kind of colour vision; the others are grey, so that rows are read.
OURS, OTHERS, LINE, INK = "#0072B2", "#B8B8B8", "#D55E00", "#333333"
WIDTH = 11.0
BAR = 0.27  # inches
CUT = 3.0  # a bar ends at so many times the middle one: one that is far off must not make dots of all others


def draw(results: list[CaseResult], path: pathlib.Path) -> None:
    """Draw all cases that have something to draw."""
    drawn = [r for r in results if any(_columns(r)) and _who(r)]
    if not drawn:
        return
    heights = [BAR * len(_who(r)) + 0.95 for r in drawn]
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK}):
        figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.35), dpi=150)
        total, top = sum(heights) + 0.35, 0.0
        for result, height in zip(drawn, heights, strict=True):
            _row(figure, result, (total - top - height) / total, height / total, total)
            top += height
        figure.text(
            0.012, 0.10 / total,
            "Shorter is better. Medians of all rounds. Line: what the machine itself needs, measured in the same "
            "rounds; in brackets: the multiple of it. »: the bar is cut.",
            color=LINE, fontsize=8,
        )  # fmt: skip
        figure.savefig(path, facecolor="white")
        plt.close(figure)


def _columns(result: CaseResult) -> list[Column]:
    return [
        c
        for c in result.columns
        if c.chart and any(result.median(w, c.key) is not None for w in _who(result))
    ]


def _who(result: CaseResult) -> list[str]:
    """Holdfast first, the others in the order they were listed in."""
    return sorted((w for w in result.rounds if w != LIMIT), key=lambda w: not w.startswith(HOLDFAST))


def _row(figure: plt.Figure, result: CaseResult, bottom: float, height: float, inches: float) -> None:
    figure.text(
        0.012, bottom + height - 0.22 / inches, heading(result), weight="bold", fontsize=10, va="center"
    )
    columns = _columns(result)
    left, right, gap = 0.155, 0.985, 0.035
    width = (right - left - gap * (len(columns) - 1)) / len(columns)
    for i, column in enumerate(columns):
        low, high = bottom + 0.18 / inches, bottom + height - 0.62 / inches
        axes = figure.add_axes((left + i * (width + gap), low, width, high - low))
        _panel(axes, result, column, names=i == 0)


def _panel(axes: Axes, result: CaseResult, column: Column, *, names: bool) -> None:
    who = _who(result)
    values = [result.median(w, column.key) for w in who]
    limit = result.median(LIMIT, column.against) if column.against else _even(column)
    end = _end([v for v in values if v is not None], limit)
    axes.set_xlim(0, end * (1.55 if len(_columns(result)) <= 3 else 1.85))  # room for the labels
    axes.set_ylim(len(who) - 0.45, -0.55)
    for y, (name, value) in enumerate(zip(who, values, strict=True)):
        ours = name.startswith(HOLDFAST)
        shown = min(max(value or 0.0, 0.0), end)
        axes.barh(y, shown, height=0.72, color=OURS if ours else OTHERS)
        axes.text(
            shown + end * 0.02, y, _label(result, name, column, cut=value is not None and value > end), va="center",
            fontsize=7.5, weight="bold" if ours else "normal", zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
        )  # fmt: skip
    if limit is not None:
        axes.axvline(limit, color=LINE, linewidth=1.3, zorder=2)
    axes.set_title(column.title, loc="left", fontsize=8.5, color=INK, pad=4)
    axes.set_yticks(range(len(who)), who if names else [""] * len(who))
    axes.tick_params(left=False, bottom=False, labelbottom=False, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def _end(values: list[float], limit: float | None) -> float:
    """Return where the longest bar ends: at the largest value, or earlier if that is far from the middle one."""
    return max(min(max(values), CUT * statistics.median(values)), limit or 0.0, 1e-9)


def _label(result: CaseResult, who: str, column: Column, *, cut: bool) -> str:
    value, ratio = result.median(who, column.key), result.ratio(who, column)
    if value is None:
        return "–"
    multiple = (
        f" ({ratio:.1f} x)" if ratio is not None and ratio < 10 else f" ({ratio:,.0f} x)" if ratio else ""
    )
    return ("» " if cut else "") + amount(value, column.unit) + multiple


def _even(column: Column) -> float | None:
    """A multiple has 1 as its limit where less is not possible: a loop without saving, the bytes that must be there."""
    return 1.0 if column.unit == "x" and column.key != "memory" else None
