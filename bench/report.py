"""The results as tables: for a terminal, and as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from bench.contestants import HOLDFAST, LIMIT
from bench.figures import CaseResult, Column

LABELS = {LIMIT: "the machine's limit"}


def amount(value: float | None, unit: str) -> str:
    """Write a figure with its unit, with three digits that mean something."""
    if value is None:
        return ""
    if unit == "s":
        ms = 1000 * value
        if ms >= 10_000:
            return f"{value:,.1f} s"
        return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 or ms <= -1 else f"{ms:.2f} ms"
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit == "MB/s":
        return f"{value / 1e6:,.0f} MB/s"
    return f"{value:.3f}" if unit == "ratio" else f"{value:.2f} x"


def rows(result: CaseResult) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's name and cells, the limit first."""
    for who in sorted(result.rounds, key=lambda w: w != LIMIT):
        yield who, [_cell(result, who, column) for column in result.columns]


def _cell(result: CaseResult, who: str, column: Column) -> str:
    text = amount(result.median(who, column.key), column.unit)
    ratio = result.ratio(who, column)
    return f"{text}  ({ratio:.2f} x)" if ratio is not None and who != LIMIT else text


def heading(result: CaseResult) -> str:
    size = result.facts.get("bytes")
    return f"{result.title}: {amount(size, 'bytes')}" if size else result.title


def table(result: CaseResult) -> Table:
    """Return one case as a table for a terminal."""
    shown = Table(
        title=heading(result), caption=result.about, title_justify="left", caption_justify="left", box=None
    )
    shown.add_column("")
    for column in result.columns:
        shown.add_column(column.title, justify="right")
    for who, cells in rows(result):
        style = "bold" if who == HOLDFAST else "dim" if who == LIMIT else ""
        shown.add_row(LABELS.get(who, who), *cells, style=style)
    for who, why in result.missing.items():
        shown.add_row(who, why, style="dim")
    return shown


def left_out_line(left_out: Mapping[str, str]) -> str:
    """Say which cases there are none of, and why."""
    cases: dict[str, list[str]] = {}
    for case, why in left_out.items():
        cases.setdefault(why, []).append(case)
    return "; ".join(f"Left out: {', '.join(keys)} ({why})" for why, keys in cases.items())


def markdown(
    results: list[CaseResult],
    left_out: Mapping[str, str],
    machine: str,
    contestants: dict[str, dict[str, str | None]],
) -> str:
    """Return all cases as a page; multiples of the limit of the same round stand in brackets."""
    lines = [f"{machine}.", ""]
    for result in results:
        lines += [f"**{heading(result)}.** {result.about}", ""]
        lines.append("| | " + " | ".join(c.title for c in result.columns) + " |")
        lines.append("|---|" + "---:|" * len(result.columns))
        for who, cells in rows(result):
            name = f"**{who}**" if who == HOLDFAST else LABELS.get(who, who)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += [
            f"| {who} | {why.splitlines()[0].replace('|', '/')} |" for who, why in result.missing.items()
        ]
        lines.append("")
    if left_out:
        lines += [f"{left_out_line(left_out)}.", ""]
    for who, about in contestants.items():
        lines.append(f"- {who} {about['version'] or '(not installed)'}: {about['settings']}")
    return "\n".join(lines) + "\n"
