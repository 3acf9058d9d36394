"""Measure, print a table, write JSON.

python -m bench --out out/bench
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table

from bench.limits import Limits
from bench.savers import SAVERS, State

console = Console() if sys.stdout.isatty() else Console(width=120)


def transformer(width: int, layers: int) -> State:
    """Parameters and both Adam moments of a transformer, as fp32 tensors."""
    shapes = {"wte": (50257 // 8, width), "head.bias": (width,)}
    for i in range(layers):
        shapes |= {f"h.{i}.qkv": (3 * width, width), f"h.{i}.proj": (width, width), f"h.{i}.norm": (width,)}
        shapes |= {f"h.{i}.up": (4 * width, width), f"h.{i}.down": (width, 4 * width)}
    return {
        part: {n: torch.randn(s) for n, s in shapes.items()} for part in ("model", "exp_avg", "exp_avg_sq")
    }


def tiny(count: int) -> State:
    """Many tensors of 64 floats."""
    return {"model": {f"layer{i}.weight": torch.randn(64) for i in range(count)}}


CASES = {
    "transformer + Adam": lambda quick: transformer(512 if quick else 1024, 4 if quick else 7),
    "20,000 tiny tensors": lambda quick: tiny(2_000 if quick else 20_000),
}


def measure(state: State, rounds: int, scratch: pathlib.Path) -> dict[str, dict[str, float]]:
    """Return the median of each figure for each way to save, and for the machine's limits."""
    tensors = [t for part in state.values() for t in part.values()]
    limits = Limits(tensors, scratch)
    savers = [make(scratch, state) for make in SAVERS]
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for saver in savers:
        seen[saver.name]["first held"].append(saver.save(state)[0])
    for _ in range(rounds):
        seen["limit"]["held"].append(limits.copy())
        seen["limit"]["durable"].append(limits.write())
        seen["limit"]["load"].append(limits.read())
        for saver in savers:
            for t in tensors[:: max(1, len(tensors) // 50)] if len(tensors) > 1000 else tensors:
                t.add_(1e-3)  # a new state: nothing may be left out as unchanged
            held, durable = saver.save(state)
            seen[saver.name]["held"].append(held)
            seen[saver.name]["durable"].append(durable)
            seen[saver.name]["load"].append(saver.load(state))
            seen[saver.name]["bytes"] = [saver.stored_bytes() / limits.nbytes]
    for saver in savers:
        saver.close()
    return {name: {k: statistics.median(v) for k, v in figures.items()} for name, figures in seen.items()}


def show(case: str, nbytes: int, figures: dict[str, dict[str, float]]) -> None:
    limit = figures["limit"]
    table = Table(title=f"{case}: {nbytes / 1e6:,.0f} MB", title_justify="left", box=None, pad_edge=False)
    for column in ("", "first held", "held", "durable", "load", "bytes on disk"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in figures.items():
        cells = [f"{1000 * row['first held']:,.0f} ms" if "first held" in row else ""]
        for key in ("held", "durable", "load"):
            ratio = "" if name == "limit" else f"  {row[key] / limit[key]:5.1f} x"
            cells.append(f"{1000 * row[key]:,.0f} ms{ratio}")
        table.add_row(name, *cells, f"{row['bytes']:.2f} x" if "bytes" in row else "")
    console.print(table)
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small states, to see that it works")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "system": platform.system(), "torch": torch.__version__}
    console.print(
        f"limit: a copy into warm memory, an O_DIRECT write with fsync, a read in place. {machine}\n"
    )
    results: dict[str, object] = {"machine": machine, "rounds": options.rounds}
    for case, make in CASES.items():
        state = make(options.quick)
        nbytes = sum(t.nbytes for part in state.values() for t in part.values())
        with tempfile.TemporaryDirectory(dir=options.out) as scratch:
            figures = measure(state, options.rounds, pathlib.Path(scratch))
        results[case] = {"bytes": nbytes, "seconds": figures}
        show(case, nbytes, figures)
    (options.out / "bench.json").write_text(json.dumps(results, indent=1))
    console.print(f"The figures: {options.out / 'bench.json'}")


if __name__ == "__main__":
    main()
