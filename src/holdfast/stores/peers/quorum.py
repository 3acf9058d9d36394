"""What several services decide together: one value for each key, by a majority of them.

CASPaxos: a proposer has a majority promise to accept nothing older, takes the newest value that any of them accepted,
makes the next one of it, and has a majority accept that. So a value that was decided is never lost or overlooked while
a majority of the services that decided it are alive, and two proposers never both find a key free. Where there is no
majority, nothing is decided: it is refused.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from holdfast.core.errors import HoldfastError, OutOfSpace, StoreError
from holdfast.stores.peers import messages as m
from holdfast.stores.peers.client import PeerStore
from holdfast.stores.peers.votes import ring_id

__all__ = ["Quorum"]

AWAY_SECONDS = 30.0  # that a service which failed is not asked again where the others are a majority
DECIDE_SECONDS = 20.0
LONGEST_PAUSE_SECONDS = 0.2

Decide = Callable[[m.Value, float], tuple[m.Value, HoldfastError | None]]


class Quorum:
    """The services of a ring. Thread-safe.

    A ring is formed once, when all of its services are there and empty. A service that was restarted since has no vote
    in it any more, as it has forgotten how it voted; it has one again in a ring that is formed anew, which is when a
    majority of the old one is gone.
    """

    def __init__(self, url: str, prefix: str, stores: Sequence[PeerStore]) -> None:
        self.url = url
        self.prefix = prefix
        self.stores = list(stores)
        self.majority = len(self.stores) // 2 + 1
        self._lock = threading.Lock()
        self._id = b""
        self._voters: set[int] = set()
        self._away: dict[int, float] = {}
        self._why: dict[int, str] = {}

    # ---- who is in it -----------------------------------------------------------------------------------------------

    def present(self) -> list[int]:
        """Return the services that have a vote and are not known to be away."""
        self._form()
        now = time.monotonic()
        return sorted(i for i in self._voters if self._away.get(i, 0.0) <= now)

    def set_aside(self, index: int, error: HoldfastError) -> None:
        """Note that a service failed."""
        self._away[index] = time.monotonic() + AWAY_SECONDS
        self._why[index] = str(error)

    def _form(self) -> None:
        with self._lock:
            if self._id:
                return
            said = self._hear_members()
            instances = [store.link.instance or b"" for store in self.stores]
            for members in {tuple(found) for found in said.values() if found}:
                alive = [i for i in said if len(members) == len(instances) and members[i] == instances[i]]
                if sum(said[i] == list(members) for i in alive) >= self.majority or (
                    len(said) == len(instances) and len(alive) >= self.majority
                ):  # it was formed; or its forming was cut short, and no vote can have been given
                    self._join(list(members), alive, said)
                    return
            if len(said) < len(self.stores):
                raise self._refusal(
                    "a ring is formed when all of its services are there, and goes on with a majority of those that it "
                    f"was formed with; {len(said)} of {len(self.stores)} answer, and they are no such majority"
                )
            for others in said.values():
                if len(set(others) & set(instances)) > len(others) // 2:
                    raise self._refusal(
                        "these services are in a ring of that name with others; give the hosts that it was formed with"
                    )
            self._join(instances, list(said), said)

    def _hear_members(self) -> dict[int, list[bytes]]:
        """Return what each service that answers says the ring is made of."""
        found: dict[int, list[bytes]] = {}
        for i, store in enumerate(self.stores):
            try:
                answer = store.link.ask(m.Members(self.prefix), "ask for the ring")
            except StoreError as e:
                self.set_aside(i, e)
                continue
            found[i] = answer.form if isinstance(answer, m.Members) else []
        if len({store.link.instance for i, store in enumerate(self.stores) if i in found}) < len(found):
            raise StoreError(f"{self.url}: two of its hosts are the same service")
        return found

    def _join(self, members: list[bytes], alive: Sequence[int], said: dict[int, list[bytes]]) -> None:
        for i in alive:
            if said[i] != members:
                over = ring_id(said[i]) if said[i] else b""
                self.stores[i].link.ask(m.Members(self.prefix, members, over), "form the ring")
        gone = set(said).difference(alive)
        self._id, self._voters = ring_id(members), set(range(len(self.stores))) - gone
        for i in gone:
            self._why[i] = (
                f"{self.stores[i].url}: was restarted since the ring was formed, and has no vote in it"
            )

    def _refusal(self, what: str) -> StoreError:
        why = "; ".join(self._why.values())
        return StoreError(f"{self.url}: {what}{f' ({why})' if why else ''}")

    # ---- asking -----------------------------------------------------------------------------------------------------

    def _to_ask(self, found: Mapping[int, object]) -> Iterator[int]:
        """Yield the services that are present; then, as long as what was `found` is no majority, those that failed a
        while ago: a network that was cut for a moment is not the loss of them."""
        present = self.present()
        yield from present
        for i in sorted(self._voters.difference(present)):
            if len(found) >= self.majority:
                return
            self._away.pop(i, None)
            yield i

    def _ask(self, make: Callable[[bytes], m.Request], doing: str) -> dict[int, m.Answer]:
        """Ask those that are to be asked; return what a majority or more of them answer.

        Raises:
            OutOfSpace: too few do, as some of them are full.
            StoreError: too few do.
        """
        found: dict[int, m.Answer] = {}
        full: OutOfSpace | None = None
        for i in self._to_ask(found):
            try:
                found[i] = self.stores[i].link.ask(make(self._id), doing)
            except OutOfSpace as e:
                full = e
            except StoreError as e:
                self.set_aside(i, e)
        if len(found) >= self.majority:
            return found
        if full is not None:
            raise full
        raise self._refusal(
            f"could not {doing}: {len(found)} of its {len(self.stores)} services answer, fewer than a majority, so "
            "nothing can be decided; start the program again with another place for the run, which is filled from its "
            "durable mirror"
        )

    def _votes(self, make: Callable[[bytes], m.Request], doing: str) -> list[m.Vote]:
        return [a for a in self._ask(make, doing).values() if isinstance(a, m.Vote)]

    def change(self, key: str, decide: Decide, doing: str, *, newest: bool = True) -> m.Value:
        """Have a majority accept what `decide` makes of a key's value, and return that.

        `decide` is told the value and the time, and gives the new value, with an error to raise once it is accepted.
        It is called again when another proposal came in between. Where the `newest` value that was accepted need not
        have been decided, the one before it counts without it: any majority that has promised will do.

        Raises:
            StoreError: whether the value was accepted is not known, or nothing was.
        """
        number, again = 0, 0
        end = time.monotonic() + DECIDE_SECONDS
        while time.monotonic() < end:
            ballot = m.Ballot(number + 1, os.urandom(16))
            votes = self._votes(lambda ring: m.Prepare(self.prefix, ring, key, ballot), doing)  # noqa: B023
            granted = [v for v in votes if v.granted]
            if len(granted) >= self.majority:
                granted.sort(key=lambda v: v.accepted)
                latest = granted[-1 if newest else self.majority - 1]
                new, refusal = decide(latest.value, max(v.time for v in votes))
                votes = self._votes(lambda ring: m.Accept(self.prefix, ring, key, ballot, new), doing)  # noqa: B023
                if sum(v.granted for v in votes) >= self.majority:  # durability: the decision
                    if refusal is not None:
                        raise refusal
                    return new
            number = max(number, *(v.promised.number for v in votes))
            time.sleep(random.uniform(0.0, min(LONGEST_PAUSE_SECONDS, 0.002 * 2.0**again)))
            again += 1
        raise self._refusal(f"could not {doing}: other writers were in between for {DECIDE_SECONDS:g} s")

    def value(self, key: str, doing: str) -> m.Value:
        """Return the value that was decided for a key; a dead one where there is none."""
        votes = self._votes(lambda ring: m.Peek(self.prefix, ring, key), doing)
        latest = max(votes, key=lambda v: v.accepted)
        if sum(v.accepted == latest.accepted for v in votes) >= self.majority:
            return latest.value
        return self._ended(key, doing)

    def _ended(self, key: str, doing: str) -> m.Value:
        """Bring to its end what a writer that died, or was refused, began; return what is decided then."""

        def keep(value: m.Value, now: float) -> tuple[m.Value, None]:
            return value, None

        try:
            return self.change(key, keep, doing)
        except OutOfSpace:  # no majority has room for it, and what is full must be listed to be emptied
            return self.change(key, keep, doing, newest=False)

    def registers(self, below: str, doing: str) -> Iterator[tuple[str, bool, int, float]]:
        """Yield key, whether it is dead, size and time of what was decided for the keys below another."""
        found: dict[int, dict[str, tuple[m.Ballot, bool, int, float]]] = {}
        for i in self._to_ask(found):
            try:
                found[i] = dict(self._pages(i, below, doing))
            except StoreError as e:
                self.set_aside(i, e)
        if len(found) < self.majority:
            self._ask(lambda ring: m.Registers(self.prefix, ring, below, ""), doing)  # which tells why
            raise self._refusal(f"could not {doing}: too few of its services answer")
        for key in sorted({key for one in found.values() for key in one}):
            held = Counter(one[key] for one in found.values() if key in one)
            latest, count = max(held.items(), key=lambda item: item[0][0])
            if count >= self.majority:
                yield key, *latest[1:]
            else:
                value = self._ended(key, doing)
                yield key, value.dead, value.size, value.time

    def _pages(
        self, index: int, below: str, doing: str
    ) -> Iterator[tuple[str, tuple[m.Ballot, bool, int, float]]]:
        after, more = "", True
        while more:
            request = m.Registers(self.prefix, self._id, below, after)
            answer = self.stores[index].link.ask(request, doing)
            if not isinstance(answer, m.Registered) or (answer.more and not answer.found):
                raise StoreError(f"{self.url}: a service answered another question")
            for key, ballot, dead, size, time_ in answer.found:
                yield key, (ballot, dead, size, time_)
            after, more = answer.found[-1][0] if answer.found else "", answer.more
