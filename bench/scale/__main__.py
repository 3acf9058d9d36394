"""Run launches of more and more ranks, and of more and more tensors, and write scale.json, scale.md and scale.png.

python -m bench.scale --out out/scale
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from bench import machine
from bench.scale.chart import draw
from bench.scale.figures import Row, measure
from bench.scale.report import markdown
from bench.scale.services import SERVICES
from bench.scale.state import State

RANKS = (8, 64, 512, 4_096, 16_384)
PARAMETERS = 20  # with their moments 60 boxes a rank, nearly a million of them on the most ranks
SHARE_BYTES = 64 << 10
MORE_PARAMETERS = (20, 200, 1_000, 5_000)
FEW_RANKS = 64
SMALL_SHARE_BYTES = 4 << 10


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/scale"))
    parser.add_argument("--most", type=int, default=RANKS[-1], help="ranks, of the largest launch")
    parser.add_argument(
        "--more", action="store_true", help="keep what scale.json holds, and measure the rest"
    )
    return parser.parse_args()


def main() -> None:
    chosen = options()
    chosen.out.mkdir(parents=True, exist_ok=True)
    found = chosen.out / "scale.json"
    there = json.loads(found.read_text()) if chosen.more and found.exists() else {}
    rows: list[dict[str, Any]] = [*there.get("ranks", []), *there.get("tensors", [])]
    known = {(row["service"], row["ranks"], row["tensors"], row["share_bytes"]) for row in rows}
    work = [(n, PARAMETERS, SHARE_BYTES, name) for name in SERVICES for n in RANKS if n <= chosen.most]
    work += [(min(FEW_RANKS, chosen.most), n, SMALL_SHARE_BYTES, "s3") for n in MORE_PARAMETERS]
    for number, (world, parameters, share_bytes, service) in enumerate(work):
        state = State(world, parameters, share_bytes)
        if (service, world, state.shares, share_bytes) in known:
            continue
        begin = time.monotonic()
        row = measure(state, SERVICES[service])
        rows.append(row.to_json())
        print(f"{number + 1}/{len(work)} {_in_a_line(row)}, {time.monotonic() - begin:.0f} s", flush=True)
        figures = {
            "machine": machine.describe(chosen.out),
            "ranks": _sorted(row for row in rows if row["share_bytes"] == SHARE_BYTES),
            "tensors": _sorted(row for row in rows if row["share_bytes"] == SMALL_SHARE_BYTES),
        }
        found.write_text(json.dumps(figures, indent=1) + "\n")
    figures = json.loads(found.read_text())
    (chosen.out / "scale.md").write_text(markdown(figures))
    draw(figures, chosen.out / "scale.png")
    print(
        f"Figures, tables, curves: {', '.join(str(chosen.out / f'scale.{x}') for x in ('json', 'md', 'png'))}"
    )


def _sorted(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (list(SERVICES).index(row["service"]), row["ranks"], row["tensors"]))


def _in_a_line(row: Row) -> str:
    return (
        f"{row.ranks:,} ranks of {row.tensors:,} tensors on {row.service}: a rank sends {row.follower_saves.requests} "
        f"requests a save, rank 0 {row.leader_saves.requests:,}; committed after {row.commit_seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
