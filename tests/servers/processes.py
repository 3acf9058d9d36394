"""Servers as processes of their own on a free port of this machine, started by a test session and stopped by it."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

START_SECONDS = 60.0


# The system gives nobody a port below its own, who asks for any: what is free stays so until its server has started.
PORTS = range(10_000, 30_000)


def free_port(*, and_above: int = 0) -> int:
    """Return a port that nobody listens at, where asked for with another that lies so much above it."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as s, socket.socket() as other, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + and_above if and_above else 0))
            return port


def answers(port: int) -> bool:
    """Return whether somebody speaks HTTP at a port, whatever is said."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the context is left; it has answered when the context is entered."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}"
                    )
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
