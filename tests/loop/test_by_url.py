"""The whole job on an object store, by URL alone: the loop, a resume in a new process, retention, tags, the catalog, and
the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, Run, best, every, last
from holdfast.catalog.lease import LEASE_SECONDS, acquire, holder
from holdfast.cli import main
from holdfast.core.errors import LeaseHeld, LeaseLost, NoCheckpoint, NotARun
from holdfast.format.events import Resumed, Saved
from holdfast.stores import open_store
from holdfast.testing import MockClock
from servers.flaky import flaky_proxy
from servers.gcs import serving_gcs
from servers.moto import S3Server

TRAIN = """
import sys
import numpy as np
from holdfast import Checkpointer, best, every, last
url, stop_at, writer = sys.argv[1], int(sys.argv[2]), sys.argv[3]
state = {"model": {"w": np.zeros((300, 1000)), "b": np.zeros(7, np.float32)}, "rng_check": []}
with Checkpointer(url, state, save=every(steps=2), keep=last(2) | best("loss", mode="min"), writer=writer) as ckpt:
    for step in ckpt.steps(12):
        state["model"]["w"] += np.random.default_rng(step).standard_normal((300, 1000))
        state["model"]["b"] += 1
        state["rng_check"].append(float(np.random.rand()))
        ckpt.log(loss=abs(step - 4) + 0.5)
        if step + 1 == stop_at:
            break
print(float(state["model"]["w"].sum()).hex(), state["rng_check"])
"""


def train(url: str, stop_at: int, writer: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TRAIN, url, str(stop_at), writer],
        capture_output=True, text=True, timeout=120, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("writer", ["process", "thread", "inline"])
def test_a_run_resumes_in_a_new_process_bit_for_bit(s3_url: str, writer: str, tmp_path: Path) -> None:
    train(s3_url, 7, writer)
    stopped = Run(s3_url)
    assert stopped.latest.step in (6, 7)
    resumed = train(s3_url, 99, writer)
    run = Run(s3_url)
    assert run.steps == [4, 6, 10, 12]  # the best, the one it resumed from, the last two
    assert run.latest.verify() == []
    w = run.latest["model/w"].read()
    assert float(w.sum()).hex() == resumed.split()[0]
    expected = np.zeros((300, 1000))
    for step in range(12):
        expected += np.random.default_rng(step).standard_normal((300, 1000))
    assert np.array_equal(w, expected)
    assert len(run.latest.values()["rng_check"]) == 12  # type: ignore[arg-type]
    needed = {f.key for s in run.steps for p in run[s].manifest.parts.values() for f in p.files}
    assert {o.key for o in open_store(s3_url).list("data")} == needed  # retention left nothing behind


def test_functions_and_tags_and_rows(s3_url: str) -> None:
    state = {"weights": {"w": np.arange(3_000_000, dtype=np.float32).reshape(3000, 1000)}, "epoch": 3}
    for step in (1, 2, 3):
        state["weights"]["w"][step] = -1.0  # type: ignore[index]
        holdfast.save(
            s3_url, state, step=step, metrics={"loss": 1.0 / step}, tag="good" if step == 2 else None
        )
    run = Run(s3_url)
    assert run.steps == [1, 2, 3]
    assert holdfast.open(s3_url, "good").step == 2
    assert holdfast.open(s3_url)["weights/w"][2, :3].tolist() == [-1.0, -1.0, -1.0]
    assert holdfast.load(s3_url, step=1)["epoch"] == 3
    live = {"weights": {"w": np.zeros((3000, 1000), np.float32)}, "epoch": 0}
    holdfast.load(s3_url, into=live)
    assert np.array_equal(live["weights"]["w"], state["weights"]["w"])
    run.tag("kept", 1)
    run.prune(last(1))
    assert Run(s3_url).steps == [1, 2, 3]  # 1 and 2 are tagged
    run.untag("kept")
    Run(s3_url).prune(last(1))
    assert Run(s3_url).steps == [2, 3]


def test_what_is_no_run_is_said_to_be_none(s3_url: str) -> None:
    with pytest.raises(NotARun, match="not a holdfast run"):
        _ = Run(s3_url).latest
    with pytest.raises((NotARun, NoCheckpoint)):
        holdfast.open(s3_url)


def test_the_command_line_by_url(s3_url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    state = {"model": {"w": np.arange(12.0).reshape(3, 4)}, "lr": 0.5}
    for step in range(1, 7):
        state["model"]["w"] += 1  # type: ignore[index]
        holdfast.save(s3_url, state, step=step, metrics={"loss": 7.0 - step})

    def cli(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    listed = json.loads(cli("ls", s3_url, "--json"))
    assert "6" in json.dumps(listed)
    cli("tag", f"{s3_url}@3", "deployed")
    assert json.loads(cli("show", f"{s3_url}@deployed", "--json"))["step"] == 3
    assert "w" in cli("cat", f"{s3_url}@3", "model/w")
    cli("verify", s3_url)
    cli("diff", f"{s3_url}@1", f"{s3_url}@2")
    cli("export", f"{s3_url}@3", str(tmp_path / "out.safetensors"))
    cli("prune", s3_url, "--keep", "last(2)", "--yes")
    assert Run(s3_url).steps == [3, 5, 6]
    cli("rm", s3_url, "5", "--yes")
    assert Run(s3_url).steps == [3, 6]
    assert json.loads(cli("show", f"{s3_url}?single_writer=1@deployed", "--json"))["step"] == 3


def test_a_second_writer_is_refused_and_a_lost_lease_fences(s3_url: str) -> None:
    first, clock = open_store(s3_url), MockClock()
    held = acquire(first, clock, heartbeat=False)
    with pytest.raises(LeaseHeld):
        acquire(open_store(s3_url), clock, heartbeat=False)
    clock.advance(LEASE_SECONDS + 1)
    held.renew()
    assert holder(first) == held.doc
    held.release()
    taken = acquire(open_store(s3_url), clock, heartbeat=False)
    assert taken.generation == 2
    with pytest.raises(LeaseLost):
        held.check()


def test_two_checkpointers_of_one_url(s3_url: str) -> None:
    with Checkpointer(s3_url, {"w": np.zeros(3)}, save=every(steps=1), keep=last(2) | best("x", mode="max")):
        with pytest.raises(LeaseHeld):
            with Checkpointer(s3_url, {"w": np.zeros(3)}, save=every(steps=1)) as second:
                for _ in second.steps(1):
                    pass


def test_no_byte_of_a_run_shows_a_secret(s3: S3Server, s3_url: str) -> None:
    holdfast.save(s3_url, {"w": np.zeros(3)})
    store = open_store(s3_url)
    whole = b"".join(store.read(key) for key in store.names(""))
    assert s3.env["AWS_SECRET_ACCESS_KEY"].encode() not in whole


@pytest.mark.parametrize("seed", range(3))
def test_a_run_comes_through_a_storm_of_lost_answers_and_errors(
    s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    faults = ["lost answer", "500 after", "503 before", "429 before", "500 before"]
    state = {"model": {"w": np.zeros((100, 100))}, "seen": [0]}
    with flaky_proxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.chance = lambda: rng.choice(faults) if rng.random() < 0.15 else None
        with Checkpointer(s3_url, state, save=every(steps=1), keep=last(2), writer="thread") as ckpt:
            for _ in ckpt.steps(12):
                state["model"]["w"] += 1.5  # type: ignore[index]
                state["seen"][0] += 1  # type: ignore[index]
        assert len(proxy.done) > 10
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    run = Run(s3_url)
    assert run.steps == [11, 12]
    assert all(checkpoint.verify() == [] for checkpoint in run)
    assert (run.latest["model/w"].read() == 18.0).all()
    saved = [e.attempt for e in run.events() if isinstance(e, Saved)]
    assert len(saved) == len(set(saved)) == 12, "each save is told once"
    needed = {f.key for s in run.steps for p in run[s].manifest.parts.values() for f in p.files}
    assert {o.key for o in open_store(s3_url).list("data")} == needed


KILLED = TRAIN.replace("        break\n", "        import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")


def test_a_run_whose_trainer_was_killed_goes_on_from_its_last_checkpoint(s3_url: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, s3_url, "7", "process"], capture_output=True, timeout=120
    )
    assert killed.returncode == -9, killed.stderr
    before = Run(s3_url).steps  # the writer may still be at the next one
    resumed = train(s3_url, 99, "process")
    w = Run(s3_url).latest["model/w"].read()
    assert float(w.sum()).hex() == resumed.split()[0]
    expected = np.zeros((300, 1000))
    for step in range(12):
        expected += np.random.default_rng(step).standard_normal((300, 1000))
    assert np.array_equal(w, expected)
    (went_on,) = (e.step for e in Run(s3_url).events() if isinstance(e, Resumed) and e.step)
    assert went_on in (2, 4, 6)
    assert went_on >= max(before, default=0)


def test_a_run_in_google_cloud_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_gcs() as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.endpoint)
        train("gs://bucket/runs/digits", 7, "process")
        train("gs://bucket/runs/digits", 99, "process")
        run = Run("gs://bucket/runs/digits")
        assert run.steps == [4, 6, 10, 12]
        assert run.latest.verify() == []
        assert not any("/probe/" in key for key in bucket.blobs)
