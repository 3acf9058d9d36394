"""Every bad input ends in one sentence and the exit code that `holdfast --help` promises."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.cli import main
from holdfast.cli.exits import CODES
from holdfast.format.sealed import seal, unseal
from holdfast.stores import OsDisk

READING = (("show",), ("diff",), ("cat", "model/big"), ("export",))


def reseal(path: Path, **changes: object) -> None:
    """Change members of a sealed document and give it a digest that is right again."""
    body = msgspec.json.decode(unseal(path.read_bytes(), path.name))
    path.write_bytes(seal(msgspec.json.encode(body | changes)))


def manifest(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:012d}.json"


def reading(verb: tuple[str, ...], run: Path, step: int, out: Path) -> list[object]:
    if verb[0] == "diff":
        return ["diff", run, 100, step]
    return [verb[0], f"{run}@{step}", *verb[1:], *([out] if verb[0] == "export" else [])]


def one_sentence(result) -> bool:
    lines = result.err.splitlines()
    return lines[0].startswith("error: ") and "Traceback" not in result.err and len(lines) <= 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ls", "{missing}"], 3),
        (["show", "{missing}"], 3),
        (["verify", "{missing}@3"], 3),
        (["tag", "{missing}", "x"], 3),
        (["prune", "{missing}", "--keep", "last(1)", "-y"], 3),
        (["rm", "{missing}", "1", "-y"], 3),
        (["cat", "{missing}", "x"], 3),
        (["export", "{missing}", "x"], 3),
        (["diff", "{missing}@1", "{missing}@2"], 3),
        (["ls", "{empty}"], 3),
        (["show", "{empty}"], 3),
        (["show", "{run}@150"], 3),
        (["show", "{run}@nope"], 3),
        (["show", "{run}", "--part", "nope"], 3),
        (["diff", "{run}", "100", "nope"], 3),
        (["diff", "{run}", "100", "200", "--part", "nope"], 3),
        (["cat", "{run}", "nope"], 3),
        (["cat", "{run}", "big"], 3),
        (["verify", "{run}@nope"], 3),
        (["tag", "{run}", "x", "nope"], 3),
        (["tag", "{run}@100", "x", "200"], 2),
        (["tag", "{run}@deployed", "x", "100"], 2),
        (["untag", "{run}", "nope"], 3),
        (["show", "{run}@"], 2),
        (["show", "{run}@a b"], 2),
        (["show", "@3"], 2),
        (["ls", "{run}", "--keep", "nonsense"], 2),
        (["prune", "{run}", "--keep", "every(steps=0)", "-y"], 2),
        (["prune", "{run}", "--keep", "on('end')", "-y"], 2),
        (["prune", "{run}", "--keep", "~last(1)", "-y"], 2),
        (["prune", "{run}"], 2),
        (["prune", "{run}", "--keep", "last(9)", "--grace", "x"], 2),
        (["prune", "{run}", "--keep", "last(1)", "-n", "--grace", "x"], 2),
        (["rm", "{run}", "100", "-y", "--now", "--grace", "x"], 2),
        (["rm", "{run}"], 2),
        (["rm", "{run}", "x"], 2),
        (["show", "{run}", "--depth", "-1"], 2),
        (["nope"], 2),
        (["ls", "--nope"], 2),
        (["ls", "a", "b"], 2),
        (["ls", "s3://bucket/run"], 6),
    ],
)
def test_exit_codes(cli, run: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    (tmp_path / "empty").mkdir()
    places = {"run": run, "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    result = cli(*(a.format(**places) for a in arguments))
    assert (result.code, result.out) == (code, ""), result
    assert one_sentence(result)
    assert not (tmp_path / "missing").exists()
    assert list((tmp_path / "empty").iterdir()) == []
    assert holdfast.Run(run).steps == [100, 200, 300, 400, 500]


def test_every_code_is_in_the_help(cli) -> None:
    text = cli("--help").out
    for code, meaning in CODES.items():
        assert any(row.split() == [str(code), *meaning.split()] for row in text.splitlines())


@pytest.mark.parametrize("position", [0, 100, -40])
def test_a_flipped_bit_of_a_manifest(cli, run: Path, flip, position: int, tmp_path: Path) -> None:
    flip(manifest(run, 300), position)
    listed = cli("ls", run)
    assert listed.code == 0
    assert "step 300 is broken: " in listed.out
    assert "4 checkpoints, 1 broken" in listed.out.replace("checkpoints,", "checkpoints,")
    assert [b["step"] for b in cli("ls", run, "--json").json["broken"]] == [300]
    for verb in READING:
        result = cli(*reading(verb, run, 300, tmp_path / "out"))
        assert (result.code, one_sentence(result)) == (4, True), verb
    verified = cli("verify", run)
    assert verified.code == 4
    assert "step 300: checkpoints/000000000300.json" in verified.out
    assert cli("verify", f"{run}@300").code == 4
    assert cli("verify", f"{run}@500").code == 0
    assert cli("rm", run, 300, "--yes").code == 0
    assert cli("verify", run).code == 0


def test_a_flipped_bit_of_a_tensor(cli, run: Path, flip, data_file, tmp_path: Path) -> None:
    file = data_file(300)
    place = cli("cat", f"{run}@300", "model/big", "--json").json["place"]
    flip(file, place["first_byte"] + 5)
    result = cli("verify", run)
    assert result.code == 4
    assert "tensor 'big'" in result.out
    assert "1 of 5 checkpoints wrong" in result.out
    found = cli("verify", run, "--json").json
    assert found["verified"] == [100, 200, 400, 500]
    assert [(p["step"], p["key"]) for p in found["problems"]] == [(300, file.relative_to(run).as_posix())]
    for verb in (("diff",), ("cat", "model/big"), ("export",)):
        result = cli(*reading(verb, run, 300, tmp_path / "out"))
        assert (result.code, one_sentence(result)) == (4, True), verb
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".tmp*")) == []
    assert cli("cat", f"{run}@300", "config/none").code == 3


def test_a_truncated_file(cli, run: Path, data_file, tmp_path: Path) -> None:
    file = data_file(300)
    os.truncate(file, file.stat().st_size - 1)
    for verb in (*READING, ("verify",)):
        result = cli(*reading(verb, run, 300, tmp_path / "out"))
        assert result.code == 4, verb
    assert "were committed" in cli("verify", run).out


def test_a_missing_file(cli, run: Path, data_file) -> None:
    data_file(300).unlink()
    assert "the data file is gone" in cli("verify", run).out
    assert cli("show", f"{run}@300").code == 4
    assert cli("ls", run).code == 0


@pytest.mark.parametrize("where", ["run", "manifest"])
def test_a_newer_format(cli, run: Path, where: str) -> None:
    reseal(run / "run.json" if where == "run" else manifest(run, 300), format=3)
    result = cli("show", f"{run}@300")
    assert (result.code, one_sentence(result)) == (4, True)
    assert "pip install --upgrade holdfast" in result.err


def test_a_value_that_this_version_does_not_know(cli, run: Path) -> None:
    path = manifest(run, 300)
    parts = msgspec.json.decode(unseal(path.read_bytes(), path.name))["parts"]
    parts["config"]["tree"]["lr"] = {"$future": 1}
    reseal(path, parts=parts)
    result = cli("verify", run)
    assert result.code == 4
    assert "step 300: " in result.out
    assert "$future" in result.out
    assert cli("show", f"{run}@300").code == 4
    assert cli("ls", run).code == 0


def test_a_damaged_tag_or_log_is_told_by_verify(cli, run: Path, flip) -> None:
    flip(run / "tags" / "deployed.json", 10)
    result = cli("verify", run)
    assert result.code == 4
    assert "tags: " in result.out
    assert "5 checkpoints" in result.out


def test_a_run_without_checkpoints(cli, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert "0 checkpoints" in cli("ls", run).out
    for verb in ("show", "verify"):
        assert cli(verb, run).code == 3


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Make a directory read-only even for root: a read-only bind mount, else the immutable attribute."""
    ways = (
        ([["mount", "--bind", path, path], ["mount", "-o", "remount,ro,bind", path]], ["umount", path]),
        ([["chattr", "-R", "+i", path]], ["chattr", "-R", "-i", path]),
    )
    for make, undo in ways:
        done = [
            shutil.which(command[0]) and subprocess.run(command, capture_output=True).returncode == 0
            for command in make
        ]
        if all(done):
            try:
                yield
            finally:
                subprocess.run(undo, check=True)
            return
        if any(done):
            subprocess.run(undo, check=False)
    if os.geteuid() == 0:
        pytest.skip("this root may neither mount nor chattr")
    path.chmod(0o555)
    try:
        yield
    finally:
        path.chmod(0o755)


def test_a_read_only_run_can_be_looked_at_and_not_changed(cli, run: Path) -> None:
    with read_only(run):
        for arguments in (("ls", run), ("show", run), ("verify", run), ("diff", run, 100, 200)):
            assert cli(*arguments).code == 0
        for arguments in (
            ("rm", run, 100, "-y"),
            ("prune", run, "--keep", "last(1)", "-y"),
            ("tag", run, "x"),
        ):
            result = cli(*arguments)
            assert (result.code, one_sentence(result)) == (6, True), result
            assert "read-only" in result.err
        assert cli("export", run, run / "out.safetensors").code == 6
    assert holdfast.Run(run).steps == [100, 200, 300, 400, 500]
    assert holdfast.Run(run).tags == {"deployed": 200}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_writes(cli, run: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(OsDisk, "open_new", refuse)
    result = cli("tag", run, "x")
    assert (result.code, one_sentence(result)) == (6, True)
    assert os.strerror(code) in result.err


def test_a_bad_sector_is_a_problem_of_its_checkpoint(cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(
        OsDisk,
        "pread_into",
        lambda self, fd, target, offset: fail() if len(target) > 60_000 else os.preadv(fd, [target], offset),
    )
    result = cli("verify", run)
    assert result.code == 4
    assert "Input/output error" in result.out


def test_an_unexpected_error_is_one_sentence_and_debug_shows_it(
    cli, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(holdfast.Run, "records", fail)
    result = cli("ls", run)
    assert (result.code, one_sentence(result)) == (1, True)
    assert "RuntimeError: boom" in result.err
    with pytest.raises(RuntimeError, match="boom"):
        main(["ls", str(run), "--debug"])


def test_debug_shows_the_traceback_of_our_own_errors_too(tmp_path: Path) -> None:
    with pytest.raises(holdfast.HoldfastError):
        main(["--debug", "show", str(tmp_path)])


def test_control_c(cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(holdfast.Run, "verify", interrupt)
    result = cli("verify", run)
    assert (result.code, result.out, result.err) == (130, "", "")


def test_a_number_that_is_not_finite_stays_json(cli, tmp_path: Path) -> None:
    holdfast.save(tmp_path / "r", {"m": {"x": np.array([np.nan, np.inf])}}, metrics={"loss": float("-inf")})
    assert cli("ls", tmp_path / "r", "--json").json["checkpoints"][0]["metrics"] == {"loss": "-inf"}
    assert cli("cat", tmp_path / "r", "m/x", "--values", "--json").json["values"] == ["nan", "inf"]
