"""Where ranks meet: sealed documents in the run's store, under `ranks/`, and patience with an end.

Rank 0 holds the run's lease. It hears a word of every other rank and publishes an opening that repeats it, so that
nobody takes an earlier launch's opening for this one's. From then on all that is said stands under the lease's
generation, so a launch that was given up does not speak to its successor.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.core.errors import HoldfastError, NotFound, RanksDisagree
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.words import Ack, Hello, Opening
from holdfast.format.documents import decode_document
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["Meeting"]

Word = TypeVar("Word")
Found = TypeVar("Found")

PREFIX = "ranks"
OPENING = f"{PREFIX}/opening.json"
MAX_WORD_BYTES = 1 << 30  # a record holds a rank's trees
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5


class Meeting:
    """The ranks of one launch, as one of them hears and is heard."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self.store = store
        self.ranks = ranks
        self.generation = 0
        self._nonce = secrets.token_hex(8)

    # ---- the beginning --------------------------------------------------------------------------------------------

    def open(self, run: str, generation: int) -> None:
        """As rank 0, holding the lease: return when every other rank is there.

        Raises:
            RanksDisagree: one is not there in time, or counts the ranks otherwise.
        """
        self.generation = generation
        mine = f"{PREFIX}/{generation:012d}/"
        old = [
            k
            for k in self.store.names(PREFIX)
            if not k.startswith((f"{PREFIX}/hello-", f"{PREFIX}/ack-", mine))
        ]
        self.store.delete(old)
        others = range(1, self.ranks.world)
        published: dict[str, str] = {}
        told: dict[int, Hello] = {}

        def all_there() -> bool:
            nonlocal published
            for rank in others:
                hello = self._look(_hello(rank), Hello)
                if hello is not None:
                    told[rank] = hello
            heard = {str(r): h.nonce for r, h in told.items() if h.world == self.ranks.world}
            if len(heard) < len(others):
                return False
            if heard != published:
                published = heard
                self._put(OPENING, Opening(run, generation, self.ranks.world, heard))
            acks = set(self.store.names(PREFIX))
            return all(_ack(int(rank), nonce) in acks for rank, nonce in heard.items())

        if self._until(all_there) is None:
            acks = set(self.store.names(PREFIX))
            silent = [r for r in others if str(r) not in published or _ack(r, published[str(r)]) not in acks]
            odd = [f"rank {r} counts {told[r].world} ranks" for r in others if r in told]
            odd = [words for words in odd if not words.endswith(f" {self.ranks.world} ranks")]
            raise RanksDisagree(
                f"{self.store.url}: rank 0 waited {self.ranks.seconds:g} s for {self.ranks.world - 1} others; "
                f"{_named(silent)} did not come{': ' + ', '.join(odd) if odd else ''}. See what became of it, and "
                "start all ranks anew"
            )
        self.store.delete(
            [k for k in self.store.names(PREFIX) if k.startswith((f"{PREFIX}/hello-", f"{PREFIX}/ack-"))]
        )

    def join(self) -> Opening:
        """As another rank: return what rank 0 opens this launch with.

        Raises:
            RanksDisagree: it does not in time.
        """
        rank, world = self.ranks.rank, self.ranks.world
        self._put(_hello(rank), Hello(rank, world, self._nonce))

        def opened() -> Opening | None:
            found = self._look(OPENING, Opening)
            ours = found is not None and found.nonces.get(str(rank)) == self._nonce and found.world == world
            return found if ours else None

        opening = self._until(opened)
        if opening is None:
            raise RanksDisagree(
                f"{self.store.url}: rank {rank} of {world} waited {self.ranks.seconds:g} s for rank 0 to take the run "
                "up, and it did not; see what became of rank 0, and whether all are given the same url"
            )
        self.generation = opening.generation
        self._put(_ack(rank, self._nonce), Ack(rank))
        return opening

    # ---- later ----------------------------------------------------------------------------------------------------

    def say(self, topic: str, word: object) -> None:
        """Publish this rank's word on a topic."""
        self._put(self._key(topic, self.ranks.rank), word)

    def hear(self, topic: str, rank: int, kind: type[Word]) -> Word | None:
        """Return another rank's word on a topic; None when it does not come in time."""
        return self._until(lambda: self._look(self._key(topic, rank), kind))

    def hear_all(self, topic: str, kind: type[Word]) -> dict[int, Word]:
        """Return what every other rank has to say on a topic, in time; who is silent is missing."""
        heard: dict[int, Word] = {}

        def all_said() -> bool:
            there = set(self.store.names(f"{PREFIX}/{self.generation:012d}/{topic}"))
            for rank in range(1, self.ranks.world):
                key = self._key(topic, rank)
                if rank not in heard and key in there:
                    word = self._look(key, kind)
                    if word is not None:
                        heard[rank] = word
            return len(heard) == self.ranks.world - 1

        self._until(all_said)
        return heard

    def forget(self, topic: str) -> None:
        """Free what was said on a topic that everybody has heard."""
        with contextlib.suppress(HoldfastError):  # the next launch frees it
            self.store.delete(self.store.names(f"{PREFIX}/{self.generation:012d}/{topic}"))

    def missing(self, heard: Sequence[int]) -> str:
        """Return the names of those who were not heard."""
        return _named([r for r in range(1, self.ranks.world) if r not in heard])

    def _key(self, topic: str, rank: int) -> str:
        return f"{PREFIX}/{self.generation:012d}/{topic}/{rank:05d}.json"

    def _put(self, key: str, word: object) -> None:
        self.store.replace(key, seal(msgspec.json.encode(word)))

    def _look(self, key: str, kind: type[Word]) -> Word | None:
        try:
            raw = read_document(self.store, key, MAX_WORD_BYTES)
        except NotFound:
            return None
        return decode_document(unseal(raw, key), kind, key, "a word of a rank")

    def _until(self, found: Callable[[], Found | None]) -> Found | None:
        """Return what is found, as soon as it is something true; None at the deadline."""
        for _ in _pauses(self.ranks.seconds):
            it = found()
            if it:
                return it
        return None


def _pauses(seconds: float) -> Iterator[None]:
    """Yield now and again until so many seconds are over, and once more then."""
    end, pause = time.monotonic() + seconds, FIRST_PAUSE
    while time.monotonic() < end:
        yield
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE)
    yield


def _hello(rank: int) -> str:
    return f"{PREFIX}/hello-{rank:05d}.json"


def _ack(rank: int, nonce: str) -> str:
    return f"{PREFIX}/ack-{rank:05d}-{nonce}.json"


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
