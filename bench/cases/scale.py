"""Very many tensors, and very many checkpoints: holdfast alone, against the limit."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch

import holdfast
from bench.cases.saving import DURABLE, FIRST, HELD, count_state, first_figures
from bench.contestants import HOLDFAST, LIMIT
from bench.desks import SaveDesk
from bench.figures import CaseResult, Column
from bench.rounds import Plan, workers

COLUMNS = (
    FIRST,
    HELD,
    DURABLE,
    Column("latest", "Run(url).latest", against="latest", chart=True),
    Column("ls", "holdfast ls", against="ls", chart=True),
)

LATEST = """
import sys, time
from holdfast import Run
started = time.perf_counter()
step = Run(sys.argv[1]).latest.step
print(time.perf_counter() - started, step)
"""


def scale_case(plan: Plan) -> CaseResult:
    """Save 100,000 tensors; open and list a run of 10,000 checkpoints in a fresh process."""
    tensors, checkpoints = (5_000, 200) if plan.quick else (100_000, 10_000)
    about = (
        f"{tensors:,} tensors of 64 floats saved; a run of {checkpoints:,} checkpoints opened and listed in a fresh "
        "process. The limit of opening it is a look at the directory and one file read; that of listing, `--version`."
    )
    result = CaseResult("f", "Scale", about, COLUMNS, {"tensors": tensors, "checkpoints": checkpoints})
    entries = tuple(e for e in plan.entries if e.name == HOLDFAST)
    alone = replace(plan, entries=entries)
    with workers(alone, result, "states:many", SaveDesk) as rounds:
        count_state(rounds)
        rounds.turn("save", "saves for the first time", figures=first_figures)
        for i in range(plan.rounds):
            rounds.turn("save", f"saves, round {i + 1}")
    if entries:
        with tempfile.TemporaryDirectory(dir=plan.out, prefix="scratch-") as scratch:
            _history(plan, result, pathlib.Path(scratch) / "run", checkpoints)
    return result


def _history(plan: Plan, result: CaseResult, run: pathlib.Path, checkpoints: int) -> None:
    plan.say(f"{result.title}: makes {checkpoints:,} checkpoints")
    _make_history(run, checkpoints)
    for i in range(plan.rounds):
        plan.say(f"{result.title}: opens and lists the run, round {i + 1}")
        result.add(LIMIT, {"latest": _look(run), "ls": _timed(["-m", "holdfast", "--version"])})
        shown = _output(["-c", LATEST, str(run)]).split()
        if int(shown[1]) != checkpoints:
            raise ValueError(f"the newest of {checkpoints} checkpoints is shown as step {shown[1]}")
        result.add(HOLDFAST, {"latest": float(shown[0]), "ls": _timed(["-m", "holdfast", "ls", str(run)])})


def _make_history(run: pathlib.Path, checkpoints: int) -> None:
    """Make it through the public interface. Nobody needs it to survive a power cut, so nothing is synced."""
    fsync, os.fsync = os.fsync, lambda fd: None
    try:
        state = {"model": {"w": torch.zeros(1)}}
        with holdfast.Checkpointer(run, state, save=holdfast.every(steps=1)) as ckpt:
            for step in ckpt.steps(checkpoints):
                ckpt.log(loss=1.0 / (1 + step))
    finally:
        os.fsync = fsync


def _look(run: pathlib.Path) -> float:
    """List the names of the run's checkpoints and read the newest one's manifest."""
    started = time.perf_counter()
    newest = max(os.listdir(run / "checkpoints"))
    (run / "checkpoints" / newest).read_bytes()
    return time.perf_counter() - started


def _timed(arguments: list[str]) -> float:
    started = time.perf_counter()
    _output(arguments)
    return time.perf_counter() - started


def _output(arguments: list[str]) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
