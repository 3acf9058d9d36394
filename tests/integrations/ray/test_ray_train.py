"""Real Ray Train on this machine: a worker is killed, and training resumes exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import holdfast
from integrations.watching import environment
from patience import until

pytest.importorskip("pydantic", reason="ray[train] is not installed")
ray_is_there = (
    subprocess.run([sys.executable, "-c", "import ray.train"], capture_output=True, check=False).returncode
    == 0
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ray_is_there, reason="ray[train] is not installed")]

DRIVER = Path(__file__).with_name("driver.py")
TIMEOUT = 280  # below pytest's own


def alive(words: str) -> list[str]:
    """Return the processes that have these words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in command:
            found.append(f"{path.parent.name}: {command}")
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("job")
    with tempfile.TemporaryDirectory(
        prefix="ray", ignore_cleanup_errors=True
    ) as short:  # a socket's path is short
        driver = subprocess.Popen(
            [sys.executable, str(DRIVER), str(out), short],
            env=environment(),
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = driver.communicate(timeout=TIMEOUT)
            assert driver.returncode == 0, errors
            until(lambda: not alive(short), "the processes of Ray to end")
        finally:
            try:
                os.killpg(driver.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    return out, json.loads((out / "found.json").read_text())


def test_a_worker_is_killed_and_training_resumes_exactly(job: tuple[Path, dict[str, Any]]) -> None:
    out, _ = job
    for rank in range(2):
        calm = (out / f"calm-{rank}").read_text().splitlines()
        killed = (out / f"killed-{rank}").read_text().splitlines()
        assert [line.split()[0] for line in calm] == [*map(str, range(9)), "end"]
        first, second = killed[:5], killed[5:]
        assert first == calm[:5]
        assert (
            second == calm[4:]
        )  # from the checkpoint of step 4: losses, then parameters, buffers, own values, generator
    assert (out / "killed-killed").exists()


@pytest.mark.parametrize("name", ["calm", "killed", "alone"])
def test_ray_has_a_reference_to_the_newest_checkpoint(job: tuple[Path, dict[str, Any]], name: str) -> None:
    out, found = job
    told = found[name]
    run = holdfast.Run(told["url"])
    assert told["url"] == f"file://{out}/ray/{name}/holdfast"
    assert told["step"] == run.latest.step == 9
    assert told["metrics"] == {"step": 9, "loss": run.latest.metrics["loss"]}
    steps = [step for step, _ in told["all"]]
    assert steps == sorted(set(steps))
    assert set(steps) <= {c.step for c in run} == {2, 4, 6, 8, 9}
    for step, metrics in told["all"]:
        assert metrics == {"step": step, "loss": run[step].metrics["loss"]}


def test_the_restarted_workers_tell_ray_what_they_resumed_from(job: tuple[Path, dict[str, Any]]) -> None:
    _, found = job
    assert 4 in [step for step, _ in found["killed"]["all"]]


def test_a_node_that_will_be_taken_away_is_one_more_reason_to_save(job: tuple[Path, dict[str, Any]]) -> None:
    _, found = job
    run = holdfast.Run(found["drained"]["url"])
    assert [(c.step, c.reasons) for c in run] == [
        (5, ("asked for",)),
        (9, ("end of training",)),
    ]  # asked at step 4


def test_ray_keeps_no_data(job: tuple[Path, dict[str, Any]]) -> None:
    out, _ = job
    directories = list((out / "ray" / "killed").glob("checkpoint_[0-9]*"))
    assert directories
    for directory in directories:
        [only] = directory.iterdir()
        assert only.name == "holdfast.json"
        assert only.stat().st_size < 1000


def test_what_is_refused_says_why(job: tuple[Path, dict[str, Any]]) -> None:
    _, found = job
    assert "train function of a trainer" in found["refused"]["no worker"]
    assert "expected the reference that holdfast reports to Ray" in found["refused"]["foreign"]
