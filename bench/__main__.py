"""Measure all cases, show tables, and write bench.json, bench.md and bench.png.

python -m bench --out out/bench
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import machine, report
from bench.cases import CASES
from bench.chart import draw
from bench.contestants import entries, ranks_entries
from bench.devices import DEVICES
from bench.figures import CaseResult
from bench.rounds import LeftOut, Plan
from bench.worker import WorkerFailed

console = Console() if sys.stdout.isatty() else Console(width=150)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases", default=",".join(CASES), help="letters, separated by commas; all by default"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each contestant; medians are taken over them"
    )
    parser.add_argument("--contestants", help="names, separated by semicolons; all by default")
    parser.add_argument("--quick", action="store_true", help="small states, to see that it works")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=DEVICES[0],
        help="of the cases for a GPU; cpu to see that they work",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    found = parser.parse_args()
    found.cases = [c.strip() for c in found.cases.split(",")]
    if unknown := [c for c in found.cases if c not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are: {', '.join(CASES)}")
    if found.rounds < 1:
        parser.error("--rounds must be 1 or more")
    try:
        names = found.contestants.split(";") if found.contestants else None
        found.entries, found.ranks = tuple(entries(names)), tuple(ranks_entries(names))
    except ValueError as e:
        parser.error(str(e))
    return found


def main() -> None:
    chosen = options()
    chosen.out.mkdir(parents=True, exist_ok=True)
    here = machine.describe(chosen.out)
    console.print(machine.in_a_line(here), "\n", soft_wrap=True)
    results: list[CaseResult] = []
    left_out: dict[str, str] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        plan = Plan(
            chosen.rounds,
            chosen.quick,
            chosen.out,
            chosen.entries,
            chosen.ranks,
            lambda text: progress.update(task, description=text),
            chosen.device,
        )
        if not chosen.quick:
            plan.say("uses the free memory once")
            machine.touch_memory()
        for case in chosen.cases:
            try:
                results.append(CASES[case](plan))
                progress.console.print(report.table(results[-1]), "")
            except LeftOut as e:
                left_out[case] = str(e)
            except WorkerFailed as e:
                sys.exit(f"bench: {e}; what it printed: {chosen.out / 'workers.log'}")
            write(chosen, here, results, left_out)
    if left_out:
        console.print(f"{report.left_out_line(left_out)}.")
    written = [file for kind in ("json", "md", "png") if (file := chosen.out / f"bench.{kind}").exists()]
    console.print(f"Figures, tables, bars: {', '.join(map(str, written))}")


def write(
    chosen: argparse.Namespace,
    here: dict[str, object],
    results: list[CaseResult],
    left_out: dict[str, str],
) -> None:
    """Write what is there so far: a run that is cut short leaves the cases it finished."""
    found = {
        "machine": here,
        "contestants": machine.contestants(),
        "rounds": chosen.rounds,
        "quick": chosen.quick,
        "cases": {r.key: r.to_json() for r in results},
        "left out": left_out,
    }
    (chosen.out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    page = report.markdown(results, left_out, machine.in_a_line(here), machine.contestants())
    (chosen.out / "bench.md").write_text(page)
    draw(results, chosen.out / "bench.png")


if __name__ == "__main__":
    main()
