"""Where ranks meet: sealed documents in the run's store, under `ranks/`, and patience with an end.

Rank 0 holds the run's lease. It hears a word of every other rank and publishes an opening that repeats it, so that
nobody takes an earlier launch's opening for this one's. From then on all that is said stands under the lease's
generation, so a launch that was given up does not speak to its successor.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.core.errors import HoldfastError, NotFound, RanksDisagree
from holdfast.core.processes import has_ended, namespace, process_start
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.words import Ack, Company, Hello, Opening, Process
from holdfast.format.documents import decode_document
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["Meeting"]

Word = TypeVar("Word")
Found = TypeVar("Found")

PREFIX = "ranks"
OPENING = f"{PREFIX}/opening.json"
LEFT = "left"
MAX_WORD_BYTES = 1 << 30  # a record holds a rank's trees
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5
ORPHAN_SECONDS = (
    20.0  # after which a writer whose trainer is gone, and which hears nothing new, waits no more
)
GONE_SECONDS = 2.0  # how long the word of a rank whose processes have ended may still be on its way
LOOK_SECONDS = 1.0  # how often the processes of silent ranks are looked at


class Meeting:
    """The ranks of one launch, as one of them hears and is heard."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self.store = store
        self.ranks = ranks
        self.generation = 0
        self.near: dict[int, list[Process]] = {}  # processes of other ranks, where they can be looked at
        self.writer = 0  # the process that makes this rank's snapshots durable
        self.alone_since: float | None = (
            None  # since when this rank's trainer is gone, on the monotonic clock
        )
        self._nonce = self.launch = secrets.token_hex(8)

    @classmethod
    def of(cls, store: Store, company: Company) -> Meeting:
        """Return the meeting as another process of the same rank knows it."""
        found = cls(store, Ranks(company.rank, company.world, company.seconds))
        found.generation, found.near = company.generation, dict(company.near)
        return found

    @property
    def company(self) -> Company:
        """What another process must know to act for this rank."""
        ranks = self.ranks
        return Company(ranks.rank, ranks.world, ranks.seconds, self.generation, self.near)

    # ---- the beginning --------------------------------------------------------------------------------------------

    def open(self, run: str, generation: int) -> None:
        """As rank 0, holding the lease: return when every other rank is there.

        Raises:
            RanksDisagree: one is not there in time, or counts the ranks otherwise.
        """
        self.generation = generation
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
                self._put(
                    OPENING,
                    Opening(
                        run,
                        generation,
                        self.ranks.world,
                        heard,
                        _process(os.getpid()),
                        self._writer(),
                        self.launch,
                    ),
                )
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
        self.near = {r: _seen(hello) for r, hello in told.items() if _seen(hello)}
        # Not before: a rank that is slow to leave the launch before may still be hearing how its last save ended.
        mine = (f"{PREFIX}/{generation:012d}/", OPENING)
        self.store.delete([key for key in self.store.names(PREFIX) if not key.startswith(mine)])

    def join(self) -> Opening:
        """As another rank: return what rank 0 opens this launch with.

        Raises:
            RanksDisagree: it does not in time.
        """
        rank, world = self.ranks.rank, self.ranks.world
        self._put(_hello(rank), Hello(rank, world, self._nonce, _process(os.getpid()), self._writer()))

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
        self.generation, self.launch = opening.generation, opening.launch
        self.near = {0: _seen(opening)} if _seen(opening) else {}
        self._put(_ack(rank, self._nonce), Ack(rank))
        return opening

    # ---- later ----------------------------------------------------------------------------------------------------

    def say(self, topic: str, word: object) -> None:
        """Publish this rank's word on a topic."""
        self._put(self._key(topic, self.ranks.rank), word)

    def hear(self, topic: str, rank: int, kind: type[Word], *, unless: str = "") -> Word | None:
        """Return another rank's word on a topic; None when it does not come in time, or the rank's word on the topic
        `unless` comes instead."""
        patience = _Patience(self)
        while True:
            word = self.look(topic, rank, kind)
            if word is not None or patience.is_over([rank]):
                return word
            if unless and self._is_there(self._key(unless, rank)):
                return self.look(topic, rank, kind)
            patience.pause()

    def hear_all(
        self, topic: str, kind: type[Word], enough: Callable[[Word], bool] = lambda word: False
    ) -> dict[int, Word]:
        """Return what every other rank has to say on a topic, in time; who is silent is missing. No more is waited for
        when a word is `enough`."""
        heard: dict[int, Word] = {}
        silent = set(range(1, self.ranks.world))
        patience = _Patience(self)
        while True:
            there = set(self.store.names(f"{PREFIX}/{self.generation:012d}/{topic}"))
            for rank in sorted(silent):
                word = self.look(topic, rank, kind) if self._key(topic, rank) in there else None
                if word is not None:
                    heard[rank] = word
                    patience.renew()
            silent.difference_update(heard)
            if not silent or any(map(enough, heard.values())) or patience.is_over(silent):
                return heard
            patience.pause()

    def look(self, topic: str, rank: int, kind: type[Word]) -> Word | None:
        """Return another rank's word on a topic if it is there."""
        return self._look(self._key(topic, rank), kind)

    def forget(self, topic: str) -> None:
        """Free what was said on a topic that everybody has heard."""
        with contextlib.suppress(HoldfastError):  # the next launch frees it
            self.store.delete(self.store.names(f"{PREFIX}/{self.generation:012d}/{topic}"))

    def missing(self, heard: Sequence[int]) -> str:
        """Return the names of those who were not heard, and what is known of them."""
        silent = [r for r in range(1, self.ranks.world) if r not in heard]
        gone = [r for r in silent if self.is_gone(r)]
        known = f" (the process of {_named(gone)} has ended, or gave the run up)" if gone else ""
        return _named(silent) + known

    def has_left(self, rank: int) -> bool:
        """Return True only when the training process of a rank is known to have ended, or to have given the run up."""
        processes = self.near.get(rank, [])
        return (bool(processes) and has_ended(processes[0].pid, processes[0].started)) or self._said_goodbye(
            rank
        )

    def is_gone(self, rank: int) -> bool:
        """Return True only when a rank is known to have ended, its writer process included, or to have given the run
        up."""
        processes = self.near.get(rank, [])
        ended = bool(processes) and all(has_ended(p.pid, p.started) for p in processes)
        return ended or self._said_goodbye(rank)

    def leave(self) -> None:
        """Say that nothing more will come of this rank, so that nobody waits for it."""
        with contextlib.suppress(HoldfastError):
            self.say(LEFT, Ack(self.ranks.rank))

    def _said_goodbye(self, rank: int) -> bool:
        return self.look(LEFT, rank, Ack) is not None

    def _writer(self) -> Process | None:
        return _process(self.writer) if self.writer else None

    def _key(self, topic: str, rank: int) -> str:
        return f"{PREFIX}/{self.generation:012d}/{topic}/{rank:05d}.json"

    def _put(self, key: str, word: object) -> None:
        self.store.replace(key, seal(msgspec.json.encode(word)))

    def _is_there(self, key: str) -> bool:
        try:
            self.store.info(key)
        except NotFound:
            return False
        return True

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


class _Patience:
    """How long one waits for others: so many seconds, and no longer than there is hope."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._end = time.monotonic() + meeting.ranks.seconds
        self._pause = FIRST_PAUSE
        self._looked = self._news = time.monotonic()
        self._gone: dict[int, float] = {}  # since when

    def renew(self) -> None:
        """Note that something was heard."""
        self._news = time.monotonic()
        self._pause = FIRST_PAUSE

    def pause(self) -> None:
        """Wait a little, longer each time."""
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def is_over(self, silent: Iterable[int]) -> bool:
        """Return whether to wait for these no more."""
        now = time.monotonic()
        if now >= self._end:
            return True
        since = self._meeting.alone_since
        alone = since is not None and now >= max(since, self._news) + ORPHAN_SECONDS
        if alone and not any(r in self._meeting.near and not self._meeting.is_gone(r) for r in silent):
            return True
        if now >= self._looked + LOOK_SECONDS:
            self._looked = now
            for rank in silent:
                if rank not in self._gone and self._meeting.is_gone(rank):
                    self._gone[rank] = now
        return any(now >= self._gone[rank] + GONE_SECONDS for rank in silent if rank in self._gone)


def _process(pid: int) -> Process:
    return Process(pid, process_start(pid), namespace())


def _seen(word: Hello | Opening) -> list[Process]:
    """Return the processes of a rank, if they are of this machine and can be looked at."""
    found = [p for p in (word.process, word.writer) if p is not None]
    near = [p.namespace == namespace() and process_start(p.pid) == p.started != "" for p in found]
    return found if all(near) else []


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
