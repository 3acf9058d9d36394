"""Send a real SIGKILL at the n-th changing call of an operation, for every n (or every STRIDE-th), and check what is
left: python kill_every_call.py OPERATION WHEN STRIDE. A script, so that forking happens in a process without threads.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from crash.copies import COPIES
from crash.operations import OPERATIONS, Operation, state
from holdfast.catalog import tidiness
from holdfast.stores import LocalStore
from holdfast.testing import Fault, FaultDisk, FaultPlan, invariants, kill_process

SHARED_MEMORY = Path("/dev/shm")


def in_child(operation: Operation, root: Path, fault: Fault) -> int:
    """Carry the operation out in a forked process under a fault; return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            operation.act(LocalStore(root, FaultDisk(FaultPlan(fault, die=kill_process))))
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def run(operation: Operation, when: str, stride: int) -> int:
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as scratch:
        base, root = Path(scratch, "base"), Path(scratch, "run")
        operation.prepare(LocalStore(base))
        cases = 0
        while True:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(base, root)
            fault = Fault("kill", 1 + cases * stride, when, "write" if when == "torn" else "")  # type: ignore[arg-type]
            status = in_child(operation, root, fault)
            if status == 0:
                return cases
            assert os.WIFSIGNALED(status), f"ended with {status} instead of being killed by {fault}"
            assert os.WTERMSIG(status) == signal.SIGKILL
            try:
                operation.after(operation.promises(LocalStore(root), operation.acknowledged, operation.truth))
                operation.act(LocalStore(root))  # the next attempt works, without manual steps
                operation.promises(LocalStore(root), operation.acknowledged, operation.truth)
                invariants.recovers(root, 9, state(9), temporary_at_most=operation.temporary)
            except BaseException:
                print(f"{operation.name}: {fault}; left: {sorted(p.name for p in root.rglob('*.json'))}")
                raise
            cases += 1


if __name__ == "__main__":
    tidiness.MARK_FROM = 0  # the mark of a long run must not hide what a dead writer left
    name, when, stride = sys.argv[1:]
    print(run(next(o for o in [*OPERATIONS, *COPIES] if o.name == name), when, int(stride)))
