"""Run one (optimizer, scheduler) row of the matrix: every resume in a process of its own. A script, so that the processes
are forked from one that has done nothing but import."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import traceback
import warnings

import torch

import holdfast.functional
import holdfast.state.adapters.torch_loader
import holdfast.state.adapters.torch_steps  # noqa: F401 - imported once, before the processes are forked
from holdfast.state import registry
from resume import training

SHARED_MEMORY = pathlib.Path("/dev/shm")  # what is on trial is not the disk


def in_new_process(**arguments: object) -> dict[str, object]:
    """Run `training.run` in a forked process and return what it returned."""
    out = tempfile.mktemp(suffix=".json")  # not a pipe: data workers would inherit it and hold it open
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(120)  # a deadlock dies, and is a failure
        try:
            pathlib.Path(out).write_text(json.dumps(training.run(**arguments)))  # type: ignore[arg-type]
            code = 0
        except BaseException:  # noqa: BLE001 - printed, and the exit code says it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, f"{arguments} failed"
    found: dict[str, object] = json.loads(pathlib.Path(out).read_text())
    os.unlink(out)
    return found


def check(name: str, got: dict[str, object], expected: dict[str, object]) -> None:
    assert got["fingerprint"] == expected["fingerprint"], f"{name}: {_differing(got, expected)} differ"
    losses = got["losses"]
    assert losses == {k: v for k, v in expected["losses"].items() if k in losses}, f"{name}: losses differ"


def _differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    return [k for k in a["fingerprint"] if a["fingerprint"][k] != b["fingerprint"][k]]


def row(case: training.Case, scratch: pathlib.Path) -> int:
    """Check one case; return the number of resumes."""
    base, work = scratch / "base", scratch / "run"
    total = training.TOTAL
    longer = in_new_process(case=case, url=None, until=total + 6, passing=total)
    pure = {**longer, "fingerprint": longer["passed"]}
    saving = in_new_process(case=case, url=str(base), until=total)
    check("saving changes nothing", saving, pure)

    def resumed(
        name: str, *, which: int, until: int = total, fresh: bool = True, **more: object
    ) -> dict[str, object]:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(base, work)
        return in_new_process(case=case, url=str(work), until=until, which=which, **more)

    check("step 0", resumed("step 0", which=0), pure)
    check("mid-epoch", resumed("mid-epoch", which=5), pure)
    check("epoch boundary", resumed("epoch boundary", which=12), pure)
    resumed("first of two", which=5, until=9)
    check("twice in one epoch", resumed("twice", which=9, fresh=False), pure)
    check("extension of a finished run", resumed("extension", which=total, until=total + 6), longer)
    control = resumed("control", which=5, weights_only=True)
    assert control["fingerprint"]["optimizer"] != pure["fingerprint"]["optimizer"], "the test has no power"
    assert control["fingerprint"]["model"] != pure["fingerprint"]["model"], "the test has no power"
    if case.scaler and case.accumulate == 1:
        assert pure["skipped"], "no step was skipped by the scaler, so skipping is not tested"
    shutil.rmtree(base)
    return 6


if __name__ == "__main__":
    registry.dispatch()  # imports the adapters, of which each process would need all
    torch.use_deterministic_algorithms(True)
    logging.getLogger("holdfast").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", "Detected call of `lr_scheduler.step", UserWarning
    )  # a skipped first step
    count = 0
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as scratch:
        for case in training.cases(sys.argv[1], sys.argv[2]):
            try:
                count += row(case, pathlib.Path(scratch))
            except BaseException:
                print(f"case {case}")
                raise
    print(count)
