"""`holdfast peer`: give this machine's memory to the runs of others."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Literal

import typer

from holdfast.cli.options import Json
from holdfast.cli.output import emit, line
from holdfast.core.errors import PolicyError
from holdfast.core.units import format_bytes, parse_bytes
from holdfast.stores.peers.address import parse_bind
from holdfast.stores.peers.secret import FILE_VARIABLE, VARIABLE, write_secret
from holdfast.stores.peers.service import PeerService

__all__ = ["peer"]


def peer(
    action: Annotated[
        Literal["serve", "secret"],
        typer.Argument(help="serve, or make a secret for all peers to share.", show_default=False),
    ],
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Of secret: the new file.", show_default=False)
    ] = None,
    bind: Annotated[
        str,
        typer.Option("--bind", metavar="HOST[:PORT]", help="Where to listen; port 0 is any free one."),
    ] = "127.0.0.1:7070",
    memory: Annotated[
        str,
        typer.Option("--memory", metavar="SIZE", help="Hold at most this much, such as 64GB."),
    ] = "4GB",
    json: Json = False,
) -> None:
    """Hold the newest checkpoints of other machines in this one's memory, as peer://HOST:PORT/NAME.

    Runs until SIGTERM or Ctrl-C, and then forgets them. Who connects must know the secret in HOLDFAST_PEER_SECRET, or
    in the file that HOLDFAST_PEER_SECRET_FILE names. It authenticates and does not encrypt.
    """
    if action == "secret":
        _make_secret(file, json=json)
        return
    if file is not None:
        raise PolicyError("holdfast peer serve takes no file; the secret comes from the environment")
    _serve(bind, parse_bytes(memory), json=json)


def _make_secret(file: str | None, *, json: bool) -> None:
    if file is None:
        raise PolicyError("say where to: holdfast peer secret FILE")
    write_secret(Path(file))
    if json:
        emit({"secret": file})
        return
    line((file, "bold"), f"  a new secret; copy it to every machine and set {FILE_VARIABLE} to where it lies")
    line(f"or set {VARIABLE} to what is in it")


def _serve(bind: str, memory_bytes: int, *, json: bool) -> None:
    told = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        host, port = parse_bind(bind)
        with PeerService(host, port, memory_bytes) as service:
            if json:
                emit({"url": service.url, "memory_bytes": memory_bytes})
            else:
                line("serving ", (service.url, "bold"), f"  {format_bytes(memory_bytes)} of memory")
            while not told.wait(1.0):  # a wait without an end would not let a signal through everywhere
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
