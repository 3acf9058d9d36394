"""The Job of the examples, its commands run as kubelet runs them: preStop, SIGTERM, and SIGKILL when the grace is over.

In a PID namespace of its own, where training is process 1 as in a container, and without one where there is no right to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast
from integrations.watching import (
    STEPS,
    TRAINER,
    environment,
    left,
    steps_of,
    tensors_of,
    undisturbed,
)
from patience import TIMEOUT, until

yaml = pytest.importorskip("yaml")
FILE = Path(__file__).parents[3] / "examples" / "kubernetes" / "job.yaml"


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}


class Kubelet:
    """Starts and stops the job's one container."""

    def __init__(self, directory: Path, *, namespace: bool) -> None:
        self.pod = documents()["Job"]["spec"]["template"]["spec"]
        [self.container] = self.pod["containers"]
        self.namespace = namespace
        self.run, self.log = directory / "run", directory / "run-log-0"
        image = directory / "image"
        image.mkdir()
        (image / "python").write_text(
            f'#!/bin/sh\nexec {sys.executable} {TRAINER} "$2" {directory}/run-log {STEPS} $PACE\n'
        )
        (image / "python").chmod(0o755)
        self.env = environment(PATH=f"{image}:{os.environ['PATH']}", RUN=str(self.run))
        self.running: subprocess.Popen[bytes] | None = None

    def start(self, pace: float) -> None:
        into = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"] if self.namespace else []
        self.running = subprocess.Popen(
            [*into, *self.container["command"]], env={**self.env, "PACE": str(pace)}, start_new_session=True
        )

    @property
    def first(self) -> int:
        """Process 1 of the container, as it is called outside."""
        assert self.running is not None
        pid = self.running.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text()) if self.namespace else pid

    def pre_stop(self) -> None:
        # Its seconds are those that a large state takes.
        command = [
            part.replace("sleep 5", "sleep 2")
            for part in self.container["lifecycle"]["preStop"]["exec"]["command"]
        ]
        if self.namespace:
            command = ["nsenter", "--target", str(self.first), "--pid", *command]
        else:
            command = [part.replace("-USR1 1;", f"-USR1 {self.first};") for part in command]
        subprocess.run(command, check=True, timeout=TIMEOUT)

    def stop(self, *, grace_is_over: bool = False) -> int:
        """Stop the container as kubelet does; return its exit code."""
        assert self.running is not None
        end = time.monotonic() + self.pod["terminationGracePeriodSeconds"]
        self.pre_stop()
        if grace_is_over:
            os.kill(self.first, signal.SIGKILL)
        else:
            os.kill(self.first, signal.SIGTERM)
        return self.running.wait(end - time.monotonic())

    def finish(self) -> int:
        assert self.running is not None
        return self.running.wait(TIMEOUT)


@pytest.fixture
def kubelet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kubelet]:
    allowed = subprocess.run(
        ["unshare", "--pid", "--mount-proc", "--fork", "true"], check=False, capture_output=True
    )
    if request.param == "process 1" and allowed.returncode != 0:
        pytest.skip("no right to make a PID namespace")
    kubelet = Kubelet(tmp_path, namespace=request.param == "process 1")
    yield kubelet
    if kubelet.running is not None and kubelet.running.poll() is None:
        os.killpg(kubelet.running.pid, signal.SIGKILL)


def test_what_kubernetes_is_asked_for_fits_together() -> None:
    found = documents()
    job, pod = found["Job"]["spec"], found["Job"]["spec"]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [128 + signal.SIGTERM]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy takes no other
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    [container] = pod["containers"]
    assert container["env"][0]["value"].startswith(container["volumeMounts"][0]["mountPath"])
    slept = int(container["lifecycle"]["preStop"]["exec"]["command"][-1].split()[-1])
    assert pod["terminationGracePeriodSeconds"] >= slept + 30  # the default deadline


@pytest.mark.slow
@pytest.mark.parametrize("kubelet", ["process 1", "any process"], indirect=True)
def test_a_pod_that_is_evicted_goes_on_exactly(kubelet: Kubelet, tmp_path: Path) -> None:
    kubelet.start(pace=0.3)
    until(lambda: steps_of(kubelet.log) >= 3, "three steps")
    assert kubelet.stop() == 143
    first, last = list(holdfast.Run(str(kubelet.run)))
    assert first.reasons == ("signal SIGUSR1",)
    assert last.reasons == ("preempted by a signal",)
    assert 3 <= first.step < last.step == steps_of(kubelet.log) < STEPS  # not a step is lost, nor done twice

    kubelet.start(pace=0.0)
    assert kubelet.finish() == 0
    assert left(tmp_path, "run") == undisturbed()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kubelet", ["any process"], indirect=True
)  # a new namespace would wait for the lease to end
def test_a_pod_that_is_killed_goes_on_from_what_pre_stop_asked_for(kubelet: Kubelet, tmp_path: Path) -> None:
    kubelet.start(pace=0.3)
    until(lambda: steps_of(kubelet.log) >= 3, "three steps")
    assert kubelet.stop(grace_is_over=True) not in (0, 143)
    [saved] = list(holdfast.Run(str(kubelet.run)))
    assert saved.reasons == ("signal SIGUSR1",)
    done = steps_of(kubelet.log)
    assert 3 <= saved.step < done < STEPS

    kubelet.start(pace=0.0)
    assert kubelet.finish() == 0
    lines = kubelet.log.read_text().splitlines(keepends=True)
    [calm], tensors = undisturbed()
    assert "".join(lines[:done]) == "".join(calm.splitlines(keepends=True)[:done])
    assert "".join(lines[done:]) == "".join(
        calm.splitlines(keepends=True)[saved.step :]
    )  # exact, those done twice too
    assert tensors_of(kubelet.run) == tensors
