"""A proxy in front of an HTTP server, on loopback, that does to requests what a plan of faults says.

Each request goes through the plan as a call with the name of its method ("put", "post", "get", "head", "delete"; "part"
for a part of a multipart upload, "begin" and "complete" for its ends) and its path as the key. A fault "before" drops
the request, "after" lets it be carried out and drops the answer; an answer of an object store ("409", "503", ...) is
given instead, or after it was carried out.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from holdfast.testing import Fault, FaultPlan
from holdfast.testing.plan import ANSWERS

HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}
CODES = {"409": "ConditionalRequestConflict", "412": "PreconditionFailed", "429": "TooManyRequests"}


class Dropped(Exception):
    """The client hears nothing."""


class Answered(Exception):
    """The client hears this instead."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


def _error(fault: Fault, key: str) -> Exception:
    return Answered(fault) if fault.kind in ANSWERS or fault.kind == "EIO" else Dropped()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        found: list[tuple[int, list[tuple[str, str]], bytes]] = []

        def act() -> None:
            found[:] = [self.server.forward(self.command, self.path, dict(self.headers), body)]
            if self.server.twice:
                found[:] = [self.server.forward(self.command, self.path, dict(self.headers), body)]

        name, changes = self._name()
        try:
            self.server.plan.around(name, urlsplit(self.path).path, act, _error, changes=changes)
        except Dropped:
            self.close_connection = True
            return
        except Answered as e:
            self._answer_fault(e.fault)
            return
        except OSError:  # the client has gone
            self.close_connection = True
            return
        self._answer(*found[0])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def _name(self) -> tuple[str, bool]:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "partNumber" in query:
            return "part", True
        if self.command == "POST" and "uploads" in query:
            return "begin", True
        if self.command == "POST" and "uploadId" in query:
            return "complete", True
        return self.command.lower(), self.command in ("PUT", "POST", "DELETE")

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP or (self.command == "HEAD" and name.lower() == "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_fault(self, fault: Fault) -> None:
        """Give an error; of kind "EIO" in the body of a 200, as S3 may when it completes an upload."""
        status = int(fault.kind) if fault.kind in ANSWERS else 200
        code = CODES.get(fault.kind, "InternalError" if status in (200, 500) else "SlowDown")
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>planned</Message></Error>'.encode()
        self._answer(status, [("Content-Type", "application/xml")], body)

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.plan = FaultPlan()
        self.twice = False  # each request is sent on twice, as a network may

    def handle_error(self, request: object, client_address: object) -> None:
        """Be quiet: a client that goes is what this is for."""

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


@contextmanager
def proxied(target: str) -> Iterator[_Proxy]:
    """Run a proxy in front of a server, at `url`."""
    proxy = _Proxy(target)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
