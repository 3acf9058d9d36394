"""The figures as tables in markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["markdown"]

Figures = Mapping[str, Any]
Cells = tuple[tuple[str, Callable[[Figures], str]], ...]


def amount(nbytes: float) -> str:
    """Write a size with three digits that mean something."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:,.0f} B"


def seconds(value: float) -> str:
    """Write a time in seconds or milliseconds."""
    return (
        f"{value:,.1f} s"
        if value >= 1
        else f"{1000 * value:,.1f} ms"
        if value < 0.1
        else f"{1000 * value:,.0f} ms"
    )


SAVES: Cells = (
    ("requests of a rank", lambda r: f"{r['follower_saves']['requests']}"),
    ("its record", lambda r: amount(r["follower_saves"]["word_bytes"])),
    ("its processor", lambda r: seconds(r["follower_saves"]["cpu_seconds"])),
    ("requests of rank 0", lambda r: f"{r['leader_saves']['requests']:,}"),
    ("it reads", lambda r: amount(r["leader_saves"]["read_bytes"])),
    ("its processor", lambda r: seconds(r["leader_saves"]["cpu_seconds"])),
    ("manifest", lambda r: amount(r["manifest_bytes"])),
)
TIMES: Cells = (
    ("meet", lambda r: seconds(r["meet_seconds"])),
    ("commit", lambda r: seconds(r["commit_seconds"])),
    ("all know", lambda r: seconds(r["save_seconds"])),
    ("restore", lambda r: seconds(r["same_seconds"])),
    ("requests of a rank", lambda r: f"{r['same']['requests']}"),
    ("it reads", lambda r: amount(r["same"]["read_bytes"])),
    ("on 3/4 as many", lambda r: seconds(r["other_seconds"])),
    ("requests of a rank", lambda r: f"{r['other']['requests']}"),
    ("it reads", lambda r: amount(r["other"]["read_bytes"])),
)


def markdown(figures: Figures) -> str:
    """Return all figures as a page."""
    by_ranks = figures["ranks"]
    lines: list[str] = []
    for service in dict.fromkeys(row["service"] for row in by_ranks):
        rows = [row for row in by_ranks if row["service"] == service]
        lines += [f"**A save, by ranks, on {service}**", "", *_table(rows, "ranks", SAVES), ""]
        lines += [f"**Times, by ranks, on {service}**", "", *_table(rows, "ranks", TIMES), ""]
    lines += ["**A save, by tensors of each rank**", "", *_table(figures["tensors"], "tensors", SAVES), ""]
    return "\n".join(lines)


def _table(rows: list[Figures], key: str, cells: Cells) -> list[str]:
    head = [f"| {key} | " + " | ".join(title for title, _ in cells) + " |", "|---:|" + "---:|" * len(cells)]
    return head + [f"| {row[key]:,} | " + " | ".join(text(row) for _, text in cells) + " |" for row in rows]
