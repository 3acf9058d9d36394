"""A trainer that is killed at a given line of holdfast's own code after a snapshot: python killed_trainer.py RUN LINE.

LINE counts the lines that any of its threads runs from the moment the snapshot was complete; "count" prints how
many there are.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import numpy as np

from holdfast import Checkpointer, every, last
from holdfast.saving.snapshot import Snapshot

SIZE = 3_000_000  # floats: enough for the writer to be amid its work
armed = False
lines = 0
saves = 0


def state(step: int) -> dict[str, object]:
    return {"model": {"w": np.full(SIZE, float(step)), "b": np.full(7, step, np.float32)}, "seen": step}


def main() -> None:
    run, at = sys.argv[1], sys.argv[2]
    limit = -1 if at == "count" else int(at)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        global lines
        if "holdfast" not in frame.f_code.co_filename:
            return None
        if armed and event == "line":
            lines += 1
            if lines == limit:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    copy = Snapshot.copy

    def then_arm(self: Snapshot) -> None:
        global armed, saves
        copy(self)
        saves += 1
        armed = saves == 2

    Snapshot.copy = then_arm  # type: ignore[method-assign]
    threading.settrace(trace)
    sys.settrace(trace)
    ckpt = Checkpointer(run, state(0), save=every(steps=1), keep=last(1), writer="process")
    for step in ckpt.steps(2):
        ckpt.state.update(state(step + 1))
        ckpt.wait()
    ckpt.close()
    if at == "count":
        print(lines)


if __name__ == "__main__":
    main()
