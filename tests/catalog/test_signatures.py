"""Signed manifests: who signed which exact bytes, what is refused, and that nothing live changes before."""

from __future__ import annotations

import datetime
import itertools
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, Run, demote, last
from holdfast.catalog.deletion import Ages, collect
from holdfast.catalog.keyfiles import make_trust, read_signing_key, write_key_pair
from holdfast.catalog.signatures import read_signatures
from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    InvalidFormat,
    MissingDependency,
    PolicyError,
    StoreError,
    Untrusted,
)
from holdfast.format.sealed import seal, unseal
from holdfast.format.signature import KIND, Statement, decode_signatures
from holdfast.format.signing import SigningKey, public_key_of
from holdfast.stores import LocalStore, MemoryStore
from holdfast.testing import MockClock

ALGORITHMS = ["ed25519", "ecdsa-p256-sha256"]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Two key pairs: ours and a stranger's."""
    for name in ("ours", "strange"):
        write_key_pair(tmp_path / f"{name}.pem", SigningKey.generate())
    return {p.name: p for p in tmp_path.glob("*.p*")}


def state(x: float = 1.0) -> dict[str, object]:
    return {"model": {"w": np.full(4, x)}, "n": {"seen": 3}}


def save(store: MemoryStore | LocalStore, key: Path | None, step: int = 1, x: float = 1.0) -> None:
    holdfast.save(store, state(x), step=step, sign=key)


def only_signature(store: MemoryStore | LocalStore) -> str:
    (found,) = store.list("signatures")
    return found.key


# ---- every way in ---------------------------------------------------------------------------------------------------


def into(store: MemoryStore, **how: object) -> object:
    live = state(7.0)
    try:
        return holdfast.load(store, into=live, **how)  # type: ignore[call-overload]
    finally:
        changed = live["model"]["w"].tolist() != [7.0] * 4  # type: ignore[index]
        if changed and sys.exc_info()[0] is not None:
            raise AssertionError("live values were changed by a restore that was refused")


def restored(store: MemoryStore, which: int | str, **how: object) -> object:
    live = {"model": {"w": np.full(4, 7.0)}, "n": {"seen": 0}}
    try:
        with Checkpointer(store, live, **how) as ckpt:  # type: ignore[arg-type]
            ckpt.restore(which)
    except Untrusted:
        assert live["model"]["w"].tolist() == [7.0] * 4
        raise
    return live


def resumed(store: MemoryStore, **how: object) -> object:
    live = {"model": {"w": np.full(4, 7.0)}, "n": {"seen": 0}}
    try:
        with Checkpointer(store, live, **how) as ckpt:  # type: ignore[arg-type]
            for _ in ckpt.steps(1):
                pass
    except Untrusted:
        assert live["model"]["w"].tolist() == [7.0] * 4
        raise
    return live


WAYS: dict[str, Callable[..., object]] = {
    "load": lambda store, **how: holdfast.load(store, **how),
    "load a step": lambda store, **how: holdfast.load(store, step=1, **how),
    "into": into,
    "open": lambda store, **how: holdfast.open(store, **how),
    "a run's step": lambda store, **how: Run(store, **how)[1],
    "a run's latest": lambda store, **how: Run(store, **how).latest,
    "a run's tag": lambda store, **how: Run(store, **how)["good"],
    "a run's best": lambda store, **how: Run(store, **how).best("loss", mode="min"),
    "iterating a run": lambda store, **how: list(Run(store, **how)),
    "restore the newest": lambda store, **how: restored(store, "latest", **how),
    "restore a step": lambda store, **how: restored(store, 1, **how),
    "restore a tag": lambda store, **how: restored(store, "good", **how),
    "resume": resumed,
}


def prepared(key: Path | None) -> MemoryStore:
    store = MemoryStore("signed")
    holdfast.save(store, state(), step=1, metrics={"loss": 1.0}, tag="good", sign=key)
    return store


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_a_trusted_signer_is_read(way: str, keys: dict[str, Path]) -> None:
    assert WAYS[way](prepared(keys["ours.pem"]), trusted=keys["ours.pub"])


@pytest.mark.parametrize("way", WAYS)
def test_one_without_a_signature_is_refused(way: str, keys: dict[str, Path]) -> None:
    with pytest.raises(Untrusted, match=r"step 1 .* no signature"):
        WAYS[way](prepared(None), trusted=keys["ours.pub"])


@pytest.mark.parametrize("way", WAYS)
def test_one_of_a_strangers_key_is_refused(way: str, keys: dict[str, Path]) -> None:
    with pytest.raises(Untrusted, match="which is not trusted"):
        WAYS[way](prepared(keys["strange.pem"]), trusted=keys["ours.pub"])


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_trusted_is_read_with_a_warning_where_that_was_asked_for(
    way: str, keys: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert WAYS[way](prepared(None), trusted=keys["ours.pub"], verify="warn")
    assert "no signature" in caplog.text


def test_a_refusal_does_not_fall_back_to_an_older_checkpoint(keys: dict[str, Path]) -> None:
    """Going back behind a checkpoint sets it aside: that is for a person to decide."""
    store = prepared(keys["ours.pem"])
    save(store, None, step=2, x=2.0)
    with pytest.raises(Untrusted, match="step 2"):
        resumed(store, trusted=keys["ours.pub"])
    assert Run(store).steps == [1, 2]
    assert restored(store, 1, trusted=keys["ours.pub"])


# ---- what a signature is of -----------------------------------------------------------------------------------------


def tamper(store: MemoryStore, key: str, change: Callable[[dict], object]) -> None:
    document = msgspec.json.decode(unseal(store.read(key), key))
    change(document)
    store.replace(key, seal(msgspec.json.encode(document)))


CHANGES: dict[str, Callable[[dict], object]] = {
    "metrics": lambda d: d["metrics"].update(loss=0.0),
    "time": lambda d: d.update(time=d["time"] + 1),
    "environment": lambda d: d["environment"].update(python="2.7"),
    "a value": lambda d: d["parts"]["n"].update(tree={"seen": 4}),
    "a digest": lambda d: d["parts"]["model"]["files"][0].update(header_digest="00" * 32),
    "the run": lambda d: d.update(run="another"),
    "exactness": lambda d: d.update(exact=False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resealed_manifest_is_refused(what: str, keys: dict[str, Path]) -> None:
    store = prepared(keys["ours.pem"])
    tamper(store, "checkpoints/000000000001.json", CHANGES[what])
    with pytest.raises(Untrusted):
        holdfast.open(store, 1, trusted=keys["ours.pub"])


STATEMENTS: dict[str, Callable[[dict], object]] = {
    "the signature": lambda s: s.update(signature="AAAA" + s["signature"][4:]),
    "no base64": lambda s: s.update(signature="%%%"),
    "an empty signature": lambda s: s.update(signature=""),
    "time": lambda s: s["statement"].update(time=s["statement"]["time"] + 1),
    "step": lambda s: s["statement"].update(step=2),
    "attempt": lambda s: s["statement"].update(attempt="other"),
    "run": lambda s: s["statement"].update(run="other"),
    "size": lambda s: s["statement"].update(size=0),
    "manifest": lambda s: s["statement"].update(manifest="00" * 32),
    "algorithm": lambda s: s["statement"].update(algorithm="none"),
    "another algorithm": lambda s: s["statement"].update(algorithm="ecdsa-p256-sha256"),
    "key": lambda s: s["statement"].update(key="0" * 32),
    "an empty key": lambda s: s["statement"].update(key=""),
}


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_changed_statement_is_refused(what: str, keys: dict[str, Path]) -> None:
    store = prepared(keys["ours.pem"])
    tamper(store, only_signature(store), lambda d: STATEMENTS[what](d["signatures"][0]))
    with pytest.raises(Untrusted):
        holdfast.open(store, 1, trusted=keys["ours.pub"])


def test_a_signature_of_one_checkpoint_is_none_of_another(keys: dict[str, Path]) -> None:
    store = prepared(keys["ours.pem"])
    save(store, None, step=2)
    signed = only_signature(store)
    attempt = Run(store)[2].manifest.attempt
    store.replace(f"signatures/{2:012d}-{attempt}.json", store.read(signed))
    with pytest.raises(Untrusted, match="of other bytes"):
        holdfast.open(store, 2, trusted=keys["ours.pub"])


def test_a_signed_checkpoint_of_another_run_is_refused(keys: dict[str, Path]) -> None:
    """The same trusted key signs both runs: what lies in a run must be of it."""
    here, there = prepared(keys["ours.pem"]), prepared(keys["ours.pem"])
    for found in there.list(""):
        if found.key.startswith(("checkpoints", "data", "signatures")):
            here.replace(found.key, there.read(found.key))
    with pytest.raises(Untrusted, match="lies in run"):
        holdfast.open(here, 1, trusted=keys["ours.pub"])


class Exchanging(MemoryStore):
    """Shows a planted manifest to its first reader, and the signed one from then on."""

    planted: bytes = b""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if key.startswith("checkpoints/") and self.planted:
            shown, self.planted = self.planted, b""
            return shown
        return super().read(key, start, end)


def test_a_manifest_that_is_exchanged_while_it_is_read_is_refused(keys: dict[str, Path]) -> None:
    store = Exchanging("exchanging")
    holdfast.save(store, state(), step=1, sign=keys["ours.pem"])
    key = "checkpoints/000000000001.json"
    sound = store.read(key)
    tamper(store, key, lambda d: d["parts"]["n"].update(tree={"seen": 4}))
    planted = store.read(key)
    store.replace(key, sound)
    for way in ("open", "into", "load a step"):
        store.planted = planted
        with pytest.raises(Untrusted, match="exchanged"):
            WAYS[way](store, trusted=keys["ours.pub"])


def test_what_is_signed_for_another_purpose_is_no_signature_of_ours(keys: dict[str, Path]) -> None:
    """The key's owner signs the statement's own bytes, without saying what for."""
    store = prepared(keys["ours.pem"])
    signing = read_signing_key(keys["ours.pem"])

    def resign(document: dict) -> None:
        one = document["signatures"][0]
        raw = signing.sign(msgspec.json.encode(msgspec.convert(one["statement"], Statement)))
        one["signature"] = __import__("base64").b64encode(raw).decode()

    tamper(store, only_signature(store), resign)
    with pytest.raises(Untrusted, match="does not match"):
        holdfast.open(store, 1, trusted=keys["ours.pub"])


def test_the_preimage_is_as_the_format_says() -> None:
    said = Statement("r", 5, "aa", "00" * 32, 10, 1, "ed25519", "k")
    body = msgspec.json.encode(said)
    assert said.preimage() == b"DSSEv1 51 application/vnd.holdfast.manifest-signature.v1+json %d %s" % (
        len(body),
        body,
    )
    assert len(KIND) == 51


def test_every_bit_of_a_signed_checkpoint_counts(keys: dict[str, Path]) -> None:
    """Whichever bit is flipped in manifest or signature, it is refused; so is either without the other."""
    store = prepared(keys["ours.pem"])
    for key in ("checkpoints/000000000001.json", only_signature(store)):
        sound = store.read(key)
        for i in range(0, len(sound), 7):
            store.replace(key, sound[:i] + bytes([sound[i] ^ 1 << i % 8]) + sound[i + 1 :])
            with pytest.raises((Untrusted, IntegrityError, holdfast.core.errors.NoCheckpoint)):
                Run(store, trusted=keys["ours.pub"])[1]
        store.replace(key, sound)
    assert Run(store, trusted=keys["ours.pub"])[1].step == 1


def test_damaged_signatures_are_damage(keys: dict[str, Path]) -> None:
    """A resume goes back behind a damaged checkpoint, as it does for damaged data, and says so."""
    store = prepared(keys["ours.pem"])
    save(store, keys["ours.pem"], step=2, x=2.0)
    damaged = store.list("signatures")[1].key
    store.replace(damaged, store.read(damaged)[:-9])
    live = restored(store, "latest", trusted=keys["ours.pub"])
    assert live["model"]["w"].tolist() == [1.0] * 4  # type: ignore[index]


# ---- policy ---------------------------------------------------------------------------------------------------------


def trust_file(path: Path, *entries: str) -> Path:
    path.write_text("\n".join("[[keys]]\n" + e for e in entries))
    return path


def test_a_trust_file_says_who_may_sign_which_run(keys: dict[str, Path], tmp_path: Path) -> None:
    save(LocalStore(tmp_path / "prod/a"), keys["ours.pem"])
    save(LocalStore(tmp_path / "lab/a"), keys["ours.pem"])
    entry = f'name = "trainer"\npublic = "ours.pub"\nruns = ["{tmp_path}/prod/**"]\n'
    trust = trust_file(tmp_path / "trust.toml", entry)
    assert holdfast.open(tmp_path / "prod/a", trusted=trust).step == 1
    with pytest.raises(Untrusted, match="trainer is not trusted with this run"):
        holdfast.open(tmp_path / "lab/a", trusted=trust)
    run = Run(tmp_path / "lab/a").id
    trust_file(trust, entry, f'name = "by id"\npublic = "ours.pub"\nruns = ["{run}"]\n')
    assert holdfast.open(tmp_path / "lab/a", trusted=trust).step == 1


def test_trust_expires(keys: dict[str, Path], tmp_path: Path) -> None:
    store, clock = prepared(keys["ours.pem"]), MockClock()
    until = datetime.datetime.fromtimestamp(clock.now() + 86400, datetime.UTC)
    trust = trust_file(
        tmp_path / "trust.toml",
        f'name = "t"\npublic = "ours.pub"\nruns = ["**"]\nuntil = {until.isoformat()}',
    )
    assert Run(store, trusted=trust, time=clock).latest
    clock.sleep(86399.0)
    assert Run(store, trusted=trust, time=clock).latest
    clock.sleep(1.0)
    with pytest.raises(Untrusted, match="trust in t has expired"):
        _ = Run(store, trusted=trust, time=clock).latest


BAD_TRUST = {
    "no TOML": "keys = [", "no keys": "", "an unknown member": '[[keys]]\nname="a"\npublic="x"\nruns=["*"]\nmay="all"',
    "no runs": '[[keys]]\nname="a"\npublic="ours.pub"', "runs that are none": '[[keys]]\nname="a"\npublic="ours.pub"\nruns="*"',
    "no name": '[[keys]]\npublic="ours.pub"\nruns=["*"]', "no public key": '[[keys]]\nname="a"\npublic="ours.pem"\nruns=["*"]',
    "a date that is none": '[[keys]]\nname="a"\npublic="ours.pub"\nruns=["*"]\nuntil="soon"', "nesting": "a=" + "[" * 100_000,
    "twice": 'a=1\na=2', "no text": "\udcff",
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TRUST)
def test_a_trust_file_that_makes_no_sense_is_refused(
    what: str, keys: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "t.toml").write_bytes(BAD_TRUST[what].encode("utf-8", "surrogateescape"))
    with pytest.raises(PolicyError) as raised:
        make_trust(None, tmp_path / "t.toml")
    assert "PRIVATE" not in str(raised.value)


def test_an_endless_trust_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "t.toml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PolicyError, match="more than"):
        make_trust(None, tmp_path / "t.toml")


@pytest.mark.parametrize("verify", ["require", "warn"])
def test_verifying_without_anyone_to_trust_is_refused(verify: str) -> None:
    with pytest.raises(PolicyError, match="nobody is trusted"):
        make_trust(verify, None)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="nobody is trusted"):
        make_trust(verify, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", ["Require", "", "on", True, 0])
def test_a_mode_that_is_none_is_refused(verify: object) -> None:
    with pytest.raises(PolicyError, match="verify="):
        make_trust(verify, None)  # type: ignore[arg-type]


def test_an_empty_list_of_trusted_keys_trusts_nobody_and_says_so() -> None:
    with pytest.raises(PolicyError, match="nobody is trusted"):
        make_trust(None, [])


def test_a_key_is_given_as_text_too(keys: dict[str, Path]) -> None:
    public = read_signing_key(keys["ours.pem"]).public
    for text in (public.text(), public.pem()):
        assert holdfast.open(prepared(keys["ours.pem"]), trusted=text).step == 1
        with pytest.raises(Untrusted):
            holdfast.open(prepared(keys["strange.pem"]), trusted=[text])


def test_of_several_trusted_keys_one_is_enough(keys: dict[str, Path]) -> None:
    assert (
        holdfast.open(prepared(keys["ours.pem"]), trusted=[keys["strange.pub"], keys["ours.pub"]]).step == 1
    )


# ---- a run that signs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["process", "thread", "inline"])
@pytest.mark.parametrize("source", ["file", "variable"])
def test_a_training_run_signs_every_commit(
    writer: str, source: str, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_KEY", keys["ours.pem"].read_text())
    sign = keys["ours.pem"] if source == "file" else "env:OUR_KEY"
    live = {"w": np.zeros(8)}
    with Checkpointer(
        tmp_path / "run", live, save=holdfast.every(steps=2), sign=sign, verify="require", writer=writer
    ) as ckpt:  # type: ignore[arg-type]
        for _ in ckpt.steps(6):
            live["w"] += 1
    run = Run(tmp_path / "run", trusted=keys["ours.pub"])
    assert [c.step for c in run] == [2, 4, 6]
    with Checkpointer(tmp_path / "run", live, sign=sign, verify="require") as ckpt:
        assert list(ckpt.steps(8)) == [6, 7]
    assert [c.step for c in Run(tmp_path / "run", trusted=keys["ours.pub"])] == [2, 4, 6, 8]


def test_a_demoted_checkpoint_is_signed_anew(keys: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    store, model = MemoryStore("demoted"), torch.nn.Linear(2, 2)
    live = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    keep = last(1) | demote(last(2))
    with Checkpointer(
        store, live, save=holdfast.every(steps=1), keep=keep, sign=keys["ours.pem"], writer="inline"
    ) as ckpt:
        list(ckpt.steps(3))
    run = Run(store, trusted=keys["ours.pub"])
    assert [(c.step, c.manifest.demoted) for c in run] == [(2, True), (3, False)]
    assert len(store.list("signatures")) == 2


def test_what_others_signed_is_not_made_ours_by_demoting_it(
    keys: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    store, model = MemoryStore("demoted"), torch.nn.Linear(2, 2)
    live = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    for step, key in ((1, None), (2, keys["strange.pem"])):
        holdfast.save(store, live, step=step, sign=key)
    with Checkpointer(
        store,
        live,
        save=holdfast.every(steps=1),
        keep=last(1) | demote(last(3)),
        sign=keys["ours.pem"],
        writer="inline",
    ) as ckpt:
        list(ckpt.steps(3))
    with pytest.raises(Untrusted):
        Run(store, trusted=keys["ours.pub"])[1]
    assert Run(store, trusted=keys["strange.pub"])[2].manifest.demoted is False
    assert "is not demoted" in caplog.text


def test_without_a_key_a_signed_checkpoint_is_not_demoted(
    keys: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    store, model = MemoryStore("demoted"), torch.nn.Linear(2, 2)
    live = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    for step in (1, 2):
        holdfast.save(store, live, step=step, sign=keys["ours.pem"])
    Run(store).prune(last(1) | demote(last(2)))
    assert "is not demoted" in caplog.text
    assert [c.manifest.demoted for c in Run(store, trusted=keys["ours.pub"])] == [False, False]


def test_signatures_leave_with_their_checkpoints(keys: dict[str, Path]) -> None:
    store = MemoryStore("leaving")
    for step in (1, 2, 3):
        save(store, keys["ours.pem"], step)
    Run(store).remove([1], grace=0)
    assert [o.key[11:23] for o in store.list("signatures")] == [f"{s:012d}" for s in (2, 3)]


def test_signatures_of_what_never_committed_are_freed(keys: dict[str, Path]) -> None:
    store = MemoryStore("orphans")
    save(store, keys["ours.pem"], 1)
    raw = store.read(only_signature(store))
    store.create("signatures/000000000009-dead.json", raw)
    save(store, keys["ours.pem"], 2)  # takes the run up
    assert [o.key[11:23] for o in store.list("signatures")] == [f"{s:012d}" for s in (1, 2)]


def test_a_signature_whose_commit_may_be_under_way_stays(keys: dict[str, Path]) -> None:
    """It comes before its manifest: one that is younger than the margin is nobody's orphan yet."""
    store = MemoryStore("under way")
    save(store, keys["ours.pem"], 1)
    store.create("signatures/000000000009-aa.json", store.read(only_signature(store)))
    now = max(o.modified for o in store.list(""))
    collect(store, ages=Ages(now=now + 50.0, attempt_seconds=100.0))
    assert len(store.list("signatures")) == 2
    collect(store, ages=Ages(now=now + 150.0, attempt_seconds=100.0))
    assert len(store.list("signatures")) == 1
    assert Run(store, trusted=keys["ours.pub"])[1]


def test_what_is_set_aside_keeps_its_signature(keys: dict[str, Path]) -> None:
    store = MemoryStore("aside")
    for step in (1, 2):
        save(store, keys["ours.pem"], step)
    live = {"model": {"w": np.zeros(4)}, "n": {"seen": 0}}
    with Checkpointer(store, live, sign=keys["ours.pem"]) as ckpt:
        ckpt.restore(1)
        list(ckpt.steps(2))
    assert len(store.list("trash")) == 1
    assert len(store.list("signatures")) == 3


class Failing(MemoryStore):
    """Fails at the n-th call that changes something."""

    def __init__(self) -> None:
        super().__init__("failing")
        self.left = -1
        self.before_commit: list[str] = []

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoreError("planted")

    def create(self, key: str, data: object) -> None:
        self._count()
        if key.startswith("checkpoints/"):
            self.before_commit = [o.key for o in self.list("signatures")]
        super().create(key, data)  # type: ignore[arg-type]


def test_a_checkpoint_never_exists_without_its_signature(keys: dict[str, Path]) -> None:
    """Fail at each write in turn: whatever is listed then is signed, and the next save works."""
    for n in itertools.count(1):
        store = Failing()
        save(store, keys["ours.pem"], 1)
        store.left = n
        try:
            save(store, keys["ours.pem"], 2)
            failed = False
        except HoldfastError:
            failed = True
        store.left = -1
        assert [c.step for c in Run(store, trusted=keys["ours.pub"])] in ([1], [1, 2])
        save(store, keys["ours.pem"], 3)
        assert store.before_commit[-1].startswith("signatures/000000000003-")
        assert [c.step for c in Run(store, trusted=keys["ours.pub"])][-1] == 3
        if not failed:
            break
    assert n > 3


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_key_survives_its_file(algorithm: str, passphrase: str | None, tmp_path: Path) -> None:
    key = SigningKey.generate(algorithm)  # type: ignore[arg-type]
    before = os.umask(0)
    try:
        public = write_key_pair(tmp_path / "k.pem", key, passphrase)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    again = read_signing_key(tmp_path / "k.pem", lambda name: str(passphrase))
    assert again.public.id == key.public.id == public_key_of(Path(public).read_text(), "k").id
    assert key.public.has_signed(b"x", again.sign(b"x"))
    assert not key.public.has_signed(b"y", again.sign(b"x"))
    assert SigningKey.of_der(key.der()).public.id == key.public.id


@pytest.mark.parametrize("present", ["k.pem", "k.pub"])
def test_a_key_is_never_overwritten(present: str, tmp_path: Path) -> None:
    (tmp_path / present).symlink_to(tmp_path / "nowhere")
    with pytest.raises(PolicyError, match="exists already"):
        write_key_pair(tmp_path / "k.pem", SigningKey.generate())
    assert sorted(p.name for p in tmp_path.iterdir()) == [present]


def test_a_wrong_passphrase_is_refused_and_not_told(tmp_path: Path) -> None:
    write_key_pair(tmp_path / "k.pem", SigningKey.generate(), "correct horse")
    for ask in (lambda name: "battery staple", None):
        with pytest.raises(PolicyError) as raised:
            read_signing_key(tmp_path / "k.pem", ask)
        shown = "".join(__import__("traceback").format_exception(raised.value))
        assert "battery staple" not in str(raised.value)
        assert "BEGIN" not in shown


def test_the_passphrase_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key_pair(tmp_path / "k.pem", key := SigningKey.generate(), "correct horse")
    write_key_pair(tmp_path / "plain.pem", SigningKey.generate())
    monkeypatch.setenv("HOLDFAST_SIGNING_PASSPHRASE", "correct horse")
    assert read_signing_key(tmp_path / "k.pem").public.id == key.public.id
    assert read_signing_key(tmp_path / "plain.pem")


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP384R1())
    raw = other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    (tmp_path / "k.pem").write_bytes(raw)
    with pytest.raises(PolicyError, match="another kind"):
        read_signing_key(tmp_path / "k.pem")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "k.pem").write_bytes(content)
    with pytest.raises(PolicyError, match="no private key"):
        read_signing_key(tmp_path / "k.pem")
    with pytest.raises(HoldfastError):
        make_trust(None, tmp_path / "k.pem")


def test_a_missing_key_is_refused_before_the_run_is_taken(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        Checkpointer(tmp_path / "run", {"x": [1]}, sign=tmp_path / "none.pem")
    with pytest.raises(PolicyError, match="not set"):
        Checkpointer(tmp_path / "run", {"x": [1]}, sign="env:NO_SUCH_KEY")
    assert not (tmp_path / "run").exists()


def test_a_key_that_others_may_read_is_warned_of(
    keys: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    keys["ours.pem"].chmod(0o640)
    read_signing_key(keys["ours.pem"])
    assert "chmod 600" in caplog.text


def test_a_key_shows_nothing_of_itself(keys: dict[str, Path]) -> None:
    key = read_signing_key(keys["ours.pem"])
    assert repr(key) == f"<SigningKey ed25519 {key.public.id}>"
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_an_attempt_to_sign_without_the_library_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import holdfast\n"
        f"holdfast.save({str(tmp_path / 'run')!r}, {{'x': [1]}})\n"
        f"holdfast.load({str(tmp_path / 'run')!r})\n"
        "try: holdfast.save('memory://x', {'x': [1]}, sign=sys.argv[1])\n"
        "except ImportError as e: print(type(e).__name__, e)\n"
    )
    (tmp_path / "k.pem").write_text("anything")
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "k.pem")], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith(MissingDependency.__name__)
    assert "pip install 'holdfast[sign]'" in out.stdout


# ---- the document ---------------------------------------------------------------------------------------------------


def test_a_hostile_document_of_signatures_is_refused(keys: dict[str, Path]) -> None:
    store = prepared(keys["ours.pem"])
    name = only_signature(store)
    body = unseal(store.read(name), name)
    one = msgspec.json.encode(msgspec.json.decode(body)["signatures"][0])
    attacks = {
        "twice": body.replace(b'"step":1', b'"step":2,"step":1'),
        "two lists": body.replace(b'"signatures":', b'"signatures":[],"signatures":'),
        "space": body.replace(b'"step":1', b'"step": 1'),
        "unknown": body[:-1] + b',"more":1}',
        "nesting": b'{"format":1,"signatures":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "too many": b'{"format":1,"signatures":[' + b",".join([one] * 65) + b"]}",
        "huge": body.replace(b'"step":1', b'"step":' + b"9" * 5000),
        "negative": body.replace(b'"step":1', b'"step":-1'),
        "long": body.replace(b'"run":"', b'"run":"' + b"x" * 200),
        "no text": body.replace(b'"run":"', b'"run":"\xff'),
        "large": body[:-1] + b',"pad":"' + b"x" * (1 << 18) + b'"}',
    }
    for what, changed in attacks.items():
        assert changed != body, what
        with pytest.raises(InvalidFormat):
            decode_signatures(seal(changed), what)
        store.replace(name, seal(changed))
        with pytest.raises((IntegrityError, Untrusted)):
            holdfast.open(store, 1, trusted=keys["ours.pub"])


def test_an_endless_document_of_signatures_is_not_read(keys: dict[str, Path], tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    save(store, keys["ours.pem"])
    with open(store.path(only_signature(store)), "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidFormat, match="no document of a run has"):
        read_signatures(store, 1, Run(store)[1].manifest.attempt)
