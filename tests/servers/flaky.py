"""A proxy before a real server that loses answers, makes up errors, and counts, as it is told."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = str  # "lost answer", "<status> before" the request is carried out, "<status> after"
_HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server"}


@dataclass
class _Planned:
    method: str
    part: str
    fault: Fault
    times: int
    then: Callable[[], object]


@dataclass
class Flaky:
    """What a proxy is to do, what it did, and every request that it saw."""

    port: int
    done: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    chance: Callable[[], Fault | None] = lambda: None
    _plans: list[_Planned] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def plan(
        self, method: str, part: str, fault: Fault, times: int = 1, then: Callable[[], object] = lambda: None
    ) -> None:
        """Let the next requests of this method, with `part` in their address, meet a fault."""
        self._plans.append(_Planned(method, part, fault, times, then))

    def fault_for(self, method: str, path: str) -> _Planned | None:
        with self._lock:
            self.seen.append(f"{method} {path}")
            for plan in self._plans:
                if plan.times and plan.method == method and plan.part in path:
                    plan.times -= 1
                    self.done.append(plan.fault)
                    return plan
            fault = self.chance()
            if fault is not None:
                self.done.append(fault)
                return _Planned(method, path, fault, 0, lambda: None)
        return None


@contextlib.contextmanager
def flaky_proxy(upstream: int) -> Iterator[Flaky]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            plan = flaky.fault_for(self.command, self.path)
            if plan is not None and plan.fault.endswith("before"):
                plan.then()
                return self.say(int(plan.fault.split()[0]), [], b"<Error><Code>Made</Code></Error>")
            connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            with contextlib.closing(connection):  # also when its client goes, or the server does
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
            if plan is None:
                return self.say(answer.status, answer.getheaders(), data)
            plan.then()
            if plan.fault == "lost answer":
                self.close_connection = True
                self.connection.close()
                return None
            return self.say(int(plan.fault.split()[0]), [], b"<Error><Code>Made</Code></Error>")

        def say(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _HOP and (name.lower() != "content-length" or self.command == "HEAD"):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            pass

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # we hung up ourselves
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    flaky = Flaky(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield flaky
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
