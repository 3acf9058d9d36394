"""How two sides prove to each other that they know the secret, and agree on keys for one connection.

    user     magic, 32 random bytes
    service  magic, 32 random bytes
    user     proof over both
    service  its instance, proof over both, that and the user's proof

The user proves first: a service tells strangers nothing that a guess at the secret could be checked with. The labels
differ, so that no proof can be sent back to who made it, and the random bytes are new, so that none can be used again.
"""

from __future__ import annotations

import hmac
import os
import socket
import time
from dataclasses import dataclass

from holdfast.stores.peers.secret import Secret
from holdfast.stores.peers.wire import Channel, Closed, Garbled, read_exactly

__all__ = ["INSTANCE_BYTES", "MAGIC", "Refused", "answer", "introduce"]

MAGIC = b"HFPEER1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
INSTANCE_BYTES = 16


class Refused(ConnectionError):
    """The other side does not know the secret, or does not believe that we do."""


@dataclass(frozen=True, slots=True)
class _Wire:
    sock: socket.socket
    deadline: float

    def read(self, size: int) -> bytes:
        raw = bytearray(size)
        read_exactly(self.sock, memoryview(raw), self.deadline)
        return bytes(raw)

    def write(self, raw: bytes) -> None:
        self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        self.sock.sendall(raw)

    def hear_nonce(self) -> bytes:
        if self.read(len(MAGIC)) != MAGIC:
            raise Garbled("not a peer of this protocol")
        return self.read(NONCE_BYTES)


def introduce(
    sock: socket.socket, secret: Secret, *, seconds: float, frame_seconds: float
) -> tuple[Channel, bytes]:
    """Prove ourselves to a service within `seconds`; return the channel and the instance of the service.

    Raises:
        Refused: one of the two sides does not know the secret.
        OSError: the connection failed, or the other side speaks something else.
    """
    wire = _Wire(sock, time.monotonic() + seconds)
    mine = os.urandom(NONCE_BYTES)
    wire.write(MAGIC + mine)
    nonces = mine + wire.hear_nonce()
    proof = secret.derive("user", nonces)
    wire.write(proof)
    try:
        instance, answered = wire.read(INSTANCE_BYTES), wire.read(PROOF_BYTES)
    except Closed:
        raise Refused("it hung up at the handshake: the two sides have different secrets") from None
    if not hmac.compare_digest(answered, secret.derive("service", nonces, instance, proof)):
        raise Refused("it does not know the secret")
    keys = secret.derive("from user", nonces), secret.derive("from service", nonces)
    return Channel(sock, *keys, frame_seconds), instance


def answer(
    sock: socket.socket, secret: Secret, instance: bytes, *, seconds: float, frame_seconds: float
) -> Channel:
    """Have a user prove itself within `seconds`, and prove ourselves; return the channel.

    Raises:
        Refused: the user does not know the secret.
        OSError: the connection failed, or the other side speaks something else.
    """
    wire = _Wire(sock, time.monotonic() + seconds)
    theirs = wire.hear_nonce()
    mine = os.urandom(NONCE_BYTES)
    wire.write(MAGIC + mine)
    nonces = theirs + mine
    proof = wire.read(PROOF_BYTES)
    if not hmac.compare_digest(proof, secret.derive("user", nonces)):
        raise Refused("it does not know the secret")
    wire.write(instance + secret.derive("service", nonces, instance, proof))
    keys = secret.derive("from service", nonces), secret.derive("from user", nonces)
    return Channel(sock, *keys, frame_seconds)
