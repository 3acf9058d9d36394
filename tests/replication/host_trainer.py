"""A trainer on a simulated host. Usage: host_trainer.py SEED RUN TOTAL HOLD_AT SHARED PEER...

RUN is on the host's own disk, or a ring of the hosts; each PEER is a place in another host's memory, SHARED one on durable storage, which gets
what it is waited for and no more. Prints "from K" when it begins, "secured K" when the peers hold step HOLD_AT, and
"done DIGEST" at the end. HOLD_AT 0 holds nowhere: else it waits there until a line comes.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from typing import Any

import numpy as np
from blake3 import blake3

from holdfast import Checkpointer, every, last
from holdfast.core.errors import NotReplicated
from holdfast.replication import Mirror
from holdfast.stores.peers import link

ROWS = 20_000
DURABLE_AT = 4
SECONDS = 60.0
CONNECT_SECONDS = 1.5  # a kernel that is there answers at once, and a host that is lost never does
MIRROR_SECONDS = 5.0  # when one of them is lost


def say(*words: object) -> None:
    print(*words, flush=True)


def peers_hold(ckpt: Checkpointer, step: int) -> bool:
    return all(s.newest == step for s in ckpt.mirrors if s.url.startswith("peer://"))


def secure(ckpt: Checkpointer, step: int) -> None:
    """Return when every peer holds a step."""
    end = time.monotonic() + SECONDS
    while not peers_hold(ckpt, step):
        if time.monotonic() > end:
            raise SystemExit(f"the peers do not hold step {step}: {ckpt.mirrors}")
        time.sleep(0.01)


def main(seed: int, run: str, total: int, hold_at: int, shared: str, peers: list[str]) -> None:
    state = {"w": np.zeros(ROWS), "m": np.zeros(ROWS), "noise": np.random.default_rng(seed)}
    mirrors: list[str | Mirror] = [Mirror(url, keep=last(1)) for url in peers]
    mirrors.append(Mirror(shared, keep=last(1), interval="1h"))
    ack = "all" if hold_at and peers else "local"
    ckpt = Checkpointer(
        run,
        state,
        save=every(steps=1),
        keep=last(2),
        mirrors=mirrors,
        ack=ack,
        mirror_seconds=SECONDS if hold_at else MIRROR_SECONDS,
    )
    try:
        train(ckpt, state, total, hold_at)
    except (
        NotReplicated
    ) as e:  # a peer is lost: what ack="all" asks for cannot be had, and the numbers are what they are
        say("not everywhere:", e)
    say("done", blake3(state["w"].tobytes()).hexdigest())
    with contextlib.suppress(NotReplicated):
        ckpt.close()


def train(ckpt: Checkpointer, state: dict[str, Any], total: int, hold_at: int) -> None:
    first = True
    for step in ckpt.steps(total):
        if first:
            say("from", step)
            first = False
        state["m"][:] = 0.9 * state["m"] + state["noise"].standard_normal(ROWS)
        state["w"][:] -= 0.01 * state["m"]
        if step == DURABLE_AT and hold_at:
            ckpt.wait()  # what is saved by now is everywhere
        if step == hold_at and hold_at:
            if not peers:
                ckpt.wait()  # the run itself is in the memories of the hosts
            secure(ckpt, hold_at)
            say("secured", hold_at)
            sys.stdin.readline()
            ckpt._engine.replicas._seconds = MIRROR_SECONDS


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    link.CONNECT_SECONDS = SECONDS  # for the handshake
    connect = socket.create_connection
    socket.create_connection = lambda place, _: connect(place, CONNECT_SECONDS)  # type: ignore[assignment, misc]
    seed, run, total, hold_at, shared, *peers = sys.argv[1:]
    main(int(seed), run, int(total), int(hold_at), shared, peers)
