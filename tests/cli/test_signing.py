"""`keygen`, `sign`, `--trust`, and exports that the real model signing verifies."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from holdfast.catalog.keyfiles import PASSPHRASE_VARIABLE


@pytest.fixture
def key(cli, tmp_path: Path) -> Path:
    assert cli("keygen", tmp_path / "key.pem").code == 0
    return tmp_path / "key.pem"


def test_keygen_writes_a_pair_and_never_over_another(cli, tmp_path: Path) -> None:
    made = cli("keygen", tmp_path / "k.pem", "--json").json
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    assert made["public"] == str(tmp_path / "k.pub")
    before = (tmp_path / "k.pem").read_bytes()
    again = cli("keygen", tmp_path / "k.pem")
    assert again.code == 2
    assert "never overwritten" in again.err
    assert (tmp_path / "k.pem").read_bytes() == before
    for told in (again.out, again.err, str(made)):
        assert "PRIVATE" not in told


def test_an_encrypted_key_asks_for_its_passphrase(
    cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    assert "encrypted" in cli("keygen", tmp_path / "k.pem").out
    assert b"ENCRYPTED" in (tmp_path / "k.pem").read_bytes()
    assert cli("sign", run, "--key", tmp_path / "k.pem").code == 0
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "battery staple")
    refused = cli("sign", run, "--key", tmp_path / "k.pem")
    assert refused.code == 2
    assert "battery" not in refused.err + refused.out
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    asked: list[str] = []
    nobody = cli("sign", run, "--key", tmp_path / "k.pem")
    assert nobody.code == 2
    assert "HOLDFAST_SIGNING_PASSPHRASE" in nobody.err
    assert cli("keygen", tmp_path / "more.pem", "--encrypt").code == 2
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda text, **how: asked.append(text) or "correct horse")
    assert cli("sign", run, "--key", tmp_path / "k.pem").code == 0
    assert asked == [f"passphrase of {tmp_path / 'k.pem'}"]


READS = ["show", "cat", "diff", "export", "verify"]


def read(cli, verb: str, run: Path, out: Path, *more: object) -> object:
    rest = {"cat": ["model/fc.bias"], "diff": [f"{run}@500"], "export": [out], "show": [], "verify": []}[verb]
    return cli(verb, f"{run}@500", *rest, *more)


@pytest.mark.parametrize("verb", READS)
def test_what_is_not_signed_is_refused_and_what_is_signed_is_read(
    verb: str, cli, run: Path, key: Path, tmp_path: Path
) -> None:
    public, out = key.with_suffix(".pub"), tmp_path / "w.safetensors"
    refused = read(cli, verb, run, out, "--trust", public)
    assert refused.code == (4 if verb == "verify" else 7)
    assert "not trusted" in refused.err + refused.out
    assert ": step " not in refused.out, "the step is said once"
    assert not out.exists()
    assert cli("sign", f"{run}@500", "--key", key).code == 0
    assert read(cli, verb, run, out, "--trust", public).code == 0


def test_sign_reads_every_byte_first(cli, run: Path, key: Path, data_file: object) -> None:
    file: Path = data_file(500)  # type: ignore[operator]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    refused = cli("sign", run, "--key", key)
    assert refused.code == 4
    assert "is not signed" in refused.err
    assert not (run / "signatures").exists()


def test_show_says_who_signed(cli, run: Path, key: Path) -> None:
    said = cli("sign", run, "--key", key, "--json").json
    assert f"key {said['key']} (not checked" in cli("show", run).out
    assert cli("show", run, "--json", "--trust", key.with_suffix(".pub")).json["signed_by"] == {
        said["key"]: True
    }


def test_verify_names_every_step_that_is_not_signed(cli, run: Path, key: Path) -> None:
    cli("sign", f"{run}@400", "--key", key)
    found = cli("verify", run, "--json", "--trust", key.with_suffix(".pub"))
    assert found.code == 4
    assert found.json["verified"] == [400]
    assert [p["step"] for p in found.json["problems"]] == [100, 200, 300, 500]  # type: ignore[index, attr-defined]


def test_verify_finds_damaged_signatures(cli, run: Path, key: Path) -> None:
    cli("sign", run, "--key", key)
    (document,) = (run / "signatures").iterdir()
    document.write_bytes(document.read_bytes().replace(b"ed25519", b"ed25518"))
    found = cli("verify", run)
    assert found.code == 4
    assert f"signatures/{document.name}" in found.out


# ---- model signing --------------------------------------------------------------------------------------------------


def model_signing(file: Path, public: Path) -> subprocess.CompletedProcess[str]:
    """The real verifier, as its own command line."""
    return subprocess.run(
        [
            sys.executable, "-m", "model_signing", "verify", "key", str(file),
            "--signature", f"{file}.sig", "--public_key", str(public),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def p256(cli, tmp_path: Path) -> Path:
    assert cli("keygen", tmp_path / "export.pem", "--type", "p256").code == 0
    return tmp_path / "export.pem"


def test_an_export_is_verified_by_model_signing(cli, run: Path, p256: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    out, public = tmp_path / "w.safetensors", p256.with_suffix(".pub")
    assert cli("export", run, out, "--sign-with", p256).code == 0
    sound = model_signing(out, public)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "succeeded" in sound.stdout + sound.stderr
    raw = bytearray(out.read_bytes())
    for place in (9, len(raw) // 2, len(raw) - 1):
        raw[place] ^= 1
        out.write_bytes(raw)
        assert model_signing(out, public).returncode != 0, place
        raw[place] ^= 1
    out.write_bytes(raw)
    signature = bytearray(Path(f"{out}.sig").read_bytes())
    at = signature.index(b'"sig":"') + 20
    signature[at] = ord("A") if signature[at] != ord("A") else ord("B")
    Path(f"{out}.sig").write_bytes(signature)
    assert model_signing(out, public).returncode != 0


def test_model_signing_refuses_another_key(cli, run: Path, p256: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    cli("keygen", tmp_path / "other.pem", "--type", "p256")
    out = tmp_path / "w.safetensors"
    assert cli("export", run, out, "--sign-with", p256).code == 0
    assert model_signing(out, tmp_path / "other.pub").returncode != 0


def test_an_export_is_not_signed_with_a_key_that_model_signing_does_not_know(
    cli, run: Path, key: Path, tmp_path: Path
) -> None:
    refused = cli("export", run, tmp_path / "w.safetensors", "--sign-with", key)
    assert refused.code == 2
    assert "--type p256" in refused.err
    assert not (tmp_path / "w.safetensors").exists()


def test_an_old_signature_is_not_left_beside_a_new_export(cli, run: Path, p256: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    Path(f"{out}.sig").write_text("old")
    assert cli("export", run, out, "--sign-with", p256).code != 0
    assert not out.exists()
    assert cli("export", run, out, "--sign-with", p256, "--force").code == 0
    assert Path(f"{out}.sig").read_text() != "old"


def test_a_p256_key_signs_manifests_too(cli, run: Path, p256: Path) -> None:
    assert cli("sign", run, "--key", p256).code == 0
    assert holdfast.open(run, trusted=p256.with_suffix(".pub")).step == 500


@pytest.mark.parametrize("name", ["trust.toml", "key.pub"])
def test_a_key_or_trust_file_that_makes_no_sense_is_wrong_usage(
    cli, run: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("nonsense")
    refused = cli("show", run, "--trust", tmp_path / name)
    assert refused.code == 2
    assert name in refused.err
