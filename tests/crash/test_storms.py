"""Real trainings in real processes: SIGTERM under deadlines, and storms of SIGKILL with a mirror that comes and goes."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import holdfast
from crash import ledger
from crash.storm_trainer import EVERY
from holdfast import Run
from holdfast.stores import LocalStore
from holdfast.testing import invariants

pytest.importorskip("torch")
TRAINER = Path(__file__).with_name("storm_trainer.py")
STEPS = 60
STORM, MOODS, TERM = (
    "SIGKILL storm on a training",
    "mirror down, full and back, in a storm",
    "SIGTERM under a deadline of 0.1 to 30 s",
)
CELLS = [
    (STORM, "async save (process)"),
    (MOODS, "mirror"),
    (TERM, "async save (process)"),
    (TERM, "async save (thread)"),
]


def train(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TRAINER), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def weights(lines: list[str]) -> str:
    return next(line.split()[1] for line in lines if line.startswith("weights"))


def killed_after(process: subprocess.Popen[str], lines: int, linger: float) -> list[int]:
    """Kill a training some lines and a moment after its start; return the steps that it had acknowledged."""
    assert process.stdout is not None
    said = [line for line, _ in zip(process.stdout, range(lines), strict=False)]
    time.sleep(linger)
    process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return [int(n) for n in re.findall(r"acknowledged (\d+)\n", "".join(said) + rest)]


def test_a_storm_of_kills(tmp_path: Path) -> None:
    """The weights at the end are those of the undisturbed run, bit by bit, as is each acknowledged checkpoint on the
    way; and when the mirror is back it holds what the run holds."""
    out, errors = train(tmp_path / "calm", STEPS).communicate()
    calm = weights(out.splitlines() or [errors])
    source = random.Random(4)
    run, mirror, mood = tmp_path / "run", tmp_path / "mirror", tmp_path / "mood"
    moods = ["ok", "down", "full", "ok"] * ledger.budget(1, 6)
    acknowledged: set[int] = set()
    for now in moods:
        mood.write_text(now)
        process = train(run, STEPS, mirror, mood)
        acknowledged.update(killed_after(process, source.randrange(1, 16), source.random() * 0.05))
        for step in acknowledged:
            found, expected = (holdfast.load(at, step=step, as_="numpy") for at in (run, tmp_path / "calm"))
            assert invariants.same(found["model"], expected["model"]), f"step {step} after a kill"
            assert invariants.same(found["optimizer"], expected["optimizer"]), f"step {step} after a kill"
    mood.write_text("ok")
    out, errors = train(run, STEPS, mirror, mood).communicate(timeout=200)
    assert weights(out.splitlines() or [errors]) == calm, errors
    steps = Run(run).steps
    assert steps == list(range(EVERY, STEPS + 1, EVERY))
    assert not any(Run(run).verify().values())
    assert Run(mirror).steps == steps, "the mirror has not caught up"
    assert not any(Run(mirror).verify().values())
    invariants.replicas_agree(LocalStore(run), LocalStore(mirror))
    assert not invariants.left_over(run)
    ledger.count(STORM, "async save (process)", len(moods))
    ledger.count(MOODS, "mirror", len(moods))


TERMINATED = """
    import sys, time
    import numpy as np
    from holdfast import Checkpointer, every
    deadline, pause, writer = float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    held = {"w": np.zeros(400_000), "seen": 0}
    ckpt = Checkpointer(sys.argv[1], held, save=every(steps=3), writer=writer, deadline_seconds=deadline)
    for step in ckpt.steps(10**6):
        held["w"] += 1
        ckpt.state["seen"] = step + 1
        print("step", step, flush=True)
        time.sleep(pause)
"""
DEADLINES = [(0.1, 0.01), (0.1, 60.0), (1.0, 0.3), (2.0, 60.0), (30.0, 0.05)]


@pytest.mark.parametrize("writer", ["process", "thread"])
@pytest.mark.parametrize(("deadline", "pause"), DEADLINES if ledger.BROAD else DEADLINES[:4])
def test_sigterm_under_a_deadline(tmp_path: Path, deadline: float, pause: float, writer: str) -> None:
    """It ends in time with the new checkpoint or the old one, and what it says of them is so."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TERMINATED), str(tmp_path), str(deadline), str(pause), writer],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 7" if pause < 1 else "step 0"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=deadline + 60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    run = Run(tmp_path)
    deadline_passed = "no new checkpoint within" in errors
    assert deadline_passed or run.latest.reasons == ("preempted by a signal",)
    if pause > deadline:
        assert deadline_passed, errors
    said = re.search(r"the newest checkpoint is step (\d+)", errors)
    if said is not None:
        assert run.latest.step >= int(said.group(1))
    for step in run.steps:
        found = holdfast.load(tmp_path, step=step, as_="numpy")
        assert found["seen"] == step
        assert (found["w"] == step).all()
    assert not any(run.verify().values())
    ledger.count(TERM, f"async save ({writer})", 1)
