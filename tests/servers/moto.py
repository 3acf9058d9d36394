"""An S3 server: moto's, a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from servers.processes import free_port, running

SECRET = "moto-secret-that-must-not-show"


@dataclass(frozen=True)
class S3Server:
    port: int
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str) -> bytes:
        """Return what the server answers to an unsigned request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def make_bucket(self, name: str) -> None:
        self.call("PUT", f"/{name}")

    def requests(self) -> list[str]:
        """Return the requests so far, as "GET /bucket/key" lines of the server's log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [
            line.split('"')[1].rpartition(" ")[0] for line in lines if '" ' in line and "HTTP/1.1" in line
        ]


@contextlib.contextmanager
def serving_s3(folder: Path) -> Iterator[S3Server]:
    port = free_port()
    log = folder / "moto.log"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port, log, {"PYTHONUNBUFFERED": "1"}):
        env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "moto-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
        yield S3Server(port, log, env)
