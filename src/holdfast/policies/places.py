"""Where the checkpoints of a simulated run lie, and for how long: the primary, and mirrors that run after it.

Each place decides with `policies.plan`, as a real one does: the primary after each commit, a mirror each time it is
free, on what the primary holds then and what lies there already; it copies one at a time, the newest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord
from holdfast.policies.arguments import amount
from holdfast.policies.plan import Decision, plan
from holdfast.policies.rules import Rule

__all__ = ["Place", "Price", "Sizes", "Stay", "Storage", "lost_work", "peak_together"]

MONTH_SECONDS = 730 * 3600.0
PART_BYTES = 8 << 20  # of a multipart upload, each a request
FINE_RECORDS = 250
WRITES_BESIDE = 2  # requests for a checkpoint besides its data: the manifest, a segment of the log

Label = Callable[[Sequence[CheckpointRecord]], list[CheckpointRecord]]


@dataclass(frozen=True, slots=True)
class Price:
    """What a place charges: for a GB (10^9 bytes) kept for a month of 730 hours, and for a thousand writes."""

    gb_month: float = 0.0
    thousand_writes: float = 0.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """The state in bytes, the share of it that changes between saves, and the share that weights are (a demoted
    checkpoint keeps them alone). What does not change lies in a place once.

    Raises:
        PolicyError: a share is not between 0 and 1.
    """

    state: int
    changed: float = 1.0
    weights: float = 1 / 3

    def __post_init__(self) -> None:
        for name, share in (("changed", self.changed), ("weights", self.weights)):
            if amount(name, share, zero=True) > 1:
                raise PolicyError(f"{name}={share} must be a share of the state, 0 to 1")

    @property
    def new(self) -> int:
        """What a save writes when there is one before it."""
        return round(self.state * self.changed)

    def together(self, records: Iterable[CheckpointRecord]) -> int:
        """Return the bytes that a set of checkpoints takes up."""
        demoted = [r.demoted for r in records]
        return self.of(demoted.count(False), demoted.count(True))

    def of(self, whole: int, demoted: int) -> int:
        """Return the bytes of so many checkpoints."""
        shared = self.state - self.new
        if not whole:
            shared = round(shared * self.weights) if demoted else 0
        return shared + whole * self.new + demoted * round(self.new * self.weights)


@dataclass(frozen=True, slots=True)
class Place:
    """A store: what it keeps (None: everything; a mirror: what the primary keeps), how fast a copy gets there, and how
    many times smaller files lie there.

    Raises:
        PolicyError: nothing ever gets there, or files have no size.
    """

    name: str
    keep: Rule | None = None
    bytes_per_second: float = math.inf
    ratio: float = 1.0
    price: Price = field(default_factory=Price)

    def __post_init__(self) -> None:
        amount("ratio", self.ratio)
        if not self.bytes_per_second > 0:
            raise PolicyError(f"{self.name}: {self.bytes_per_second} bytes per second get nowhere")


@dataclass(frozen=True, slots=True)
class Stay:
    """What a place held in the course of the run: `sizes[i]` bytes from `times[i]` on, to `end`.

    `arrivals` are pairs of when a checkpoint was there and when its state was that of the run; `kept` are the latter of
    those still there.
    """

    place: Place
    times: tuple[float, ...]
    sizes: tuple[int, ...]
    arrivals: tuple[tuple[float, float], ...]
    kept: tuple[float, ...]
    writes: int
    end: float

    @property
    def peak_bytes(self) -> int:
        return max(self.sizes, default=0)

    @property
    def end_bytes(self) -> int:
        return self.sizes[-1] if self.sizes else 0

    @property
    def byte_seconds(self) -> float:
        ends = (*self.times[1:], self.end)
        return sum(s * (b - a) for s, a, b in zip(self.sizes, self.times, ends, strict=True))

    @property
    def mean_bytes(self) -> float:
        return self.byte_seconds / self.end if self.end else 0.0

    @property
    def cost(self) -> float:
        """What the run's whole time here costs."""
        kept = self.byte_seconds / 1e9 / MONTH_SECONDS * self.place.price.gb_month
        return kept + self.writes / 1000 * self.place.price.thousand_writes

    def lost(self, seconds: float) -> tuple[float, float]:
        """Return the mean and the most training that a failure loses when the run goes on from what lies here."""
        return lost_work(self.arrivals, seconds)


def peak_together(stays: Iterable[Stay]) -> int:
    """Return the most bytes that lie in all places at once, those included that retention frees in the same moment."""
    changes = [
        (t, i, size) for i, stay in enumerate(stays) for t, size in zip(stay.times, stay.sizes, strict=True)
    ]
    held: dict[int, int] = {}
    most = 0
    for _, place, size in sorted(changes, key=lambda change: change[0]):  # stable: in a place, as it came
        held[place] = size
        most = max(most, sum(held.values()))
    return most


def lost_work(arrivals: Iterable[tuple[float, float]], seconds: float) -> tuple[float, float]:
    """Return mean and maximum, over a run of some length, of the time since the state of the newest checkpoint that had
    arrived."""
    area = worst = at = newest = 0.0
    for arrived, saved in (*sorted(arrivals), (math.inf, 0.0)):
        until = min(arrived, seconds)
        if until > at:
            area += ((until - newest) ** 2 - (at - newest) ** 2) / 2
            worst, at = max(worst, until - newest), until
        newest = max(newest, saved)
    return (area / seconds if seconds else 0.0), worst


class Storage:
    """All places of a run. `start` is the wall time at which the run begins.

    Where the primary keeps more than FINE_RECORDS checkpoints its rule, which looks at all of them, is asked less often
    than at each commit: so much that what lies there too long is a part in FINE_RECORDS at most.
    """

    def __init__(self, places: Sequence[Place], sizes: Sizes, start: float) -> None:
        self._primary = _Shelf(places[0], sizes, start)
        self._mirrors = [_Mirror(place, sizes, start) for place in places[1:]]
        self._unasked = 0  # commits since retention was asked
        self._ask: Callable[[], None] = lambda: None

    def commit(self, record: CheckpointRecord, saved: float, durable: float, label: Label) -> None:
        """Take in a checkpoint that is durable now, with the state of the run at `saved`."""
        for mirror in self._mirrors:
            mirror.advance(durable, self._primary)
        primary = self._primary
        primary.put(record, saved, durable)
        self._unasked += 1
        self._ask = partial(self._retain, durable, label)
        if self._unasked * FINE_RECORDS > len(primary.records):
            self._ask()

    def _retain(self, now: float, label: Label) -> None:
        primary = self._primary
        primary.records = {r.attempt: r for r in label([*primary.records.values()])}
        primary.retain(now)
        self._unasked = 0

    def finish(self) -> None:
        """Let mirrors come after, now that the run is over."""
        if self._unasked:
            self._ask()
        for mirror in self._mirrors:
            mirror.advance(math.inf, self._primary)

    def stays(self, seconds: float) -> tuple[Stay, ...]:
        """Return what each place held, up to when all was in place."""
        shelves = (self._primary, *self._mirrors)
        end = max([seconds, *(s.times[-1] for s in shelves if s.times)])
        return tuple(shelf.stay(end) for shelf in shelves)


class _Shelf:
    """What lies in a place now, and how that came to be."""

    def __init__(self, place: Place, sizes: Sizes, start: float) -> None:
        self.place = place
        self.records: dict[str, CheckpointRecord] = {}
        self.times: list[float] = []
        self._sizes = sizes
        self._start = start
        self._bytes: list[int] = []
        self._arrivals: list[tuple[float, float]] = []
        self._saved: dict[str, float] = {}
        self._whole = 0
        self._writes = 0

    def put(self, record: CheckpointRecord, saved: float, now: float) -> None:
        """Take in a checkpoint."""
        self._writes += math.ceil(self.takes() / PART_BYTES) + WRITES_BESIDE
        self.records[record.attempt] = record
        self._saved[record.attempt] = saved
        self._arrivals.append((now, saved))
        self._whole += not record.demoted
        self._note(now)

    def takes(self) -> float:
        """Return the bytes that the next checkpoint adds."""
        new = self._sizes.new if self._whole else self._sizes.state
        return new / self.place.ratio

    def retain(self, now: float, among: Sequence[CheckpointRecord] | None = None) -> None:
        """Give up what the rule does not keep, of what lies here or of more."""
        if self.place.keep is not None:
            records = list(self.records.values()) if among is None else among
            for d in self.decide(records, now):
                record = self.records.get(d.attempt)
                if record is not None and d.action == "drop":
                    self.drop(d.attempt)
                elif record is not None and d.action == "demote" and not record.demoted:
                    stored = round(record.stored_bytes * self._sizes.weights)
                    self.records[d.attempt] = replace(record, demoted=True, stored_bytes=stored)
                    self._whole -= 1
            self._note(now)

    def decide(self, records: Sequence[CheckpointRecord], now: float) -> tuple[Decision, ...]:
        """Ask the rule."""
        return plan(records, self.place.keep, now=self._start + now, stored_together=self._sizes.together)

    def drop(self, attempt: str) -> None:
        """Remove a checkpoint."""
        self._whole -= not self.records.pop(attempt).demoted

    def _note(self, now: float) -> None:
        size = round(self._sizes.of(self._whole, len(self.records) - self._whole) / self.place.ratio)
        if not self._bytes or self._bytes[-1] != size:
            self.times.append(now)
            self._bytes.append(size)

    def saved(self, attempt: str) -> float:
        """Return when the run was in the state that a checkpoint holds."""
        return self._saved[attempt]

    def stay(self, end: float) -> Stay:
        """Return what came of it."""
        kept = tuple(sorted(self._saved[attempt] for attempt in self.records))
        return Stay(
            self.place, tuple(self.times), tuple(self._bytes), tuple(self._arrivals), kept, self._writes, end
        )


class _Mirror(_Shelf):
    """A place that copies from the primary."""

    _free = 0.0

    def advance(self, until: float, primary: _Shelf) -> None:
        """Do what there is to do up to a time, while the primary holds what it holds now."""
        while self._free < until:
            missing = self._missing(primary)
            if not missing:
                self._give_up(primary)
                self._free = until
                return
            copied = max(missing, key=lambda r: (not r.demoted, r.step))
            self._free += self.takes() / self.place.bytes_per_second
            self.put(copied, primary.saved(copied.attempt), self._free)
            self._give_up(primary)

    def _missing(self, primary: _Shelf) -> list[CheckpointRecord]:
        """Return what ought to be here and is not."""
        missing = [r for r in primary.records.values() if r.attempt not in self.records]
        if self.place.keep is None or not missing:
            return missing
        wanted = {d.attempt for d in self.decide(self._both(primary), self._free) if d.action == "keep"}
        return [r for r in missing if r.attempt in wanted]

    def _give_up(self, primary: _Shelf) -> None:
        if self.place.keep is not None:
            self.retain(self._free, self._both(primary))
        else:
            for attempt in self.records.keys() - primary.records.keys():
                self.drop(attempt)
            self._note(self._free)

    def _both(self, primary: _Shelf) -> list[CheckpointRecord]:
        return sorted({**self.records, **primary.records}.values(), key=lambda r: r.step)
