"""What tests of any part may ask for: servers, started when the first test needs them."""

from __future__ import annotations

import gc
import signal
import uuid
from collections.abc import Iterator

import pytest

from servers.moto import S3Server, serving_s3


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server of this session (of this worker, where there are several)."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    with serving_s3(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def s3(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the environment that makes s3:// URLs mean it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    return moto


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A place in a new bucket of the S3 server, which nothing lies in."""
    bucket = f"b-{uuid.uuid4().hex}"
    s3.make_bucket(bucket)
    return f"s3://{bucket}/runs/digits"


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the run in the background has it ignored, and so would the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # jax says so at every fork of a process that has imported it; what our tests fork does not use jax.
    config.addinivalue_line("filterwarnings", r"ignore:os\.fork\(\) was called:RuntimeWarning")


def pytest_collection_finish() -> None:
    # What the collection has imported stays: who asks for a collection of garbage need not go through it each time.
    gc.collect()
    gc.freeze()
