"""Planted secrets that must come out nowhere: files of a run, logs, outputs, messages, representations, processes."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, Run, every
from holdfast.catalog.keyfiles import PASSPHRASE_VARIABLE, read_signing_key, write_key_pair
from holdfast.cli import main
from holdfast.cli.app import build
from holdfast.core.errors import HoldfastError
from holdfast.format.signing import SigningKey
from holdfast.saving.environment import fingerprint
from holdfast.saving.wire import Open
from holdfast.stores import open_store
from patience import until

SECRET = "PLANTED+s3cr3t/Xx9"
FORMS = [
    SECRET, SECRET.replace("+", "%2B").replace("/", "%2F"), SECRET.replace("/", "%2F"), "s3cr3t", base64.b64encode(SECRET.encode()).decode().rstrip("=")
]  # fmt: skip
VARIABLES = [
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN", "WANDB_API_KEY",
    "GITHUB_TOKEN", "DATABASE_URL", PASSPHRASE_VARIABLE, "MY_PASSWORD", "HOLDFAST_PEER_SECRET",
]  # fmt: skip


def found_in(text: str | bytes) -> list[str]:
    raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    return [form for form in FORMS if form.encode() in raw]


@pytest.fixture(autouse=True)
def secrets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Plant them, and look through all that was logged and printed."""
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    caplog.set_level(logging.DEBUG)
    yield
    out, err = capfd.readouterr()
    for where, text in (("the log", caplog.text), ("standard output", out), ("standard error", err)):
        assert not found_in(text), f"{where}: {text[-2000:]}"


def told_by(act: Callable[[], object]) -> str:
    """Everything that an act shows: its value, or its error with the whole chain behind it."""
    try:
        value = act()
        return f"{value!r} {value}"
    except Exception as e:  # noqa: BLE001 - whatever it is, it is looked through
        shown = [*traceback.format_exception(e)]
        while e is not None:
            shown += [repr(e), str(e), repr(e.args), *getattr(e, "__notes__", [])]
            e = e.__cause__  # type: ignore[assignment]
        return "\n".join(shown)


def everything_below(path: Path) -> bytes:
    return b"\n".join(str(p).encode() + p.read_bytes() for p in path.rglob("*") if p.is_file())


# ---- URLs -----------------------------------------------------------------------------------------------------------

URLS = [
    f"s3://AKIA:{SECRET}@bucket/run", f"s3://AKIA:{SECRET}@bucket", f"s3://{FORMS[1]}@bucket/run", f"s3://bucket/run?secret={SECRET}", f"s3://bucket/run?token={SECRET}&x=1",
    f"s3://bucket/run?endpoint=http://u:{SECRET}@host:1", f"s3://bucket/run?endpoint=http://host:1/?sig={SECRET}", "s3://bucket/run?endpoint=http://u:s3cr3t@host:1", f"s3://bucket/run#{SECRET}",
    f"az://container/run?sv=2024&sig={SECRET}", f"az://account:{SECRET}@container/run", f"abfs://c:{SECRET}@a.dfs.core.windows.net/run",
    f"gs://bucket/run?key={SECRET}", f"gs://u:{SECRET}@bucket/run", f"https://u:{SECRET}@host/run", f"https://host/run?X-Amz-Signature={SECRET}",
    f"ftp://u:{SECRET}@host/x", f"s3a://k:{SECRET}@b/r@5", f"s3://k:{SECRET}@b@best", f"s3://bucket/run?profile=p&password={SECRET}",
    f"s3://bucket/run?single_writer={SECRET}", f"S3://AKIA:{SECRET}@bucket/run", f"postgres://u:{SECRET}@db/x",
    f"peer://u:{SECRET}@host/run", f"peer://host/run?secret={SECRET}", f"peer://host/run#{SECRET}", f"peers://a,b,u:{SECRET}@c/run", f"peers://a,b,c/run?copies={SECRET}",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_a_secret_in_a_url_is_not_repeated(url: str) -> None:
    acts: dict[str, Callable[[], object]] = {
        "open_store": lambda: open_store(url),
        "open": lambda: holdfast.open(url),
        "save": lambda: holdfast.save(url, {"x": [1]}),
        "Run": lambda: Run(url),
        "Checkpointer": lambda: Checkpointer(url, {"x": [1]}),
    }
    for name, act in acts.items():
        told = told_by(act)
        assert "Error" in told or "rror" in told, name
        assert not found_in(told), name


VERBS = [
    ["show"], ["ls"], ["verify"], ["cat", "model/w"], ["diff", "1", "2"], ["tag", "best"], ["untag", "best"], ["prune", "--keep", "last(1)", "-n"], ["rm", "5", "-y"],
    ["export", "/nowhere/x"], ["sign", "--key", "/nowhere"], ["status"], ["doctor"], ["sync"], ["scrub"], ["repair", "--from", "memory://x"], ["cp", "memory://x"], ["plan"], ["trash"], ["undo"], ["collect"],
]  # fmt: skip


def test_every_verb_is_among_them() -> None:
    verbs = {c.name or c.callback.__name__ for c in build().registered_commands if c.callback is not None}
    assert verbs - {v[0] for v in VERBS} == {"keygen", "peer"}  # they take no URL


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_no_verb_repeats_a_secret_of_its_url(verb: list[str]) -> None:
    for url in URLS:
        assert main([verb[0], url, *verb[1:]]) != 0


@pytest.mark.parametrize("other", [["cp"], ["repair", "--from"], ["diff"]], ids=lambda v: v[0])
def test_nor_of_a_second_one(other: list[str], tmp_path: Path) -> None:
    holdfast.save(tmp_path / "run", {"x": [1]}, step=1)
    for url in URLS:
        main([other[0], str(tmp_path / "run"), *other[1:], url])


# ---- environment ----------------------------------------------------------------------------------------------------


def test_a_server_that_cannot_be_reached_tells_no_credentials() -> None:
    store = open_store("s3://bucket/run?endpoint=http://127.0.0.1:1")
    assert not found_in(told_by(lambda: store))
    assert not found_in(told_by(lambda: vars(store)))
    told = told_by(lambda: store.read("run.json"))
    assert "could not read" in told
    assert not found_in(told)


def test_a_run_holds_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--password", SECRET])
    live = {"w": np.zeros(4)}
    with Checkpointer(tmp_path / "run", live, save=every(steps=1)) as ckpt:
        for _ in ckpt.steps(2):
            ckpt.log(loss=1.0)
    Run(tmp_path / "run").tag("good")
    assert not found_in(everything_below(tmp_path / "run"))
    assert not found_in(repr(fingerprint()))
    for verb in (["show"], ["show", "--json"], ["ls"], ["ls", "--json"], ["verify"]):
        assert main([verb[0], str(tmp_path / "run"), *verb[1:]]) == 0


HEADS = {
    "a detached head": (f"{'a' * 40}\n", "a" * 40), "another file": (f"{SECRET}\n", ""), "a path out": ("ref: refs/../../secret\n", ""), "an absolute path": ("ref: /etc/hostname\n", ""),
    "a sound ref": ("ref: refs/heads/main\n", "b" * 64), "bytes": ("\udcff\udcfe", ""), "nothing": ("", ""),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_the_commit_of_the_code_is_a_commit(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, expected = HEADS[what]
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / "secret").write_text("c" * 40)
    (tmp_path / ".git/refs/heads/main").write_text("b" * 64)
    (tmp_path / ".git/HEAD").write_bytes(head.encode(errors="surrogateescape"))
    monkeypatch.chdir(tmp_path)
    assert fingerprint().get("git", "") == expected


# ---- signing keys ---------------------------------------------------------------------------------------------------


def test_a_signing_run_leaves_its_key_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in its files, nor on the writer's command line, nor in the writer's environment."""
    write_key_pair(tmp_path / "k.pem", SigningKey.generate(), SECRET)
    plain = SigningKey.generate()
    monkeypatch.setenv("OUR_KEY", plain.pem().decode())
    body = "".join(plain.pem().decode().splitlines()[1:-1])
    for sign in (tmp_path / "k.pem", "env:OUR_KEY"):
        with Checkpointer(
            tmp_path / "run", {"w": np.zeros(4)}, save=every(steps=1), sign=sign, writer="process"
        ) as ckpt:
            writer = ckpt._engine.session._host.pid
            for _ in ckpt.steps(ckpt.step + 1):
                proc = Path(f"/proc/{writer}")
                for told in (proc / "cmdline", proc / "environ"):
                    content = told.read_bytes()
                    assert b"PRIVATE KEY" not in content
                    assert PASSPHRASE_VARIABLE.encode() not in content
                    assert body.encode() not in content
        shutil_free(tmp_path / "run", body)


def shutil_free(run: Path, body: str) -> None:
    content = everything_below(run)
    assert b"PRIVATE" not in content
    assert body.encode() not in content
    assert not found_in(content)


def test_what_is_said_to_the_writer_does_not_show_the_key(tmp_path: Path) -> None:
    holdfast.save(tmp_path / "run", {"x": [1]})
    from holdfast.catalog.lease import holder

    lease = holder(open_store(tmp_path / "run"))
    assert lease is not None
    message = Open("file:///x", lease, SECRET.encode())
    for shown in (repr(message), str(message), repr(message.__rich_repr__())):
        assert not found_in(shown)


def test_a_key_that_cannot_be_read_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = SigningKey.generate().pem().decode()
    spoilt = pem.replace("\n", f"\n{SECRET}", 1)
    (tmp_path / "k.pem").write_text(spoilt)
    monkeypatch.setenv("OUR_KEY", spoilt)
    for act in (
        lambda: read_signing_key(tmp_path / "k.pem"),
        lambda: read_signing_key("env:OUR_KEY"),
        lambda: holdfast.open("memory://none", trusted=tmp_path / "k.pem"),
        lambda: holdfast.open("memory://none", trusted=spoilt),
    ):
        told = told_by(act)
        assert "k.pem: is no" in told or "private key" in told or "public key" in told
        assert not found_in(told)
        assert pem.splitlines()[1][:20] not in told


def test_a_passphrase_on_a_terminal_is_not_echoed(tmp_path: Path) -> None:
    """A real terminal: what is typed does not come back."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    environment = {k: v for k, v in os.environ.items() if v != SECRET}
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "holdfast", "keygen", str(tmp_path / "k.pem"), "--encrypt"],
        stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        for _ in range(2):
            while not shown.rstrip().endswith(b":"):
                shown += os.read(controller, 1000)
            # It turns the echo off with the prompt on the screen, and forgets what was typed before.
            until(lambda: not termios.tcgetattr(controller)[3] & termios.ECHO, "the echo to be off")
            os.write(controller, SECRET.encode() + b"\n")
            shown += b"|"
        while True:
            try:
                piece = os.read(controller, 1000)
            except OSError:  # the other end is gone
                break
            if not piece:
                break
            shown += piece
    finally:
        process.wait(60)
        os.close(controller)
    assert process.returncode == 0, shown
    assert not found_in(shown)
    os.environ[PASSPHRASE_VARIABLE] = SECRET
    assert read_signing_key(tmp_path / "k.pem")


def test_errors_are_holdfasts_own_where_a_url_is_wrong() -> None:
    for url in URLS:
        with pytest.raises(HoldfastError):
            open_store(url)
