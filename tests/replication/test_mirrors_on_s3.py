"""Mirrors in a real S3 server: copies, acknowledgement, what comes back, and a server that is not there."""

from __future__ import annotations

import pathlib
import shutil

import pytest

import holdfast
from holdfast import Checkpointer, every, last
from holdfast.cli import main
from holdfast.core.errors import NotReplicated
from holdfast.replication import Mirror
from holdfast.stores import LocalStore, open_store
from replication.runs import assert_is_copy, assert_sound, roll_back, steps, tiny, train
from replication.test_mirrors import learn, same
from servers.moto import S3Server
from servers.processes import free_port


def test_a_run_goes_on_from_a_bucket_bit_for_bit(tmp_path: pathlib.Path, s3_url: str) -> None:
    undisturbed = learn(tmp_path / "other", 12)
    run = tmp_path / "run"
    learn(run, 12, mirrors=[s3_url], ack="all", stop_at=7)
    assert_is_copy(open_store(s3_url), LocalStore(run))
    shutil.rmtree(run)
    final = learn(run, 12, mirrors=[s3_url], ack="all")
    assert same(final, undisturbed)
    assert {*steps(LocalStore(run))} == {6, 8, 10, 12}
    assert steps(open_store(s3_url)) == [2, 4, 6, 8, 10, 12]
    assert_sound(open_store(s3_url))
    assert main(["status", str(run)]) == 0


def test_whatever_becomes_of_the_run_becomes_of_the_bucket(
    tmp_path: pathlib.Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    packed = Mirror(s3_url, compress=True, verify=True, bandwidth="500MB")
    train(LocalStore(run), 8, keep=last(3))
    with Checkpointer(run, tiny(0), mirrors=[packed]):
        pass
    assert_is_copy(open_store(s3_url), LocalStore(run))
    roll_back(LocalStore(run), 6, 9)
    holdfast.Run(run).tag("good", 9)
    assert main(["status", str(run)]) == 8
    assert main(["sync", str(run)]) == 0
    assert main(["status", str(run)]) == 0
    assert_is_copy(open_store(s3_url), LocalStore(run))
    assert all(key.endswith(".zst") for key in open_store(s3_url).names("data"))
    assert "Secret" not in capsys.readouterr().out


def test_a_bucket_may_be_the_primary_and_a_directory_its_mirror(tmp_path: pathlib.Path, s3_url: str) -> None:
    undisturbed = learn(tmp_path / "other", 8)
    near = tmp_path / "near"
    learn(s3_url, 8, mirrors=[near], keep=every(steps=4), stop_at=5)  # type: ignore[arg-type]
    assert_is_copy(LocalStore(near), open_store(s3_url))
    store = open_store(s3_url)
    store.delete(store.names("checkpoints"))
    store.delete(store.names("data"))
    assert same(learn(s3_url, 8, mirrors=[near]), undisturbed)  # type: ignore[arg-type]


def test_a_server_that_is_not_there_is_only_warned_of(
    tmp_path: pathlib.Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("holdfast.replication.recovery.ANSWER_SECONDS", 1.0)
    url = f"s3://nowhere/run?endpoint=http://127.0.0.1:{free_port()}"
    undisturbed = learn(tmp_path / "other", 6)
    final = learn(tmp_path / "run", 6, mirrors=[url], mirror_seconds=1)
    assert same(final, undisturbed)
    assert "s3://nowhere/run" in caplog.text
    with pytest.raises(NotReplicated, match="s3://nowhere/run"):
        learn(tmp_path / "run", 8, mirrors=[url], mirror_seconds=1, ack="all")
    assert steps(LocalStore(tmp_path / "run"))[-1] == 8
