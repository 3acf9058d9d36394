"""One rank of a run, without torch unless it is asked for: a few arrays, spread by hand; started by the tests as a process of its own.

The order (JSON, first argument) says what to do; `KILL` in it names a line of holdfast's own at which a rank is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np

import holdfast
from holdfast import EarlyStopping, best, every
from holdfast.core.errors import OutOfSpace
from holdfast.distributed import lanes, meeting, turns
from holdfast.saving import job

POINTS = {  # when a rank is killed: at the n-th time that this function of this file is entered
    "snapshot": ("saving/snapshot.py", "copy"),
    "begun": ("loop/session.py", "begin"),
    "begun-follower": ("loop/following.py", "begin"),
    "writing": ("saving/persist.py", "persist_parts"),
    "record": ("distributed/meeting.py", "say"),
    "gathering": ("saving/rank_job.py", "_gather"),
    "whole": ("saving/rank_job.py", "_whole"),
    "commit": ("catalog/checkpoints.py", "commit"),
    "committed": ("saving/rank_job.py", "_forget_before"),
    "done": ("loop/following.py", "complete"),
    "done-both": ("loop/saver.py", "_complete"),
}


def kill_at(point: str, step: int, ckpt: list[holdfast.Checkpointer]) -> None:
    """Have this process killed when it comes to a point once training has come to a step."""
    file, function = POINTS[point]

    def trace(frame, event, arg):  # type: ignore[no-untyped-def]
        here = frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file)
        if here and event == "call" and ckpt and ckpt[0].step >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return

    sys.settrace(trace)
    threading.settrace_all_threads(trace) if hasattr(
        threading, "settrace_all_threads"
    ) else threading.settrace(trace)


def fill(full_at: int) -> None:
    """Have the disk be full when this step is saved."""
    real = job.persist_parts

    def full(store, step, *args, **kwargs):  # type: ignore[no-untyped-def]
        if step == full_at:
            raise OutOfSpace("no space left on device")
        return real(store, step, *args, **kwargs)

    job.persist_parts = full  # type: ignore[assignment]


def mark_when_told(mark: Path) -> None:
    """Make a file once this rank has told rank 0 of a signal."""
    real = turns.Turns.wish

    def wish(self, **what):  # type: ignore[no-untyped-def]
        real(self, **what)
        mark.touch()

    turns.Turns.wish = wish  # type: ignore[method-assign]


def main() -> None:
    order = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lanes.StoreLane.meet_seconds = order.get("meet", 0.05)
    meeting.LOOK_SECONDS, meeting.GONE_SECONDS = 0.2, 0.5  # on one disk a word is there once it is said
    if order.get("broadcast") or order.get("gloo"):  # a process group, and its key-value store for turns
        import datetime

        import torch.distributed

        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rng = np.random.default_rng(5)
    shared = rng.standard_normal((40, 5))
    state = {"same": {"w": shared.copy()}, "own": {"seen": np.zeros(3) + rank, "rank": rank}}
    rules = {
        "steps": every(steps=2),
        "best": best("loss", mode="min"),
        "time": every(minutes=1e-3),
        "none": every(steps=10**6),
    }
    found: list[holdfast.Checkpointer] = []
    if order.get("kill") and rank in order["kill"]:
        kill_at(order["point"], order["at"], found)
    if order.get("full") == rank:
        fill(order["at"])
    signalled, at = order.get("signal") or (None, -1)
    told = Path(order["out"], f"{order['name']}-told")
    if signalled == rank:
        mark_when_told(told)
    stop = EarlyStopping("loss", mode="min", patience=3) if order.get("stop") else None
    ckpt = holdfast.Checkpointer(
        order["run"], state, save=rules[order.get("save", "steps")], stop=stop,
        ranks=(rank, world, order.get("seconds", 30)), replicated=["same/**"], writer=order.get("writer", "auto"),
        check_replicas=order.get("check", False), keep=holdfast.last(3),
        broadcast=order.get("broadcast", False), mirrors=order.get("mirrors"),
    )  # fmt: skip
    found.append(ckpt)
    done = []
    with ckpt:
        for step in ckpt.steps(order["steps"]):
            state["same"]["w"] *= 1.01
            state["own"]["seen"] += step
            if order.get("diverge") == [rank, step]:
                state["same"]["w"][3, 3] += 1e-9
            # Each rank sees another loss; rank 0's counts.
            losses = order.get("losses")
            if losses:
                ckpt.log(loss=losses[step] if rank == 0 else 100.0 - step)
            if (signalled, at) == (rank, step):
                os.kill(os.getpid(), getattr(signal, order.get("number", "SIGTERM")))
            while signalled != rank and at == step and not told.exists():
                threading.Event().wait(0.01)  # else it might be at its end before the other has its turn
            if order.get("asks") == step:
                ckpt.save(tag="asked")
            done.append(step)
            if order.get("kill") and step in (2, 3):
                ckpt.wait()  # so that step 2 is there for certain
            if order.get("slow"):
                threading.Event().wait(order["slow"])
    report = ckpt.restore_report
    Path(order["out"], f"{order['name']}-{rank}.json").write_text(
        json.dumps(
            {
                "done": done,
                "w": state["same"]["w"].tobytes().hex(),
                "own": [state["own"]["seen"].tolist(), state["own"]["rank"]],
                "stopped": ckpt.stopped.reason if ckpt.stopped else None,
                "notes": report.notes if report else None,
                "step": ckpt.step,
            }
        )
    )


if __name__ == "__main__":
    main()
