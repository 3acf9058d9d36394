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

from holdfast.core.errors import HoldfastError, NotFound, RanksDisagree
from holdfast.core.processes import has_ended, namespace, process_start
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.rollcall import PREFIX, RollCall, ack_key, hello_key, not_come, opening_key
from holdfast.distributed.speech import drop_all, look_for, look_for_all, put_word
from holdfast.distributed.words import Ack, Company, Hello, Opening, Process
from holdfast.stores import Store

__all__ = ["Meeting"]

Word = TypeVar("Word")
Found = TypeVar("Found")

LEFT = "left"
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5
LONGER = 1.25  # one hears a word that took a while at most so much later
LOOKS_A_SECOND = 2_000  # of all ranks together; S3 answers 5 500 requests a second
GOLDEN = 0.618  # multiples of it lie evenly between whole numbers
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
        roll = RollCall(self.store, self.ranks, lambda hellos: self._opening(run, hellos))
        if self._until(roll.all_are_there) is None:
            raise RanksDisagree(
                f"{self.store.url}: rank 0 waited {self.ranks.seconds:g} s for {self.ranks.world - 1} others; "
                f"{_named(roll.silent())} did not come{roll.odd()}. See what became of it, and start all ranks anew"
            )
        here = namespace()
        self.near = {r: near for r, hello in roll.told.items() if (near := _seen(hello, here))}
        # Not before: a rank that is slow to leave the launch before may still be hearing how its last save ended.
        mine = (f"{PREFIX}/{generation:012d}/", f"{PREFIX}/opening-")
        drop_all(self.store, [key for key in self.store.names(PREFIX) if not key.startswith(mine)])

    def _opening(self, run: str, nonces: dict[str, str]) -> Opening:
        world = self.ranks.world
        return Opening(
            run, self.generation, world, nonces, _process(os.getpid()), self._writer(), self.launch
        )

    def join(self) -> Opening:
        """As another rank: return what rank 0 opens this launch with.

        Raises:
            RanksDisagree: it does not in time.
        """
        rank, world = self.ranks.rank, self.ranks.world
        hello = Hello(rank, world, self._nonce, _process(os.getpid()), self._writer())
        put_word(self.store, hello_key(rank), hello)

        def opened() -> Opening | None:
            found = look_for(self.store, opening_key(rank), Opening)
            ours = found is not None and found.nonces.get(str(rank)) == self._nonce and found.world == world
            return found if ours else None

        opening = self._until(opened)
        if opening is None:
            silent = not_come(self.store, world)
            who = (
                f"{_named(silent)} did not come; see what became of it"
                if silent
                else "see what became of rank 0"
            )
            raise RanksDisagree(
                f"{self.store.url}: rank {rank} of {world} waited {self.ranks.seconds:g} s for rank 0 to take the run "
                f"up, which it does when all have come: {who}, and whether all are given the same url"
            )
        self.generation, self.launch = opening.generation, opening.launch
        near = _seen(opening, namespace())
        self.near = {0: near} if near else {}
        put_word(self.store, ack_key(rank, self._nonce), Ack(rank))
        return opening

    # ---- later ----------------------------------------------------------------------------------------------------

    def say(self, topic: str, word: object) -> None:
        """Publish this rank's word on a topic."""
        put_word(self.store, self._key(topic, self.ranks.rank), word)

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
        while silent:
            # Behind those who were heard: while one is waited for, what is listed is what is new.
            after = self._key(topic, min(silent) - 1)
            there = set(self.store.names(self._place(topic), after))
            new = [rank for rank in sorted(silent) if self._key(topic, rank) in there]
            words = look_for_all(self.store, [self._key(topic, rank) for rank in new], kind)
            found = {rank: word for rank, word in zip(new, words, strict=True) if word is not None}
            heard |= found
            silent.difference_update(found)
            if found:
                patience.renew()
            if any(map(enough, found.values())) or (silent and patience.is_over(silent)):
                break
            if silent:
                patience.pause()
        return heard

    def look(self, topic: str, rank: int, kind: type[Word]) -> Word | None:
        """Return another rank's word on a topic if it is there."""
        return look_for(self.store, self._key(topic, rank), kind)

    def forget(self, topic: str) -> None:
        """Free what was said on a topic that everybody has heard."""
        with contextlib.suppress(HoldfastError):  # the next launch frees it
            drop_all(self.store, self.store.names(self._place(topic)))

    def heard(self, topic: str) -> list[int]:
        """Return which ranks but the first have said something on a topic."""
        there = set(self.store.names(self._place(topic)))
        return [rank for rank in range(1, self.ranks.world) if self._key(topic, rank) in there]

    def missing(self, heard: Sequence[int]) -> str:
        """Return the names of those who were not heard, and what is known of them."""
        silent = [r for r in range(1, self.ranks.world) if r not in heard]
        gone = sorted(self.gone_among(silent))
        known = f" (the process of {_named(gone)} has ended, or gave the run up)" if gone else ""
        return _named(silent) + known

    def has_left(self, rank: int) -> bool:
        """Return True only when the training process of a rank is known to have ended, or to have given the run up."""
        processes = self.near.get(rank, [])
        ended = bool(processes) and has_ended(processes[0].pid, processes[0].started)
        return ended or bool(self._goodbyes([rank]))

    def is_gone(self, rank: int) -> bool:
        """Return True only when a rank is known to have ended, its writer process included, or to have given the run
        up."""
        return bool(self.gone_among([rank]))

    def gone_among(self, ranks: Iterable[int]) -> set[int]:
        """Return which of some ranks are known to be gone; see `is_gone`."""
        asked = list(ranks)
        ended = {
            r for r in asked if r in self.near and all(has_ended(p.pid, p.started) for p in self.near[r])
        }
        return ended | self._goodbyes([r for r in asked if r not in ended])

    def leave(self) -> None:
        """Say that nothing more will come of this rank, so that nobody waits for it."""
        with contextlib.suppress(HoldfastError):
            self.say(LEFT, Ack(self.ranks.rank))

    def _goodbyes(self, ranks: Sequence[int]) -> set[int]:
        """Return which of some ranks gave the run up: by one request, however many they are."""
        if len(ranks) == 1:
            return {ranks[0]} if self._is_there(self._key(LEFT, ranks[0])) else set()
        there = set(self.store.names(self._place(LEFT))) if ranks else set()
        return {r for r in ranks if self._key(LEFT, r) in there}

    def _writer(self) -> Process | None:
        return _process(self.writer) if self.writer else None

    def _place(self, topic: str) -> str:
        return f"{PREFIX}/{self.generation:012d}/{topic}"

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._place(topic)}/{rank:05d}.json"

    def _is_there(self, key: str) -> bool:
        try:
            self.store.info(key)
        except NotFound:
            return False
        return True

    def _until(self, found: Callable[[], Found | None]) -> Found | None:
        """Return what is found, as soon as it is something true; None at the deadline."""
        end, pauses = time.monotonic() + self.ranks.seconds, _pauses(self.ranks)
        while True:
            it = found()
            left = end - time.monotonic()
            if it or left <= 0:
                return it or None
            time.sleep(min(next(pauses), left))


class _Patience:
    """How long one waits for others: so many seconds, and no longer than there is hope."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._end = time.monotonic() + meeting.ranks.seconds
        self._pauses = _pauses(meeting.ranks)
        self._looked = self._news = time.monotonic()
        self._gone: dict[int, float] = {}  # since when

    def renew(self) -> None:
        """Note that something was heard."""
        self._news = time.monotonic()
        self._pauses = _pauses(self._meeting.ranks)

    def pause(self) -> None:
        """Wait a little, longer each time."""
        time.sleep(next(self._pauses))

    def is_over(self, silent: Iterable[int]) -> bool:
        """Return whether to wait for these no more."""
        now = time.monotonic()
        if now >= self._end:
            return True
        since = self._meeting.alone_since
        alone = since is not None and now >= max(since, self._news) + ORPHAN_SECONDS
        waiting = list(silent)
        near = [r for r in waiting if r in self._meeting.near]
        if alone and not set(near) - self._meeting.gone_among(near):
            return True
        if now >= self._looked + LOOK_SECONDS:
            self._looked = now
            for rank in self._meeting.gone_among([r for r in waiting if r not in self._gone]):
                self._gone[rank] = now
        return any(now >= self._gone[rank] + GONE_SECONDS for rank in waiting if rank in self._gone)


def _process(pid: int) -> Process:
    return Process(pid, process_start(pid), namespace())


def _seen(word: Hello | Opening, here: str) -> list[Process]:
    """Return the processes of a rank, if they are of this machine and can be looked at."""
    found = [p for p in (word.process, word.writer) if p is not None]
    near = [p.namespace == here and process_start(p.pid) == p.started != "" for p in found]
    return found if all(near) else []


def _pauses(ranks: Ranks) -> Iterator[float]:
    """Yield how long to wait before each further look, in seconds. Those who wait for rank 0 look at one word each, and
    are many: together they look no more often than a store answers, and not all in the same moment."""
    least = 0.0 if ranks.leads else ranks.world / LOOKS_A_SECOND * (0.75 + ranks.rank * GOLDEN % 1 / 2)
    pause = FIRST_PAUSE
    while True:
        yield max(pause, least)
        pause = min(LONGER * pause, LONGEST_PAUSE)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
