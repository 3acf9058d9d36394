"""The roll call at the beginning of a launch: rank 0 hears a word of every other rank, and answers them by groups, so
that what each reads does not grow with their number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from holdfast.core.units import format_count
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.speech import look_for_all, put_all
from holdfast.distributed.words import Hello, Opening
from holdfast.stores import Store

__all__ = ["PREFIX", "RollCall", "ack_key", "hello_key", "not_come", "opening_key"]

PREFIX = "ranks"
HELLOS, ACKS = f"{PREFIX}/hello", f"{PREFIX}/ack"
GROUP_RANKS = 256  # that one opening speaks to
AGAIN_SECONDS = 10.0  # after which a word of who is silent is read again, for no listing shows times exactly


class RollCall:
    """Who has come, as rank 0 knows. `opening` makes what is published to ranks from their nonces."""

    def __init__(self, store: Store, ranks: Ranks, opening: Callable[[dict[str, str]], Opening]) -> None:
        self.told: dict[int, Hello] = {}
        self._store, self._ranks, self._opening = store, ranks, opening
        self._stamps: dict[int, tuple[float, int]] = {}  # of the hellos that were read, as they were listed
        self._published: dict[str, dict[str, str]] = {}  # nonces, by the opening that repeats them
        # Who has not come; once all have, who has not acknowledged the opening.
        self._silent = set(range(1, ranks.world))
        self._again = math.inf  # when they are asked next

    def all_are_there(self) -> bool:
        """Look once more; return whether every rank has acknowledged an opening that repeats its nonce."""
        self._hear()
        nonces = self._nonces()
        self._silent = {rank for rank in range(1, self._ranks.world) if rank not in nonces}
        if self._silent:
            return False
        self._publish(nonces)
        acks = set(self._store.names(ACKS))
        self._silent = {r for r, nonce in nonces.items() if ack_key(r, nonce) not in acks}
        return not self._silent

    def silent(self) -> list[int]:
        """Return who did not come, or did not acknowledge."""
        return sorted(self._silent)

    def odd(self) -> str:
        """Return a few words on those who count the ranks otherwise."""
        world = self._ranks.world
        told = sorted(self.told.items())
        odd = [f"rank {r} counts {format_count(h.world, 'rank')}" for r, h in told if h.world != world]
        return f": {', '.join(odd)}" if odd else ""

    def _nonces(self) -> dict[int, str]:
        return {r: hello.nonce for r, hello in self.told.items() if hello.world == self._ranks.world}

    def _hear(self) -> None:
        """Read the hellos that are new, or were written anew by a rank that was started again."""
        listed = {o.key: (o.modified, o.size) for o in self._store.list(HELLOS)}
        there = {r: listed[hello_key(r)] for r in range(1, self._ranks.world) if hello_key(r) in listed}
        again = time.monotonic() >= self._again
        new = [r for r in there if there[r] != self._stamps.get(r) or (again and r in self._silent)]
        words = look_for_all(self._store, [hello_key(r) for r in new], Hello)
        for rank, hello in zip(new, words, strict=True):
            if hello is not None:
                self.told[rank], self._stamps[rank] = hello, there[rank]
        if again:
            self._again = time.monotonic() + AGAIN_SECONDS

    def _publish(self, nonces: dict[int, str]) -> None:
        wanted: dict[str, dict[str, str]] = {}
        for rank, nonce in sorted(nonces.items()):
            wanted.setdefault(opening_key(rank), {})[str(rank)] = nonce
        new = {key: told for key, told in wanted.items() if told != self._published.get(key)}
        if new:
            put_all(self._store, {key: self._opening(told) for key, told in new.items()})
            self._published, self._again = wanted, time.monotonic() + AGAIN_SECONDS


def opening_key(rank: int) -> str:
    """Return the key of the opening that speaks to a rank."""
    return f"{PREFIX}/opening-{rank // GROUP_RANKS:05d}.json"


def hello_key(rank: int) -> str:
    """Return the key of a rank's hello."""
    return f"{HELLOS}/{rank:05d}.json"


def not_come(store: Store, world: int) -> list[int]:
    """Return which ranks but the first have left no word, of this launch or one that was given up."""
    there = set(store.names(HELLOS))
    return [rank for rank in range(1, world) if hello_key(rank) not in there]


def ack_key(rank: int, nonce: str) -> str:
    """Return the key of a rank's acknowledgement."""
    return f"{ACKS}/{rank:05d}-{nonce}.json"
