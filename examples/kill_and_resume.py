"""The demo: train twice, once undisturbed and once killed again and again, and show that both runs are the same.

python examples/kill_and_resume.py --out out/demo
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from digits import STEPS_PER_EPOCH
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import holdfast

SCRIPT = pathlib.Path(__file__).with_name("digits.py")
console = Console()


def train(
    url: pathlib.Path, progress: Progress, label: str, *, kill_at: int | None = None
) -> tuple[int, int, str]:
    """Run the training script; return its first step, its last step, and the rest of what it printed.

    With `kill_at`, its whole process group, data workers included, gets SIGKILL once it prints that step.
    """
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(url)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    task = progress.add_task(label, total=None)
    first = last = 0
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("step "):
            said += line
            continue
        last = int(line.split()[1])
        first = first or last
        progress.update(task, completed=last)
        if kill_at is not None and last >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    progress.update(task, total=last, completed=last)
    if kill_at is None and process.returncode != 0:
        raise SystemExit(f"training ended with exit code {process.returncode}")
    return first, last, said


def tell(who: str, what: str, style: str = "bold") -> None:
    """Print what happened to a run, a line for each line of it."""
    for line in what.strip().splitlines():
        console.print(f"[{style}]{who:<13}[/] {line}", soft_wrap=True, highlight=False)


def random_kills(total: int, count: int, seed: int) -> list[int]:
    """Return one random step in each of `count` stretches of the run, never at the edge of an epoch."""
    rng = random.Random(seed)
    first, last = 30, int(total * 0.9)
    inside = [s for s in range(first, last) if 2 < s % STEPS_PER_EPOCH < STEPS_PER_EPOCH - 2]
    return [
        rng.choice(inside[i * len(inside) // count : (i + 1) * len(inside) // count]) for i in range(count)
    ]


def compare(a: holdfast.Run, b: holdfast.Run) -> dict[str, bool]:
    """Compare the final checkpoints of two runs byte by byte, and their loss curves bit by bit."""
    one, two = a.latest, b.latest
    same = {
        "same final step": one.step == two.step,
        "same tensors by name": list(one.tensors) == list(two.tensors),
    }
    for part in one.parts:
        tensors = [n for n in one.tensors if n.startswith(f"{part}/")]
        equal = all(one[n].read().tobytes() == two[n].read().tobytes() for n in tensors)
        values = one.manifest.parts[part].tree == two.manifest.parts[part].tree
        same[f"{part}: {len(tensors)} tensors and all other values"] = equal and values
    curves = [[(o.clock.step, o.metric, o.value.hex()) for o in run.observations()] for run in (a, b)]
    same[f"loss curve: {len(curves[0])} values"] = curves[0] == curves[1]
    return same


def draw(out: pathlib.Path, calm: holdfast.Run, killed: holdfast.Run, kills: list[tuple[int, int]]) -> None:
    """Draw both loss curves with the kills, and where each resume took the run up again."""
    figure, axes = plt.subplots(figsize=(10, 5), dpi=150)
    for run, style in ((calm, {"lw": 5, "color": "#f2c879", "label": "never killed"}),
                       (killed, {"lw": 1, "color": "#1f3a5f", "label": f"killed {len(kills)} times"})):  # fmt: skip
        points = [(o.clock.step, o.value) for o in run.observations() if o.metric == "loss"]
        axes.plot(*zip(*points, strict=True), **style)
    val = [(o.clock.step, o.value) for o in killed.observations() if o.metric == "val_loss"]
    axes.plot(*zip(*val, strict=True), "o", ms=4, color="#2a7f62", label="validation loss")
    for number, (at, back) in enumerate(kills):
        label = {"label": "SIGKILL, and the step it resumed from"} if number == 0 else {}
        axes.axvline(at, color="#c0392b", lw=1.2, **label)
        height = 0.92 - 0.06 * (number % 4)
        axes.annotate("", xy=(back, height), xytext=(at, height), xycoords=("data", "axes fraction"),
                      arrowprops={"arrowstyle": "->", "color": "#c0392b", "lw": 1.2})  # fmt: skip
    best = killed["best"].step
    axes.axvline(best, color="#2a7f62", ls=":", lw=1.2, label=f"best checkpoint, step {best}")
    axes.set(
        xlabel="step",
        ylabel="loss",
        yscale="log",
        title="One run, killed and resumed: the curves are bit-identical",
    )
    axes.legend(loc="upper right", framealpha=1, edgecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/demo"))
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    calm_url, killed_url = options.out / "undisturbed", options.out / "killed"

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        _, total, said = train(calm_url, progress, "never killed")
        tell("never killed", said)
        kills: list[tuple[int, int]] = []  # where it was killed, and where the next process took it up
        killed_at = None
        for at in [*random_kills(total, options.kills, options.seed), None]:
            label = "to the end" if at is None else f"until SIGKILL {len(kills) + 1}"
            first, last, said = train(killed_url, progress, label, kill_at=at)
            if killed_at is not None:
                kills.append((killed_at, first - 1))
                tell("resumed", f"from step {first - 1}: {killed_at - first + 1} steps are done again")
            if at is not None:
                tell("SIGKILL", f"at step {last}", "bold red")
            killed_at = last
        tell("killed", said)

    calm, killed = holdfast.Run(calm_url), holdfast.Run(killed_url)
    console.print()
    same = compare(calm, killed)
    for what, equal in same.items():
        console.print(f"  {'[green]identical[/]' if equal else '[red]DIFFERENT[/]'}  {what}")
    console.print()
    subprocess.run([sys.executable, "-m", "holdfast", "ls", str(killed_url)], check=True)
    draw(options.out / "loss.png", calm, killed, kills)
    console.print(f"\nThe loss curve with the kills: {options.out / 'loss.png'}   (seed {options.seed})")
    if not all(same.values()):
        raise SystemExit("the runs differ: resuming was not exact")


if __name__ == "__main__":
    main()
