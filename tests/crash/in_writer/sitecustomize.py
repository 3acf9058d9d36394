"""In the writer process, and there alone: its disk does what the environment's plan says.

The process is started by exec, so nothing of a test can reach into it but this, which Python imports at its start.
"""

from __future__ import annotations

import os
import sys

PLAN = os.environ.get("HOLDFAST_WRITER_FAULT")

if PLAN and "holdfast.saving.server" in sys.orig_argv:
    from holdfast.stores import local
    from holdfast.testing import Fault, FaultDisk, FaultPlan, kill_process

    kind, at, when, times = PLAN.split(",")
    fault = Fault(kind, int(at), when, times=int(times) or None)  # type: ignore[arg-type]
    plan = FaultPlan(fault, die=kill_process)
    local.OsDisk = lambda: FaultDisk(plan)  # type: ignore[assignment, misc]
