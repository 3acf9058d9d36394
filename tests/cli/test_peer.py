"""`peer`: a service that begins, serves and ends as a process, and the secret that it takes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from holdfast.cli.exits import STORE, USAGE
from holdfast.stores import open_store
from servers.peers import PEER_SECRET, Peer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_serves_until_it_is_told_to_end(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("HOLDFAST_PEER_SECRET", PEER_SECRET)
    peer = Peer("8MB")
    try:
        store = open_store(f"{peer.url}/run")
        store.create("k", b"x" * 1_000_000)
        assert 6_000_000 < (store.room() or 0) <= 7_000_000
        peer.process.send_signal(number)
        _, said = peer.process.communicate(timeout=20)
        assert (peer.process.returncode, said) == (0, "")
    finally:
        peer.kill()


def test_what_it_cannot_serve_is_one_sentence(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOLDFAST_PEER_SECRET", "HOLDFAST_PEER_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    without = cli("peer", "serve")
    assert without.code == USAGE
    assert "need a secret" in without.err
    made = cli("peer", "secret", tmp_path / "s")
    assert made.code == 0
    assert (tmp_path / "s").read_text().strip() not in made.out + made.err
    assert cli("peer", "secret", tmp_path / "s").code == STORE
    assert cli("peer", "secret").code == USAGE
    monkeypatch.setenv("HOLDFAST_PEER_SECRET_FILE", str(tmp_path / "s"))
    for arguments, code in (
        (("--bind", "192.0.2.1:1"), STORE),
        (("--bind", "nonsense:x"), STORE),
        (("--memory", "lots"), USAGE),
        (("file",), USAGE),
    ):
        refused = cli("peer", "serve", *arguments)
        assert refused.code == code, arguments
        assert refused.err.count("\n") == 1
