"""The figures as curves over the number of ranks, and of tensors; both axes in powers of ten."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.scale.report import amount

# Okabe and Ito's colours, which stay apart for every kind of colour vision.
RANK, LEADER, THIRD, FOURTH, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#333333", "#DDDDDD"
WIDTH, HEIGHT = 11.0, 6.6

Figures = Mapping[str, Any]
Curve = tuple[str, str, Callable[[Figures], float]]

REQUESTS: tuple[Curve, ...] = (
    ("rank 0", LEADER, lambda r: r["leader_saves"]["requests"]),
    ("any other rank", RANK, lambda r: r["follower_saves"]["requests"]),
)
BYTES: tuple[Curve, ...] = (
    ("manifest", THIRD, lambda r: r["manifest_bytes"]),
    ("rank 0 reads", LEADER, lambda r: r["leader_saves"]["read_bytes"]),
    ("a rank writes", RANK, lambda r: r["follower_saves"]["written_bytes"]),
    ("its record", FOURTH, lambda r: r["follower_saves"]["word_bytes"]),
)
PROCESSOR: tuple[Curve, ...] = (
    ("rank 0", LEADER, lambda r: r["leader_saves"]["cpu_seconds"]),
    ("any other rank", RANK, lambda r: r["follower_saves"]["cpu_seconds"]),
)
RESTORE: tuple[Curve, ...] = (
    ("on 3/4 as many", LEADER, lambda r: r["other"]["requests"]),
    ("on as many", RANK, lambda r: r["same"]["requests"]),
)


def draw(figures: Figures, path: pathlib.Path) -> None:
    """Draw all panels."""
    by_service = {s: [r for r in figures["ranks"] if r["service"] == s] for s in ("s3", "pfs")}
    s3, pfs, tensors = by_service["s3"], by_service["pfs"], figures["tensors"]
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK}):
        figure, axes = plt.subplots(2, 3, figsize=(WIDTH, HEIGHT), dpi=150)
        _panel(axes[0][0], "Store requests of a save", s3, "ranks", REQUESTS)
        _panel(axes[0][1], "Bytes of a save", s3, "ranks", BYTES, write=amount)
        _panel(axes[0][2], "Processor time of a save", s3, "ranks", PROCESSOR, write=_time)
        _times(axes[1][0], s3, pfs)
        _panel(axes[1][1], "Store requests of a rank's restore", s3, "ranks", RESTORE, limits=(1, 1_000))
        _panel(
            axes[1][2],
            f"Bytes of a save, {tensors[0]['ranks']} ranks",
            tensors,
            "tensors",
            BYTES,
            write=amount,
        )
        figure.subplots_adjust(left=0.055, right=0.90, top=0.93, bottom=0.11, wspace=0.78, hspace=0.42)
        first = s3[0]
        figure.text(
            0.012, 0.015,
            f"holdfast's own code on a model of S3 (dashed: of a parallel file system); {first['tensors']} boxes of "
            f"{first['share_bytes'] >> 10} KiB a rank, {first['tensors'] * s3[-1]['ranks']:,} on the most ranks.",
            color=INK, fontsize=8,
        )  # fmt: skip
        figure.savefig(path, facecolor="white")
        plt.close(figure)


def _times(axes: Axes, s3: Sequence[Figures], pfs: Sequence[Figures]) -> None:
    curves: tuple[Curve, ...] = (
        ("all have met", THIRD, lambda r: r["meet_seconds"]),
        ("a save is committed", LEADER, lambda r: r["commit_seconds"]),
        ("all have restored", RANK, lambda r: r["same_seconds"]),
    )
    _panel(axes, "Time until (model)", s3, "ranks", curves, write=_time, more=pfs)


def _panel(
    axes: Axes, title: str, rows: Sequence[Figures], key: str, curves: Sequence[Curve], *,
    write: Callable[[float], str] | None = None, more: Sequence[Figures] = (),
    limits: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    said = write or (lambda value: f"{value:,.0f}")
    ends: list[tuple[float, str, str]] = []
    for name, colour, of in curves:
        axes.plot(
            [r[key] for r in rows],
            [of(r) for r in rows],
            color=colour,
            marker="o",
            markersize=3,
            linewidth=1.4,
        )
        if more:
            axes.plot(
                [r[key] for r in more],
                [of(r) for r in more],
                color=colour,
                linewidth=1.0,
                linestyle=(0, (4, 2)),
            )
        ends.append((of(rows[-1]), f"{name}\n{said(of(rows[-1]))}", colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    if limits is not None:
        axes.set_ylim(*limits)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.3)
    _label(axes, rows[-1][key], ends)
    axes.set_title(title, loc="left", fontsize=8.5, color=INK, pad=6)
    axes.set_xlabel("ranks" if key == "ranks" else "tensors (a box of each on every rank)", fontsize=8)
    axes.set_xticks([r[key] for r in rows], [_count(r[key]) for r in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, write)))
    axes.grid(visible=True, axis="y", color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=7.5, length=2, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name each curve where it ends; names that would touch move apart."""
    inverse = axes.transAxes.inverted()
    places = sorted(
        (float(inverse.transform(axes.transData.transform((x, value)))[1]), text, colour)
        for value, text, colour in ends
    )
    step = 0.16
    heights = [place for place, _, _ in places]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + step)
    heights[-1] = min(heights[-1], 1.0)
    for index in range(len(heights) - 2, -1, -1):
        heights[index] = min(heights[index], heights[index + 1] - step)
    for height, (_, text, colour) in zip(heights, places, strict=True):
        axes.text(1.03, height, text, transform=axes.transAxes, color=colour, fontsize=7.5, va="center")


def _count(number: int) -> str:
    return (
        f"{number:,}"
        if number < 4_000
        else f"{number // 1024}Ki"
        if number % 1024 == 0
        else f"{number // 1000}k"
    )


def _tick(value: float, write: Callable[[float], str] | None) -> str:
    if write is None:
        return f"{value:,.0f}"
    return write(value).replace(".0 ", " ")


def _time(value: float) -> str:
    return (
        f"{value:,.1f} s"
        if value >= 1
        else f"{1000 * value:,.0f} ms"
        if value >= 0.01
        else f"{1000 * value:.1f} ms"
    )
