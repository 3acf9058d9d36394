"""What is particular to object stores: parts, marks, addresses, secrets, sweeping, and servers that misbehave."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, PermissionDenied, StoreError
from holdfast.stores import Store, Stream, is_reopenable, open_store, services, uploads
from holdfast.stores.object import PART_BYTES, WHOLE_BYTES
from servers.flaky import Fault, Flaky, flaky_proxy
from servers.gcs import serving_gcs
from servers.moto import SECRET, S3Server

LARGE = os.urandom(1 << 20) * 21


@pytest.fixture
def store(s3_url: str) -> Store:
    return open_store(s3_url)


def bucket_of(url: str) -> str:
    return url.removeprefix("s3://").partition("/")[0]


def unfinished(s3: S3Server, url: str) -> int:
    return s3.call("GET", f"/{bucket_of(url)}?uploads").count(b"<UploadId>")


# ---- large objects ---------------------------------------------------------------------------------------------------


def test_a_large_object_goes_up_in_parts_and_comes_back_in_ranges(store: Store, s3: S3Server) -> None:
    view = memoryview(LARGE)
    before = len(s3.requests())
    store.write("d/k", [view[:100], view[100 : 5 << 20], view[5 << 20 :]])
    sent = [r for r in s3.requests()[before:] if "partNumber" in r]
    assert len(sent) == -(-len(LARGE) // PART_BYTES)
    target = bytearray(len(LARGE) - 7)
    store.read_into("d/k", 7, memoryview(target))
    assert target == LARGE[7:]
    assert store.read("d/k", 0, len(LARGE)) == store.read("d/k") == LARGE


@pytest.mark.parametrize(
    "size", [WHOLE_BYTES - 1, WHOLE_BYTES, WHOLE_BYTES + 1, 2 * PART_BYTES, 2 * PART_BYTES + 1]
)
@pytest.mark.parametrize("head", [0, 4096])
def test_sizes_around_the_bounds_of_parts(store: Store, size: int, head: int) -> None:
    data = LARGE[:size]
    body = (data[at : at + 1_000_003] for at in range(head, size, 1_000_003))
    store.write_streams([Stream("d/k", head, body, lambda: data[:head])])
    assert store.info("d/k").size == size
    assert store.read("d/k") == data


def test_a_failed_upload_leaves_no_parts_and_takes_back_what_went_up_before(
    store: Store, s3: S3Server, s3_url: str
) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(20):
            yield LARGE[: 1 << 20]
        raise FileNotFoundError("of the body, not of the store")

    streams = [Stream("d/first", 0, [LARGE], bytes), Stream("d/second", 0, body(), bytes)]
    with pytest.raises(FileNotFoundError, match="of the body") as raised:
        store.write_streams(streams)
    assert not isinstance(raised.value, NotFound)
    assert store.list("") == []
    assert unfinished(s3, s3_url) == 0


def test_a_large_object_never_goes_over_another(store: Store) -> None:
    store.create("d/k", b"small and first")
    with pytest.raises(AlreadyExists):
        store.write("d/k", [LARGE])
    assert store.read("d/k") == b"small and first"


# ---- uploads that dead writers left ----------------------------------------------------------------------------------


def test_sweeping_aborts_uploads_that_were_never_ended(store: Store, s3: S3Server, s3_url: str) -> None:
    bucket = bucket_of(s3_url)
    for key in ("runs/digits/data/1/a%2Bb", "runs/digits/data/2/k", "runs/other/k"):
        s3.call("POST", f"/{bucket}/{key}?uploads")
    store.sweep(before=0.0)  # all of them are younger
    assert unfinished(s3, s3_url) == 3
    store.sweep(before=time.time())
    assert unfinished(s3, s3_url) == 1
    assert b"runs/other/k" in s3.call("GET", f"/{bucket}?uploads")


def test_an_upload_that_another_sweeper_aborts_first_is_no_failure(
    store: Store, s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("runs/digits/data/1/k", "runs/digits/data/2/k"):
        s3.call("POST", f"/{bucket_of(s3_url)}/{key}?uploads")
    listed = uploads._uploads
    monkeypatch.setattr(uploads, "_uploads", lambda *where: [u for u in listed(*where) for _ in range(2)])
    with caplog.at_level(logging.INFO, "holdfast"):
        store.sweep(before=time.time())
    assert unfinished(s3, s3_url) == 0
    assert "could not" not in caplog.text


def test_what_cannot_be_swept_is_said_and_is_no_failure(
    s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    gone = open_store(s3_url.replace(bucket_of(s3_url), "no-such-bucket-here"))
    with caplog.at_level(logging.INFO, "holdfast"), pytest.raises(StoreError, match="create the bucket"):
        gone.sweep(time.time())


# ---- addresses and secrets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/run",
        "s3://hunter2@bucket/run",
        "s3://bucket/run?X-Amz-Signature=hunter2",
        "s3://bucket/run?sig=hunter2&single_writer=1",
        "s3://bucket/run?endpoint=http://user:hunter2@host",
        "s3://bucket/run?endpoint=ftp://hunter2",
        "s3://bucket/run?single_writer=hunter2",
        "s3://bucket/run#hunter2",
        "az://bucket/run?profile=hunter2",
        "https://user:hunter2@host/run",
        "abfs://c:hunter2@acc.dfs.core.windows.net/run",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError) as raised:
        open_store(url)
    assert "hunter2" not in str(raised.value) + repr(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///run",
        "s3://b/a//b",
        "s3://b/../x",
        "s3://b:80/x",
        "s3://b/a%00b",
        "abfs://c@a.dfs.core.chinacloudapi.cn/x",
    ],
)
def test_a_url_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3a://bucket/a/run/", "s3://bucket/a/run"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/run?single_writer=true", "s3://bucket/run?single_writer=1"),
        ("s3://bucket/run?single_writer=0", "s3://bucket/run"),
        ("s3://b/run?endpoint=http://127.0.0.1:9", "s3://b/run?endpoint=http://127.0.0.1:9"),
        ("gcs://bucket/run", "gs://bucket/run"),
        ("abfss://cont@acc.dfs.core.windows.net/run", "abfs://cont@acc.dfs.core.windows.net/run"),
        ("s3://bucket/my runs/größe", "s3://bucket/my runs/größe"),
        ("s3://bucket/100%25/a%2541", "s3://bucket/100%25/a%2541"),
        ("s3://bucket/what%3F/%23 1", "s3://bucket/what%3F/%23 1"),
    ],
)
def test_a_store_says_its_url_in_one_way_and_opens_by_it(given: str, kept: str) -> None:
    store = open_store(given)
    assert store.url == kept
    assert open_store(store.url).url == kept
    assert is_reopenable(store)


def test_no_message_holds_a_secret(s3_url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_url)
    failures: list[BaseException] = []
    for act in (lambda: store.read("absent"), lambda: open_store("s3://no-such-bucket-here/x").list("")):
        with pytest.raises(StoreError) as raised:
            act()
        failures.append(raised.value)
    shown = "".join(f"{e} {e!r} {e.__cause__!r} {e.args}" for e in failures) + repr(store) + repr(vars(store))
    assert SECRET not in shown
    assert "Signature" not in shown


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_no_missing_object(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket-here/run")
    with pytest.raises(StoreError, match=r"NoSuchBucket.*create the bucket") as raised:
        store.read("run.json")
    assert not isinstance(raised.value, NotFound)


def test_an_endpoint_without_tls_on_another_machine_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    with pytest.raises(StoreError, match="AWS_ALLOW_HTTP"):
        open_store("s3://b/run?endpoint=http://192.0.2.1:9").read("k")


def test_a_forked_child_is_told_rather_than_left_waiting(store: Store) -> None:
    store.list("")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.list("")
        except StoreError as e:
            os.write(write, str(e).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        if not select.select([told], [], [], 20)[0]:
            os.kill(child, signal.SIGKILL)
        assert b"forked" in told.read()
    os.waitpid(child, 0)


def test_a_profile_of_the_usual_files_gives_credentials_and_endpoint(
    s3: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-north-1\nendpoint_url = {s3.endpoint}\n")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = k\naws_secret_access_key = s\n")
    for name in s3.env:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = open_store(f"{s3_url}?profile=lab")
    store.create("k", b"x")
    assert store.read("k") == b"x"


# ---- answers that get lost, and servers under strain ------------------------------------------------------------------


@pytest.fixture
def flaky(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    with flaky_proxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("fault", ["lost answer", "500 after", "503 before", "429 before"])
def test_a_create_that_was_carried_out_or_sent_again_has_one_outcome(
    flaky: Flaky, s3_url: str, fault: Fault
) -> None:
    store = open_store(s3_url)
    flaky.plan("PUT", "checkpoints/1", fault)
    store.create("checkpoints/1", b"mine")
    assert flaky.done == [fault]
    assert store.read("checkpoints/1") == b"mine"
    with pytest.raises(AlreadyExists):
        store.create("checkpoints/1", b"a rival's")
    assert store.read("checkpoints/1") == b"mine"


def test_a_create_that_crossed_another_and_did_not_land_is_sent_again(flaky: Flaky, s3_url: str) -> None:
    store = open_store(s3_url)
    flaky.plan("PUT", "k", "409 before", times=2)
    store.create("k", b"mine")
    assert flaky.done == ["409 before"] * 2
    assert store.read("k") == b"mine"
    flaky.plan("PUT", "never", "409 before", times=100)
    with pytest.raises(StoreError, match="none of them lands") as raised:
        store.create("never", b"mine")
    assert not isinstance(raised.value, AlreadyExists), "there is no rival"


@pytest.mark.parametrize("fault", ["lost answer", "500 after", "503 before"])
def test_a_create_in_google_cloud_storage_has_one_outcome_too(
    monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    with serving_gcs() as bucket, flaky_proxy(bucket.port) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        store = open_store("gs://bucket/run")
        proxy.plan("PUT", "checkpoints", fault)
        store.create("checkpoints/1", b"mine")
        assert proxy.done == [fault]
        with pytest.raises(AlreadyExists):
            store.create("checkpoints/1", b"a rival's")
        assert store.read("checkpoints/1") == b"mine"


def test_a_create_that_loses_to_a_rival_while_it_is_sent_again_says_so(flaky: Flaky, s3_url: str) -> None:
    store, rival = open_store(s3_url), open_store(s3_url)
    flaky.plan(
        "PUT", "checkpoints/1", "503 before", then=lambda: rival.create("checkpoints/1", b"the rival's")
    )
    with pytest.raises(AlreadyExists):
        store.create("checkpoints/1", b"mine")
    assert store.read("checkpoints/1") == b"the rival's"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one(flaky: Flaky, s3_url: str, status: int) -> None:
    flaky.plan("GET", "/k", f"{status} before")
    with pytest.raises(PermissionDenied, match="credentials"):
        open_store(s3_url).read("k")


def test_a_server_that_lost_the_way_is_no_missing_object(flaky: Flaky, s3_url: str) -> None:
    store = open_store(s3_url)
    flaky.plan("PUT", "/k", "404 before", times=100)  # a gateway's
    for act in (store.create, store.replace):
        with pytest.raises(StoreError, match="status 404") as refused:
            act("k", b"x")
        assert not isinstance(refused.value, NotFound)


def test_a_full_server_is_out_of_space(flaky: Flaky, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "RETRY_SECONDS", 0.5)
    flaky.plan("PUT", "/k", "507 before", times=100)
    with pytest.raises(OutOfSpace, match="quota"):
        open_store(s3_url).replace("k", b"x")


@pytest.mark.parametrize("fault", ["500 before", "lost answer", "500 after"])
def test_parts_and_ranges_are_sent_again(flaky: Flaky, s3_url: str, fault: Fault) -> None:
    store = open_store(s3_url)
    flaky.plan("PUT", "partNumber=2", fault)
    store.write("d/k", [LARGE])
    flaky.plan("GET", "d/k", "500 before", times=2)
    assert store.read("d/k", 0, len(LARGE)) == LARGE
    assert flaky.done == [fault, "500 before", "500 before"]


def test_an_upload_that_the_server_refuses_is_aborted(flaky: Flaky, s3: S3Server, s3_url: str) -> None:
    flaky.plan("PUT", "partNumber=2", "403 before")
    with pytest.raises(PermissionDenied):
        open_store(s3_url).write("d/k", [LARGE])
    assert open_store(s3_url).list("") == []
    assert unfinished(s3, s3_url) == 0
