"""A server that does not keep its word on `create` is refused before anything is written, unless the user vouches."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

import holdfast
from holdfast.core.buffers import Buffer
from holdfast.core.errors import StoreError
from holdfast.stores import MemoryStore, Prefixed, Throttled, open_store, prove_create
from servers.moto import S3Server


class Liar(MemoryStore):
    """Says that it created, and has overwritten."""

    def __init__(self, *, single_writer: bool = False) -> None:
        super().__init__(f"liar-{uuid.uuid4().hex}")
        self.single_writer = single_writer

    def create(self, key: str, data: Buffer) -> None:
        self.replace(key, data)


class Refuser(Liar):
    """Does not know the condition at all."""

    def create(self, key: str, data: Buffer) -> None:
        raise StoreError("status 501, NotImplemented")


STATE = {"weights": {"w": np.arange(6.0)}}


def test_a_store_that_silently_overwrites_is_refused_by_name() -> None:
    store = Liar()
    with pytest.raises(StoreError, match=r"silently overwrote.*single_writer=1") as raised:
        holdfast.save(store, STATE)
    assert store.url in str(raised.value)
    assert store.list("") == []


def test_a_store_that_knows_no_condition_is_refused() -> None:
    with pytest.raises(StoreError, match=r"NotImplemented.*single_writer=1"):
        holdfast.save(Refuser(), STATE)


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
