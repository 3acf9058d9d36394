"""Run launches of more and more ranks, and of more and more tensors, and write scale.json, scale.md and scale.png.

python -m bench.scale --out out/scale
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

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
FEW_SECONDS = 600.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/scale"))
    parser.add_argument("--most", type=int, default=RANKS[-1], help="ranks, of the largest launch")
    parser.add_argument("--draw", action="store_true", help="only draw what scale.json holds")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    chosen.out.mkdir(parents=True, exist_ok=True)
    found = chosen.out / "scale.json"
    if not chosen.draw:
        ranks = [n for n in RANKS if n <= chosen.most]
        work = [(n, PARAMETERS, SHARE_BYTES, name) for name in SERVICES for n in ranks]
        work += [(min(FEW_RANKS, chosen.most), n, SMALL_SHARE_BYTES, "s3") for n in MORE_PARAMETERS]
        series: dict[str, list[dict[str, object]]] = {"ranks": [], "tensors": []}
        for number, (world, parameters, share_bytes, service) in enumerate(work):
            begin = time.monotonic()
            row = measure(State(world, parameters, share_bytes), SERVICES[service], seconds=FEW_SECONDS)
            series["tensors" if share_bytes == SMALL_SHARE_BYTES else "ranks"].append(row.to_json())
            print(f"{number + 1}/{len(work)} {_in_a_line(row)}, {time.monotonic() - begin:.0f} s", flush=True)
            found.write_text(json.dumps({"machine": machine.describe(chosen.out), **series}, indent=1) + "\n")
    figures = json.loads(found.read_text())
    (chosen.out / "scale.md").write_text(markdown(figures))
    draw(figures, chosen.out / "scale.png")
    print(
        f"Figures, tables, curves: {', '.join(str(chosen.out / f'scale.{x}') for x in ('json', 'md', 'png'))}"
    )


def _in_a_line(row: Row) -> str:
    return (
        f"{row.ranks:,} ranks of {row.tensors:,} tensors on {row.service}: a rank sends {row.follower_saves.requests} "
        f"requests a save, rank 0 {row.leader_saves.requests:,}; committed after {row.commit_seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
