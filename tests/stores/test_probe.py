"""A server that does not keep its word on `create` is refused before anything is written, unless the user vouches."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

import holdfast
from holdfast.core.buffers import Buffer
from holdfast.core.errors import StoreError
from holdfast.replication.copying import copy_beside
from holdfast.stores import MemoryStore, Prefixed, Throttled, open_store, prove_create, services
from servers.flaky import flaky_proxy
from servers.moto import S3Server


class Liar(MemoryStore):
    """Says that it created, and has overwritten."""

    def __init__(self, *, single_writer: bool = False) -> None:
        super().__init__(f"liar-{uuid.uuid4().hex}")
        self.single_writer = single_writer

    def create(self, key: str, data: Buffer) -> None:
        self.replace(key, data)


STATE = {"weights": {"w": np.arange(6.0)}}


def test_a_store_that_silently_overwrites_is_refused_by_name() -> None:
    store = Liar()
    with pytest.raises(StoreError, match=r"silently overwrote.*single_writer=1") as raised:
        holdfast.save(store, STATE)
    assert store.url in str(raised.value)
    assert store.list("") == []


def test_a_server_that_knows_no_condition_is_refused_unless_the_user_vouches(
    s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "RETRY_SECONDS", 0.2)
    with flaky_proxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.plan("PUT", "/probe/", "501 before", times=100)
        with pytest.raises(StoreError, match=r"501.*does not know conditional puts.*single_writer=1"):
            holdfast.save(s3_url, STATE)
        proxy.plan("PUT", "/run.json", "501 before", times=1)
        assert "vouched" in holdfast.save(f"{s3_url}?single_writer=1", STATE).environment["single_writer"]


def test_a_bucket_that_is_not_there_is_not_called_a_liar(s3: S3Server) -> None:
    with pytest.raises(StoreError, match="create the bucket") as raised:
        holdfast.save("s3://no-such-bucket-here/run", STATE)
    assert "single_writer" not in str(raised.value)


@pytest.mark.parametrize("wrap", [lambda s: Prefixed(s, "run"), lambda s: Throttled(Throttled(s, 1e9), 1e9)])
def test_a_wrapper_hides_no_liar(wrap) -> None:
    with pytest.raises(StoreError, match="silently overwrote"):
        prove_create(wrap(Liar()))


def test_who_vouches_may_write_and_every_commit_says_so() -> None:
    store = Liar(single_writer=True)
    saved = holdfast.save(store, STATE)
    assert "vouched" in saved.environment["single_writer"]
    assert np.array_equal(holdfast.load(store)["weights"]["w"], STATE["weights"]["w"])  # type: ignore[index]


def test_a_server_that_keeps_its_word_is_asked_once_and_nothing_stays(s3: S3Server, s3_url: str) -> None:
    for _ in range(2):
        assert prove_create(open_store(s3_url)) == ""
    asked = [r for r in s3.requests() if "/probe/" in r and s3_url.split("/")[2] in r]
    assert sum(r.startswith("PUT") for r in asked) == 2
    assert open_store(s3_url).list("") == []


def test_readers_ask_nothing() -> None:
    store = Liar(single_writer=True)
    holdfast.save(store, STATE)
    store.single_writer = False
    assert holdfast.open(store).step == 0
    assert holdfast.Run(store).steps == [0]


def test_single_writer_on_a_server_never_overwrites_what_it_sees(s3_url: str) -> None:
    store = open_store(f"{s3_url}?single_writer=1")
    store.create("k", b"first")
    with pytest.raises(FileExistsError):
        store.create("k", b"second")
    assert "vouched" in holdfast.save(store, STATE).environment["single_writer"]
    assert "single_writer" not in holdfast.save(s3_url, STATE, step=1).environment


def test_a_copy_is_not_written_to_a_liar_either() -> None:
    source, liar = MemoryStore(f"honest-{uuid.uuid4().hex}"), Liar()
    holdfast.save(source, STATE)
    with pytest.raises(StoreError, match="silently overwrote"):
        copy_beside(source, liar)
    assert liar.list("") == []
