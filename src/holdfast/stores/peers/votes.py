"""What a service does for a ring: one acceptor of CASPaxos for each key.

A register holds the last value that this service accepted, and the latest proposal that it promised to. Whether a
value is *the* value is what a majority of the ring's services says; none of them knows that alone.
Source: Rystsov, "CASPaxos: Replicated State Machines without logs" (2018).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from holdfast.core.errors import AlreadyExists, StoreError
from holdfast.core.names import check_key
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.shelf import Shelf

__all__ = ["Votes", "ring_id"]

NOTHING = m.Value()
FIRST = m.Ballot()


def ring_id(members: Sequence[bytes]) -> bytes:
    """Return what tells a ring of these instances from any other."""
    return blake3(b"".join(members), derive_key_context="holdfast 2026 peer memory, ring").digest(16)


@dataclass(slots=True)
class _Register:
    promised: m.Ballot = FIRST
    accepted: m.Ballot = FIRST
    value: m.Value = NOTHING
    held: object = None  # the memory that is counted for it

    def vote(self, *, granted: bool) -> m.Vote:
        return m.Vote(granted, self.promised, self.accepted, self.value, time.time())


@dataclass(slots=True)
class _Ring:
    members: list[bytes]
    id: bytes
    registers: dict[str, _Register] = field(default_factory=dict)


class Votes:
    """The registers of all rings that this service is in. Thread-safe.

    A service answers for a ring only as the very instance that the ring was formed with: one that was restarted has
    forgotten how it voted, and has no vote any more.
    """

    def __init__(self, shelf: Shelf, instance: bytes) -> None:
        self._shelf = shelf
        self._instance = instance
        self._rings: dict[str, _Ring] = {}
        self._lock = threading.Lock()

    def answer(self, request: m.OfRings) -> m.Answer:
        """Do what is asked.

        Raises:
            StoreError: this service is not in that ring.
            OutOfSpace: a value does not fit.
        """
        with self._lock:
            match request:
                case m.Members():
                    return self._members(request)
                case m.Peek():
                    return self._register(request).vote(granted=True)
                case m.Prepare():
                    return self._promise(request)
                case m.Accept():
                    return self._accept(request)
                case m.Registers():
                    return self._list(request)

    def _members(self, request: m.Members) -> m.Members:
        check_key(request.prefix)
        ring = self._rings.get(request.prefix)
        if not request.form:
            return m.Members(request.prefix, ring.members if ring is not None else [])
        if self._instance not in request.form:
            raise StoreError("this service is not one of those that the ring is to be made of")
        if ring is not None and ring.members != request.form and ring.id != request.over:
            raise AlreadyExists("this service is in another ring of that name")
        if ring is None or ring.members != request.form:
            self._shelf.delete(
                [info.key for info in self._shelf.list(request.prefix, "", 2**62)[0]]
                if ring is not None
                else []
            )
            self._rings[request.prefix] = _Ring(list(request.form), ring_id(request.form))
        return m.Members(request.prefix, request.form)

    def _ring(self, prefix: str, id: bytes) -> _Ring:
        ring = self._rings.get(prefix)
        if ring is None or ring.id != id:
            raise StoreError(
                "this service is not in that ring; it was restarted, or the ring was formed anew"
            )
        return ring

    def _register(self, request: m.Prepare | m.Accept | m.Peek) -> _Register:
        ring = self._ring(request.prefix, request.ring)
        found = ring.registers.get(check_key(request.key))
        if found is None:
            found = _Register()
            if not isinstance(request, m.Peek):
                ring.registers[request.key] = found
        return found

    def _promise(self, request: m.Prepare) -> m.Vote:
        register = self._register(request)
        granted = request.ballot > register.promised
        if granted:
            register.promised = request.ballot
        return register.vote(granted=granted)

    def _accept(self, request: m.Accept) -> m.Vote:
        register = self._register(request)
        granted = request.ballot >= register.promised
        if granted:
            value = request.value
            held = register.held  # accepting the same again takes no more
            if value != register.value:
                held = None if value.dead else self._shelf.take(len(value.data))
            register.promised = register.accepted = request.ballot
            register.value, register.held = value, held
        return register.vote(granted=granted)

    def _list(self, request: m.Registers) -> m.Registered:
        ring = self._ring(request.prefix, request.ring)
        start = f"{check_key(request.below)}/" if request.below else ""
        keys = sorted(k for k in ring.registers if k.startswith(start) and k > request.after)
        found = [(k, ring.registers[k]) for k in keys[: m.PAGE_KEYS]]
        return m.Registered(
            [(k, r.accepted, r.value.dead, r.value.size, r.value.time) for k, r in found],
            len(keys) > m.PAGE_KEYS,
        )
