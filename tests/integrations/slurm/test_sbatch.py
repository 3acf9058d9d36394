"""The batch script of the examples, run by bash with a stand-in for Slurm's commands: real signals, real training.

The stand-in does what Slurm 22.05 was seen to do: the signal of `--signal=B:` goes to the script alone, scancel's to all
processes below srun, children's children in sessions of their own included; a job that is queued again runs the same
script anew.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from integrations.watching import (
    STEPS,
    TIMEOUT,
    TRAINER,
    environment,
    steps_of,
    tensors_of,
    undisturbed,
    until,
)

SCRIPT = Path(__file__).parents[3] / "examples" / "slurm" / "train.sbatch"
COMMANDS = {
    "srun": 'echo $$ > "$STAND_IN/step"; exec "$@"',
    "scancel": """
        every() { echo "$1"; for child in $(cat /proc/"$1"/task/*/children); do every "$child"; done; }
        kill "-${1#--signal=}" $(every "$(cat "$STAND_IN/step")")
    """,
    "scontrol": 'echo "$@" >> "$STAND_IN/scontrol-log"',
}


class Slurm:
    """One job on one node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE))
        commands = directory / "commands"
        commands.mkdir()
        for name, body in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}\n")
            (commands / name).chmod(0o755)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        path = f"{self.directory / 'commands'}:{environment()['PATH']}"
        given = environment(PATH=path, STAND_IN=str(self.directory), SLURM_JOB_ID="7")
        return subprocess.Popen(["bash", str(SCRIPT), *command], env=given, start_new_session=True)

    @property
    def asked(self) -> list[str]:
        """What scontrol was asked for."""
        log = self.directory / "scontrol-log"
        return log.read_text().splitlines() if log.exists() else []

    def cancel(self) -> None:
        """Send SIGTERM to everything below srun."""
        command = [str(self.directory / "commands" / "scancel"), "--signal=TERM", "7"]
        subprocess.run(command, env=environment(STAND_IN=str(self.directory)), check=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    (tmp_path / "slurm").mkdir()
    return Slurm(tmp_path / "slurm")


def test_bash_reads_it_and_it_asks_slurm_for_what_it_relies_on(slurm: Slurm) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert {"requeue", "open-mode", "time"} <= set(slurm.options)
    to, seconds = slurm.options["signal"].split("@")
    assert to == "B:USR1"  # to the script alone
    assert int(seconds) > 30  # longer than torchrun or a default deadline would take


def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on_exactly(
    slurm: Slurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(TRAINER), str(run), str(log), str(STEPS)]
    job = slurm.start(*command, "0.05")
    written = tmp_path / "log-0"
    until(lambda: steps_of(written) >= 10, "ten steps")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(TIMEOUT) == 143
    assert slurm.asked == ["requeue 7"]
    assert "the writer process had ended" not in capfd.readouterr().err  # it gets the signal too, and stays
    saved = holdfast.Run(str(run)).latest
    assert 10 <= saved.step == steps_of(written) < STEPS  # not a step is lost, nor done twice
    assert saved.reasons == ("preempted by a signal",)

    assert slurm.start(*command).wait(TIMEOUT) == 0
    assert slurm.asked == ["requeue 7"]  # it is done
    assert (written.read_text(), tensors_of(run)) == undisturbed(tmp_path)


def test_a_job_that_is_cancelled_saves_and_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    run, written = tmp_path / "run", tmp_path / "log-0"
    job = slurm.start(sys.executable, str(TRAINER), str(run), str(tmp_path / "log"), str(STEPS), "0.05")
    until(lambda: steps_of(written) >= 5, "five steps")
    job.send_signal(signal.SIGTERM)  # Slurm tells the script, too
    slurm.cancel()
    assert job.wait(TIMEOUT) == 143
    assert slurm.asked == []
    assert 5 <= holdfast.Run(str(run)).latest.step == steps_of(written) < STEPS


def test_a_job_that_is_preempted_is_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    run, written = tmp_path / "run", tmp_path / "log-0"
    job = slurm.start(sys.executable, str(TRAINER), str(run), str(tmp_path / "log"), str(STEPS), "0.05")
    until(lambda: steps_of(written) >= 5, "five steps")
    slurm.cancel()  # Slurm tells the step alone
    assert job.wait(TIMEOUT) == 143
    assert slurm.asked == ["requeue 7"]
    assert 5 <= holdfast.Run(str(run)).latest.step == steps_of(written) < STEPS


def test_a_training_that_fails_is_not_queued_again(slurm: Slurm) -> None:
    assert slurm.start("bash", "-c", "exit 3").wait(TIMEOUT) == 3
    assert slurm.asked == []
