"""The batch script of the examples, run by bash with a stand-in for Slurm's commands: real signals, real training.

The stand-in does what Slurm 22.05 was seen to do: the signal of `--signal=B:` goes to the script alone; scancel's to
the tasks with ProctrackType=proctrack/cgroup, and with others to everything below them, sessions of their own included; a
job that is queued again runs the same script anew.
"""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

import holdfast
from integrations.watching import STEPS, environment, left, steps_of, training, undisturbed
from patience import TIMEOUT, until

SCRIPT = Path(__file__).parents[3] / "examples" / "slurm" / "train.sbatch"
COMMANDS = {
    "srun": 'echo $$ > "$STAND_IN/step"; exec "$@"',
    "scancel": """
        below() { echo "$1"; for child in $(cat /proc/"$1"/task/*/children); do below "$child"; done; }
        task=$(cat "$STAND_IN/step")
        kill "-${1#--signal=}" $(if [ "$REACHED" = everything ]; then below "$task"; else echo "$task"; fi)
    """,
    "scontrol": 'echo "$@" >> "$STAND_IN/scontrol-log"',
}


class Slurm:
    """One job on one node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reached = "everything"  # by scancel
        self.options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE))
        commands = directory / "commands"
        commands.mkdir()
        for name, body in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}\n")
            (commands / name).chmod(0o755)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        path = f"{self.directory / 'commands'}:{environment()['PATH']}"
        given = environment(PATH=path, STAND_IN=str(self.directory), REACHED=self.reached, SLURM_JOB_ID="7")
        return subprocess.Popen(["bash", str(SCRIPT), *command], env=given, start_new_session=True)

    @property
    def asked(self) -> list[str]:
        """What scontrol was asked for."""
        log = self.directory / "scontrol-log"
        return log.read_text().splitlines() if log.exists() else []

    def cancel_step(self) -> None:
        """Send SIGTERM to everything below srun."""
        command = [str(self.directory / "commands" / "scancel"), "--signal=TERM", "7"]
        subprocess.run(
            command, env=environment(STAND_IN=str(self.directory), REACHED=self.reached), check=True
        )


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


@pytest.mark.parametrize(
    ("world", "reached"), [(1, "everything"), pytest.param(2, "tasks", marks=pytest.mark.slow)]
)
def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on_exactly(
    slurm: Slurm, tmp_path: Path, capfd: pytest.CaptureFixture[str], world: int, reached: str
) -> None:
    slurm.reached = reached
    job = slurm.start(*training(tmp_path, "run", world=world, pace=0.3))
    written = tmp_path / "run-log-0"
    until(lambda: steps_of(written) >= 3, "three steps")  # of forty, so that it is far from its end
    job.send_signal(signal.SIGUSR1)
    assert job.wait(TIMEOUT) == (143 if world == 1 else 1)  # torchrun says 1
    assert slurm.asked == ["requeue 7"]
    assert "the writer process had ended" not in capfd.readouterr().err  # it gets the signal too, and stays
    [saved] = list(holdfast.Run(str(tmp_path / "run")))
    assert saved.reasons == ("preempted by a signal",)
    assert 3 <= saved.step < STEPS
    for rank in range(world):  # not a step is lost, nor done twice
        assert steps_of(tmp_path / f"run-log-{rank}") == saved.step

    assert slurm.start(*training(tmp_path, "run", world=world)).wait(TIMEOUT) == 0
    assert slurm.asked == ["requeue 7"]  # it is done
    assert left(tmp_path, "run", world) == undisturbed(world)


@pytest.mark.parametrize(("how", "asked"), [("cancelled", []), ("preempted", ["requeue 7"])])
def test_a_job_that_is_told_to_end_saves_and_is_queued_again_unless_it_is_cancelled(
    slurm: Slurm, tmp_path: Path, how: str, asked: list[str]
) -> None:
    job = slurm.start(*training(tmp_path, "run", pace=0.3))
    written = tmp_path / "run-log-0"
    until(lambda: steps_of(written) >= 3, "three steps")
    if how == "cancelled":  # Slurm tells the script, too
        job.send_signal(signal.SIGTERM)
    slurm.cancel_step()
    assert job.wait(TIMEOUT) == 143
    assert slurm.asked == asked
    assert 3 <= holdfast.Run(str(tmp_path / "run")).latest.step == steps_of(written) < STEPS


def test_a_training_that_fails_is_not_queued_again(slurm: Slurm) -> None:
    assert slurm.start("bash", "-c", "exit 3").wait(TIMEOUT) == 3
    assert slurm.asked == []
